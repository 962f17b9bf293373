"""The page of a comparison: self-contained HTML, no script. Every name is untrusted and is escaped in the template."""

import base64
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

from certipatch.comparison.gallery import GalleryPictures, galleries
from certipatch.comparison.notes import sentences, verdict
from certipatch.comparison.pairs import Comparison
from certipatch.comparison.runs import ALARM, CERTIFIED, NOT_EVALUATED, OUTCOMES, RIGHT, WRONG, Run
from certipatch.comparison.tables import (
    agreement_table,
    differences_table,
    patch_size_table,
    runs_table,
    settings_tables,
)
from certipatch.report import formatting
from certipatch.report.colours import png
from certipatch.report.drawing import rendered

MAX_PIXELATED = 160  # pixels of a side up to which an image is shown with its pixels as squares
SIGNS = {CERTIFIED: "✓ certified", RIGHT: "○ right", WRONG: "✕", ALARM: "! alarm"}
WORDS = {CERTIFIED: "certified", RIGHT: "right, not certified", ALARM: "alarm", WRONG: "wrong"}


def page(comparison: Comparison, figures: dict[str, Any], pictures: GalleryPictures) -> str:
    """A self-contained HTML page. The same input gives the same text.

    Args:
        comparison: the runs and their pairs.
        figures: matplotlib figures by name, of ``figures.figures``.
        pictures: the pixels of the gallery's images, without those that could not be read.
    """
    return _template().render(
        title=comparison.title(),
        alarms=any((run.outcome == ALARM).any() for run in comparison.runs),
        lead=[verdict(comparison, pair) for pair in comparison.pairs if pair.first == 0],
        runs=[_run(letter, run) for letter, run in comparison.named_runs()],
        runs_table=runs_table(comparison),
        tables={"differences": differences_table(comparison), "agreement": agreement_table(comparison)},
        figures={name: base64.b64encode(rendered(figure, "svg")).decode() for name, figure in figures.items()},
        by_patch=patch_size_table(comparison),
        galleries=[
            {
                "title": f"Certified by {comparison.letters[winner]}, not by {comparison.letters[loser]}",
                "count": f"{count:,}",
                "cards": [_card(comparison, row, pictures.pixels[row]) for row in rows if row in pictures.pixels],
            }
            for winner, loser, count, rows in galleries(comparison)
        ],
        missing=pictures.missing,
        settings=settings_tables(comparison),
        notes=sentences(comparison),
    )


def _template() -> jinja2.Template:
    source = (files("certipatch.comparison") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _run(letter: str, run: Run) -> dict[str, Any]:
    shares = {code: count / run.n for code in WORDS if (count := int((run.outcome == code).sum()))}
    return {
        "letter": letter,
        "name": run.name,
        "notion": run.notion,
        "shares": [{"state": OUTCOMES[code], "width": round(100 * share, 3)} for code, share in shares.items()],
        "alt": ", ".join(f"{WORDS[code]} {formatting.percent(share, run.n)}" for code, share in shares.items()),
        "theorem": run.theorem,
    }


def _card(comparison: Comparison, row: int, pixels: np.ndarray) -> dict[str, Any]:
    states, target = [], ""
    for (letter, run), code, rows in zip(
        comparison.named_runs(), comparison.outcomes[row].tolist(), comparison.rows, strict=True
    ):
        if code == NOT_EVALUATED:
            continue
        i = int(np.flatnonzero(rows == row)[0])
        target = target or _class(run, int(run.target[i]))
        prediction = f" {_class(run, int(run.label[i]))}" if code == WRONG else ""
        states.append({"letter": letter, "state": OUTCOMES[code], "text": SIGNS[code] + prediction})
    return {
        "title": f"picture {comparison.pictures[row][1]}",
        "target": target,
        "image": png(pixels),
        "size": pixels.shape[:2],
        "pixelated": max(pixels.shape[:2]) <= MAX_PIXELATED,
        "states": states,
    }


def _class(run: Run, number: int) -> str:
    return run.classes[number] if 0 <= number < len(run.classes) else f"class {number}"
