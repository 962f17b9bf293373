"""The files of a comparison: tables, figures, the page."""

import json
from pathlib import Path

from certipatch.errors import InputError
from certipatch.plumbing.files import write_text
from certipatch.report.compare import Comparison, to_dict
from certipatch.report.compare_figures import figures, rendered
from certipatch.report.compare_gallery import read_pictures
from certipatch.report.compare_page import page
from certipatch.report.compare_tables import comma_separated, differences, latex, markdown, pairs_separated

FIGURES = ("differences", "patch-size", "cost-multiply-adds", "cost-milliseconds")


def check(out: Path) -> None:
    """InputError where a comparison must not be written."""
    if (out / "config.yaml").exists():
        raise InputError(f"{out} is a run folder; give another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder as --out")


def write(found: Comparison, out: Path, data: str | None = None) -> None:
    """Write all files of a comparison into ``out``; those of an earlier one are replaced.

    Errors: InputError as ``check``, and where ``data`` is given and does not hold the pictures.
    """
    check(out)
    pictures, drawn = read_pictures(found, data), figures(found)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        for kind in ("png", "pdf"):
            path = out / "figures" / f"{name}.{kind}"
            path.unlink(missing_ok=True)
            if name in drawn:
                path.write_bytes(rendered(drawn[name], kind))
    texts = {
        "comparison.md": markdown(found),
        "comparison.csv": comma_separated(found),
        "pairs.csv": pairs_separated(found),
        "differences.csv": differences(found),
        "comparison.tex": latex(found),
        "comparison.json": json.dumps(to_dict(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "comparison.html": page(found, drawn, pictures),
    }
    for name, text in texts.items():
        write_text(out / name, text)
