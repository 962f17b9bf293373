"""English of the package: docstrings begin with a verb or a noun, and no name is as vague as ``found``."""

import ast
import re
from pathlib import Path

import pytest

import certipatch

ROOT = Path(certipatch.__file__).parent
FILES = sorted([*ROOT.rglob("*.py"), *(ROOT.parents[1] / "examples").glob("*.py")])
OBLIQUE = re.compile(r"(What|Which|Whose|How|Where|Whether|Of|As)\b")
VAGUE = {"found", "asked", "said"}


def oblique_docstrings(source):
    """The texts that stand alone, as docstrings of anything, and begin with a word of ``OBLIQUE``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value.strip()
            if OBLIQUE.match(text):
                yield text


def vague_names(source):
    """The variables, parameters and attributes whose name is in ``VAGUE``."""
    for node in ast.walk(ast.parse(source)):
        names = {getattr(node, field, None) for field in ("id", "arg", "attr", "name")}
        yield from (name for name in names if isinstance(name, str) and name in VAGUE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT.parents[1])))
def test_docstrings_and_names(path):
    source = path.read_text(encoding="utf-8")
    assert list(oblique_docstrings(source)) == []
    assert list(vague_names(source)) == []


def test_violations_are_noticed():
    assert list(oblique_docstrings('"""What it is."""\nclass A:\n    x: int\n    """Of the patch."""')) != []
    assert list(oblique_docstrings('"""Assign the whole, offset by one."""')) == []
    assert list(vague_names("def f(found):\n    self.said = asked = found")) != []
    assert list(vague_names("foundation = 'found'")) == []
