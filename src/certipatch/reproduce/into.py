"""Make a table and write it into a folder, as Markdown, CSV and JSON, with its figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from certipatch.data import load
from certipatch.errors import InputError
from certipatch.plumbing import files
from certipatch.reproduce import find, run
from certipatch.reproduce.context import Progress, ReproductionContext
from certipatch.reproduce.table import Table

RUNS = Path("runs") / "reproduce"


class Reproduced(NamedTuple):
    """A table, its folder, and the certificates that its attacks broke."""

    table: Table
    folder: Path
    broken: list[str]


def models_by_role(texts: Iterable[str]) -> dict[str, str]:
    """Models by role, from texts ROLE=NAME. InputError for any other text."""
    roles = {}
    for text in texts:
        role, equals, name = text.partition("=")
        if not equals or not role or not name:
            raise InputError(f"--model {text!r} is not understood; write ROLE=NAME, as bagnet=cifar10-bagnet")
        roles[role] = name
    return roles


def reproduce_into(
    name: str,
    out: Path | None = None,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    models: dict[str, str] | None = None,
    progress: Progress = lambda done, total, text: None,
    starts: int | None = None,
    steps: int | None = None,
) -> Reproduced:
    """Make a table in ``out``, by default in a folder of its name under ``runs/reproduce``.

    The arguments are those of ``ReproductionContext``; ``data`` is the paper's by default.

    Errors: InputError for an unknown table, and for data or models that do not fit it.
    """
    default = find(name).default_data
    if data is not None:
        load(data, split, limit=limit)  # a fault of the data ends here, before anything is computed
    folder = out or RUNS / name
    context = ReproductionContext(out or RUNS, data or default, split, limit, models, progress, starts, steps)
    table = run(name, context)
    write(table, folder)
    return Reproduced(table, folder, context.broken)


def write(table: Table, folder: Path) -> None:
    """Write a table and its figures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "table.md", table.markdown())
    files.write_text(folder / "table.csv", table.csv())
    files.write_json(folder / "table.json", table.to_json())
    for name, content in table.figures.items():
        files.write_bytes(folder / name, content)
