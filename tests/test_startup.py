"""What a command does not use, it does not import, so that every start is quick."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

STARTS = """
import contextlib, io, json, sys
import certipatch
steps = {"import": sorted(sys.modules)}
from certipatch import cli
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv, out = ["certipatch", *arguments], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == 0, (name, stop.code)
    assert out.getvalue(), name
    steps[name] = sorted(sys.modules)
print(json.dumps(steps))
"""
HEAVY = ("scipy", "matplotlib", "datasets", "lightning", "onnx", "onnxruntime", "onnxscript", "jinja2", "pandas", "sympy",
         "timm", "transformers", "torchvision", "tensorboard", "hypothesis", "pytest")  # fmt: skip
TORCH = ("torch", "pyarrow", "safetensors")


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> dict[str, set[str]]:
    """All modules after each step of one process: what a later command did not import, an earlier one did not either."""
    picture = tmp_path_factory.mktemp("picture") / "zero.png"
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(picture)
    certify = ["certify", str(picture), "--defense", "mnist-columns", "--patch", "5", "--json"]
    commands = {"--help": ["--help"], "list datasets": ["list", "datasets"], "list": ["list"], "certify": certify}
    arguments = [sys.executable, "-c", STARTS, json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {step: set(names) for step, names in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("step", ["import", "--help", "list datasets", "list", "certify"])
def test_a_command_imports_only_what_it_uses(modules, step):
    unused = HEAVY if step in ("list", "certify") else HEAVY + TORCH
    assert not modules[step] & set(unused)
    assert "certipatch" in modules[step]


def test_the_command_line_starts_without_numpy(modules):
    for step in ("import", "--help"):
        assert not modules[step] & {"numpy", "PIL", "yaml", "scipy"}
