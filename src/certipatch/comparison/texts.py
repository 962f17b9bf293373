"""A comparison as Markdown, LaTeX, CSV and JSON."""

import dataclasses
from typing import Any

from certipatch.comparison.notes import METHOD, notes, sentences
from certipatch.comparison.paired import Paired
from certipatch.comparison.pairs import Comparison
from certipatch.comparison.runs import MAX_PATH, NOT_EVALUATED, OUTCOMES, printable
from certipatch.comparison.tables import tables
from certipatch.report.table import csv_text, in_latex, in_markdown


def markdown(comparison: Comparison) -> str:
    """All tables and notes as GitHub Markdown."""
    notes = "\n".join(f"- {in_markdown(sentence)}" for sentence in sentences(comparison))
    return "\n\n".join([*(table.markdown() for table in tables(comparison)), notes]) + "\n"


def latex(comparison: Comparison) -> str:
    """All tables as LaTeX, for the package booktabs; notes as comments."""
    comments = "".join(f"% {in_latex(sentence)}\n" for sentence in sentences(comparison))
    header = "% needs \\usepackage{booktabs,textcomp}\n" + comments
    return "\n".join([header, *(table.latex() for table in tables(comparison))])


def runs_csv(comparison: Comparison) -> str:
    """One line per run, accuracies as fractions, with its paired difference to the first."""
    header = "letter run folder dataset split n threat notion clean clean_low clean_high certified certified_low certified_high"
    header += " passes multiply_adds milliseconds device same_pictures"
    differences = [f"{kind}_minus_first{end}" for kind in ("clean", "certified") for end in ("", "_low", "_high", "_p")]
    with_first = {pair.second: pair for pair in comparison.pairs if pair.first == 0}
    lines: list[list[object]] = [[*header.split(), *differences]]
    for i, (letter, run) in enumerate(comparison.named_runs()):
        pair = with_first.get(i)
        line = [letter, run.name, printable(str(run.folder), MAX_PATH), run.dataset, run.split, run.n, str(run.threat)]
        line += [run.notion, run.clean / run.n, *run.interval(run.clean)]
        line += [run.certified / run.n, *run.interval(run.certified)]
        line += [run.passes, run.multiply_adds, run.milliseconds, run.device, pair and pair.n]
        for one in (pair.clean, pair.certified) if pair else (None, None):
            line += [one.difference, *one.ci95, one.p_value] if one else [None] * 4
        lines.append(line)
    return csv_text(lines)


def pairs_csv(comparison: Comparison) -> str:
    """One line per pair of runs and kind of accuracy."""
    header = "first second kind n difference low high p both first_only second_only neither reason"
    lines: list[list[object]] = [[*header.split()]]
    for pair in comparison.pairs:
        for kind, one in (("clean", pair.clean), ("certified", pair.certified)):
            line = [comparison.letters[pair.first], comparison.letters[pair.second], kind, pair.n]
            counts = (one.both, one.first_only, one.second_only, one.neither) if one else ()
            line += [one.difference, *one.ci95, one.p_value, *counts, None] if one else [None] * 8 + [pair.reason]
            lines.append(line)
    return csv_text(lines)


def differences_csv(comparison: Comparison) -> str:
    """One line per image with different outcomes in the runs that evaluated it."""
    names = [
        f"{letter} {run.name}{', detection' * (run.notion == 'detection')}" for letter, run in comparison.named_runs()
    ]
    lines: list[list[object]] = [["index", "sha256", *names]]
    for (sha256, index), row in zip(comparison.pictures, comparison.outcomes.tolist(), strict=True):
        if len({*row} - {NOT_EVALUATED}) > 1:
            lines.append([index, sha256, *("" if code == NOT_EVALUATED else OUTCOMES[code] for code in row)])
    return csv_text(lines)


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON values; accuracies and differences are fractions."""
    letters = comparison.letters
    runs = [
        {
            "run": printable(str(run.folder), MAX_PATH),
            "letter": letter,
            "name": run.name,
            "dataset": run.dataset,
            "split": run.split,
            "images": run.n,
            "threat": run.threat.to_dict(),
            "notion": run.notion,
            "clean_accuracy": run.clean / run.n,
            "clean_ci95": run.interval(run.clean),
            "certified_accuracy": run.certified / run.n,
            "certified_ci95": run.interval(run.certified),
            "forward_passes_per_image": run.passes,
            "multiply_adds_per_image": run.multiply_adds,
            "milliseconds_per_image": run.milliseconds,
            "device": run.device,
            "certified_by_patch": {str(side): share for side, share in run.by_patch.items()} or None,
        }
        for letter, run in comparison.named_runs()
    ]
    pairs = [
        {
            "first": letters[pair.first],
            "second": letters[pair.second],
            "images": pair.n,
            "clean": _counts(pair.clean),
            "certified": _counts(pair.certified),
            "reason": pair.reason,
        }
        for pair in comparison.pairs
    ]
    return {
        "runs": runs,
        "pairs": pairs,
        "together": comparison.agreement(),
        "method": METHOD,
        "notes": notes(comparison),
    }


def _counts(one: Paired | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {"difference": one.difference, "ci95": one.ci95, "p_value": one.p_value} | dataclasses.asdict(one)
