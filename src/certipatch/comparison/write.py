"""The files of a comparison: tables, figures, the page."""

import json
from pathlib import Path

from certipatch.comparison.figures import COSTS, figures
from certipatch.comparison.gallery import read_pictures
from certipatch.comparison.page import page
from certipatch.comparison.pairs import Comparison
from certipatch.comparison.texts import differences_csv, latex, markdown, pairs_csv, runs_csv, to_dict
from certipatch.errors import InputError
from certipatch.plumbing.files import write_text
from certipatch.report.drawing import rendered

FIGURES = ("differences", "patch-size", *(f"cost-{kind.replace('_', '-')}" for kind in COSTS))


def check_writable(out: Path) -> None:
    """InputError if a comparison must not be written into ``out``."""
    if (out / "config.yaml").exists():
        raise InputError(f"{out} is a run folder; give another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder as --out")


def write(comparison: Comparison, out: Path, data: str | None = None) -> None:
    """Write all files of a comparison into ``out``; they replace the files of an earlier comparison.

    Errors: InputError as ``check_writable``, and if ``data`` is given and does not hold the images.
    """
    check_writable(out)
    pictures, drawn = read_pictures(comparison, data), figures(comparison)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        for kind in ("png", "pdf"):
            path = out / "figures" / f"{name}.{kind}"
            path.unlink(missing_ok=True)
            if name in drawn:
                path.write_bytes(rendered(drawn[name], kind))
    texts = {
        "comparison.md": markdown(comparison),
        "comparison.csv": runs_csv(comparison),
        "pairs.csv": pairs_csv(comparison),
        "differences.csv": differences_csv(comparison),
        "comparison.tex": latex(comparison),
        "comparison.json": json.dumps(to_dict(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "comparison.html": page(comparison, drawn, pictures),
    }
    for name, text in texts.items():
        write_text(out / name, text)
