"""The house: a module imports only from modules above it, and help needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import certipatch

ROOT = Path(certipatch.__file__).parent
FREE = {"errors", "plumbing"}  # helpers: they import none of the rooms
ORDER = ["threats", "views", "inference", "models", "evidence", "model_check", "certificate", "rules", "bounds", "defenses",
         "saved", "export", "attacks", "data", "training", "runs", "audit", "report", "comparison", "reproduce", "testing",
         "cli", "__main__"]  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source):
    """Rooms of the package that a source text imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            if node.module == "certipatch":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("certipatch."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("certipatch."))


def arrows_up(own, source):
    """Rooms that a source text in the room ``own`` imports, though they are not above it."""
    allowed = FREE if own in FREE else FREE | set(ORDER[: ORDER.index(own) + 1])
    return set(imported(source)) - {"__version__"} - allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_above(path):
    assert room(path) in ORDER or room(path) in FREE, f"{room(path)} has no place in the order of the design"
    assert not arrows_up(room(path), path.read_text(encoding="utf-8"))


def test_an_arrow_up_is_found():
    """Also one inside of a function, or to a whole room."""
    assert arrows_up("runs", "def f():\n    from certipatch.report import of_run") == {"report"}
    assert arrows_up("defenses", "from certipatch import cli, views") == {"cli"}
    assert arrows_up("saved", "import certipatch.runs.evaluate") == {"runs"}
    assert arrows_up("plumbing", "from certipatch.threats import Threat") == {"threats"}
    assert not arrows_up("cli", "from certipatch.runs.evaluate import evaluate_into")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_device_literals(path):
    text = path.read_text(encoding="utf-8")
    for forbidden in (".cuda(", "np.random.seed(", "import pytest"):
        assert forbidden not in text


def test_the_command_line_starts_without_torch():
    code = "import sys, certipatch.cli; assert callable(certipatch.cli.main); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    for name in certipatch.__all__:
        assert getattr(certipatch, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        certipatch.nonsense  # noqa: B018
