"""The house: a module imports only from modules above it, and help needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import certipatch

ROOT = Path(certipatch.__file__).parent
FREE = {"errors", "plumbing"}  # helpers: they import none of the rooms
ORDER = ["threats", "views", "inference", "models", "evidence", "model_check", "certificate", "rules", "bounds", "defenses", "saved", "export",
         "attacks", "data", "training", "evaluation", "audit", "report", "reproduce", "testing", "cli", "__main__"]  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Parts of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where they go"
            if node.module == "certipatch":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("certipatch."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("certipatch."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_above(path):
    own = part(path)
    assert own in ORDER or own in FREE, f"{own} has no place in the order of the design"
    allowed = FREE if own in FREE else FREE | set(ORDER[: ORDER.index(own) + 1])
    assert set(imported(path)) - {"__version__"} <= allowed


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
