# Needs Python 3.11 or newer, pip and make. Everything is set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-quick lint bench docs clean

demo: .venv/installed
	-@$(MAKE) --silent .venv/installed-photos
	$(BIN)/certipatch demo

test: .venv/installed-test
	$(PYTEST)

test-quick: .venv/installed-test
	$(PYTEST) -m "not slow"

lint: .venv/installed-lint .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/installed-bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(PIP) --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv runs/demo runs/demo-photos dist site
