"""The page of a comparison: self-contained HTML, no script. Every name is untrusted and is escaped in the template."""

import base64
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

from certipatch.report import words
from certipatch.report.colours import png
from certipatch.report.compare import Comparison, Pair
from certipatch.report.compare_figures import rendered
from certipatch.report.compare_gallery import Found, choose
from certipatch.report.compare_runs import ALARM, CERTIFIED, NOT_EVALUATED, OUTCOMES, RIGHT, WRONG, Run
from certipatch.report.compare_tables import (
    Table,
    agreement_table,
    differences_table,
    p_value,
    points,
    runs_table,
    sentences,
)

PIXELATED = 160  # pixels of a side up to which a picture is shown with its pixels as squares
NARROW = "\u202f"  # a space that keeps together what it parts
SIGNS = {CERTIFIED: "✓ certified", RIGHT: "○ right", WRONG: "✕", ALARM: "! alarm"}


def page(found: Comparison, figures: dict[str, Any], pictures: Found) -> str:
    """A self-contained HTML page. The same input gives the same text.

    Args:
        found: the comparison.
        figures: matplotlib figures by name, of ``compare_figures.figures``.
        pictures: the pixels of the pictures of the gallery, as far as they could be had.
    """
    drawn = {name: base64.b64encode(rendered(figure, "svg")).decode() for name, figure in figures.items()}
    agreement = agreement_table(found)
    return _template().render(
        title=found.title(),
        alarms=any((run.outcome == ALARM).any() for run in found.runs),
        lead=[verdict(found, pair) for pair in found.pairs if pair.first == 0],
        runs=[_run(letter, run) for letter, run in zip(found.letters, found.runs, strict=True)],
        runs_table=runs_table(found),
        tables={"differences": differences_table(found), "agreement": agreement},
        figures=drawn,
        by_patch=_by_patch(found),
        galleries=[gallery for pair in found.pairs if pair.certified for gallery in _galleries(found, pair, pictures)],
        missing=pictures.missing,
        settings=_settings(found),
        notes=sentences(found),
    )


def verdict(found: Comparison, pair: Pair) -> str:
    """What a pair's certified accuracies say, in one sentence."""
    a, b = (f"{found.letters[i]} ({found.runs[i].name})" for i in (pair.first, pair.second))
    one = pair.certified
    if one is None:
        why = {"notion": "one certifies recovery, the other detection", "threat": "their threats differ"}
        return (
            f"{b} and {a} are not compared in certified accuracy: {why.get(pair.apart or '', 'they share no picture')}."
        )
    low, high = one.ci95
    p = f"p {'' if one.p_value < 0.001 else '= '}{p_value(one)}".replace(" ", NARROW)
    size, interval = points(one)[:-1].split(" (", 1)
    numbers = f"(95{NARROW}% interval {interval}, {p}), on the same {pair.n:,} pictures"
    if low <= 0 <= high:
        return f"Between {b} and {a} there is no clear difference in certified accuracy: {size} points {numbers}."
    return f"{b} certifies {size.lstrip('+−')} points {'more' if low > 0 else 'fewer'} than {a} {numbers}."


def _template() -> jinja2.Template:
    source = (files("certipatch.report") / "comparison.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _run(letter: str, run: Run) -> dict[str, Any]:
    counts = {name: int((run.outcome == code).sum()) for code, name in enumerate(OUTCOMES)}
    order = ("certified", "right", "alarm", "wrong")
    text = {"certified": "certified", "right": "right, not certified", "alarm": "alarm", "wrong": "wrong"}
    return {
        "letter": letter,
        "name": run.name,
        "notion": run.notion,
        "shares": [{"state": name, "width": round(100 * counts[name] / run.n, 3)} for name in order if counts[name]],
        "alt": ", ".join(
            f"{text[name]} {words.percent(counts[name] / run.n, run.n)}" for name in order if counts[name]
        ),
        "theorem": run.theorem,
    }


def _by_patch(found: Comparison) -> Table | None:
    """The numbers behind the lines: certified accuracy by side."""
    which = [i for i, run in enumerate(found.runs) if run.by_patch]
    last = max((side for i in which for side, share in found.runs[i].by_patch.items() if share > 0), default=0)
    sides = sorted({side for i in which for side in found.runs[i].by_patch if side <= last + 1})
    if not sides:
        return None
    rows = []
    for side in sides:
        shares = [(found.runs[i].by_patch.get(side), found.runs[i].n) for i in which]
        rows.append(
            (f"{side}×{side}", *("–" if share is None else words.percent(share, n)[:-2] for share, n in shares))
        )
    header = ("patch, pixels", *(f"{found.letters[i]}, %" for i in which))
    return Table("Certified accuracy by patch size", header, tuple(rows), 1)


def _galleries(found: Comparison, pair: Pair, pictures: Found) -> list[dict[str, Any]]:
    galleries = []
    for winner, loser in ((pair.first, pair.second), (pair.second, pair.first)):
        rows = found.only(winner, loser)
        shown = [row for row in choose(found, winner, loser) if row in pictures.pixels]
        title = f"Certified by {found.letters[winner]}, not by {found.letters[loser]}"
        if len(rows):
            cards = [_card(found, row, pictures.pixels[row]) for row in shown]
            galleries.append({"title": title, "count": f"{len(rows):,}", "cards": cards})
    return galleries


def _card(found: Comparison, row: int, pixels: np.ndarray) -> dict[str, Any]:
    _, index = found.pictures[row]
    states, target = [], ""
    for i, (letter, run) in enumerate(zip(found.letters, found.runs, strict=True)):
        code = int(found.outcomes[row, i])
        if code == NOT_EVALUATED:
            continue
        at = int(np.flatnonzero(found.row[i] == row)[0])
        target = target or _class(run, int(run.target[at]))
        answer = f" {_class(run, int(run.label[at]))}" if code == WRONG else ""
        states.append({"letter": letter, "state": OUTCOMES[code], "text": SIGNS[code] + answer})
    return {
        "title": f"picture {index}",
        "target": target,
        "image": png(pixels),
        "size": pixels.shape[:2],
        "pixelated": max(pixels.shape[:2]) <= PIXELATED,
        "states": states,
    }


def _class(run: Run, number: int) -> str:
    return run.classes[number] if 0 <= number < len(run.classes) else f"class {number}"


def _settings(found: Comparison) -> list[tuple[str, Table]]:
    """What differs between the runs, and what they share."""
    keys = list(dict.fromkeys(key for run in found.runs for key in run.settings))
    rows = {key: [run.settings.get(key, "–") for run in found.runs] for key in keys}
    apart = tuple((key, *values) for key, values in rows.items() if len(set(values)) > 1)
    shared = tuple((key, values[0]) for key, values in rows.items() if len(set(values)) == 1)
    different = Table("What differs", ("", *found.letters), apart, len(found.runs) + 1)
    same = Table("What all runs share", ("", "all"), shared, 2)
    return [(table.title, table) for table in (different, same) if table.rows]
