"""The tables of a comparison, and its numbers in words."""

from certipatch.comparison.paired import Paired
from certipatch.comparison.pairs import Comparison, Pair
from certipatch.comparison.runs import Run
from certipatch.report import formatting
from certipatch.report.table import Table


def tables(comparison: Comparison) -> list[Table]:
    """The tables of the runs, of their differences, and of the agreement of their certificates."""
    agreement = agreement_table(comparison)
    return [runs_table(comparison), differences_table(comparison), *([agreement] if agreement else [])]


def runs_table(comparison: Comparison) -> Table:
    """Every run with its accuracies and its cost."""
    several = len({run.data for run in comparison.runs}) > 1
    text = ("", "run", *(("data",) if several else ()), "threat", "notion")
    numbers = ("n", "clean, %", "certified, %", "passes", "multiply-adds", "ms")
    rows = [
        (
            *(letter, run.name, *((run.data,) if several else ()), str(run.threat), run.notion, f"{run.n:,}"),
            accuracy(run, run.clean),
            accuracy(run, run.certified, "*" if run.notion == "detection" else ""),
            *(number(run.passes), amount(run.multiply_adds), number(run.milliseconds)),
        )
        for letter, run in comparison.named_runs()
    ]
    marked = "; *: certified by detection" if any(run.notion == "detection" for run in comparison.runs) else ""
    title = f"{comparison.title()}; in brackets 95 % intervals; cost per picture{marked}"
    return Table(title, (*text, *numbers), tuple(rows), len(text))


def differences_table(comparison: Comparison) -> Table:
    """The paired differences of every pair."""
    rows = [
        (
            f"{comparison.letters[pair.second]} − {comparison.letters[pair.first]}",
            f"{pair.n:,}",
            points(pair.clean) if pair.clean else "not paired",
            p_value(pair.clean) if pair.clean else "",
            points(pair.certified) if pair.certified else why_incomparable(pair),
            p_value(pair.certified) if pair.certified else "",
        )
        for pair in comparison.pairs
    ]
    header = ("difference", "same pictures", "clean, points", "p", "certified, points", "p")
    return Table("Differences on the same pictures, in percentage points, with 95 % intervals", header, tuple(rows))


def agreement_table(comparison: Comparison) -> Table | None:
    """Numbers of images that both runs of a pair certify, one, or none; None if no certificates are comparable."""
    rows = [
        (
            f"{comparison.letters[pair.first]} and {comparison.letters[pair.second]}",
            *(f"{k:,}" for k in (counts.both, counts.first_only, counts.second_only, counts.neither)),
        )
        for pair in comparison.pairs
        if (counts := pair.certified)
    ]
    header = ("runs", "both certify", "only the first", "only the second", "neither")
    return Table("Which pictures are certified", header, tuple(rows)) if rows else None


def patch_size_table(comparison: Comparison) -> Table | None:
    """Certified accuracy by side of a square patch, up to one step beyond the last that is above zero."""
    known = [(letter, run) for letter, run in comparison.named_runs() if run.by_patch]
    last = max((side for _, run in known for side, share in run.by_patch.items() if share > 0), default=0)
    sides = sorted({side for _, run in known for side in run.by_patch if side <= last + 1})
    rows = [
        (
            f"{side}×{side}",
            *(formatting.percent(run.by_patch[side], run.n)[:-2] if side in run.by_patch else "–" for _, run in known),
        )
        for side in sides
    ]
    header = ("patch, pixels", *(f"{letter}, %" for letter, _ in known))
    return Table("Certified accuracy by patch size", header, tuple(rows)) if rows else None


def settings_tables(comparison: Comparison) -> list[Table]:
    """The settings that differ between the runs, and those that all share."""
    keys = dict.fromkeys(key for run in comparison.runs for key in run.settings)
    rows = [(key, *(run.settings.get(key, "–") for run in comparison.runs)) for key in keys]
    different = tuple(row for row in rows if len(set(row[1:])) > 1)
    shared = tuple(row[:2] for row in rows if len(set(row[1:])) == 1)
    header = ("", *comparison.letters)
    tables = [
        Table("What differs", header, different, len(header)),
        Table("What all runs share", ("", "all"), shared, 2),
    ]
    return [table for table in tables if table.rows]


def accuracy(run: Run, count: int, mark: str = "") -> str:
    """63.0 (60.0–65.9), in percent."""
    middle, low, high = (formatting.percent(share, run.n)[:-2] for share in (count / run.n, *run.interval(count)))
    return f"{middle}{mark} ({low}–{high})"


def points(one: Paired) -> str:
    """+1.7 (+0.4 to +3.1), in percentage points."""
    middle, low, high = (_signed(100 * value, 2 if one.n >= 10_000 else 1) for value in (one.difference, *one.ci95))
    return f"{middle} ({low} to {high})"


def p_value(one: Paired) -> str:
    """0.019, <0.001."""
    return "<0.001" if one.p_value < 0.001 else f"{one.p_value:.2g}"


def why_incomparable(pair: Pair) -> str:
    """The reason why certified accuracies are not subtracted, in two words."""
    return {"notion": "another notion", "threat": "another threat"}.get(pair.incomparable or "", "not paired")


def number(value: float | None) -> str:
    """2.98, 305, 12,000."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 99.95 or value == round(value) else f"{value:.3g}"


def amount(value: float | None) -> str:
    """33 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value is not None and value >= 0.9995 * unit:
            return f"{number(value / unit)}{name}"
    return number(value)


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else ("+" if value > 0 else "−") + text
