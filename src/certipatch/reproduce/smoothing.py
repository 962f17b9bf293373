"""Tables and figures of (De)Randomized Smoothing (Levine & Feizi 2020) that are more than their rows.

Parameters are chosen by the certified accuracy of the validation half; the results are those of the test half.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from certipatch.reproduce import plots
from certipatch.reproduce.context import LargestCertified, Outcomes, missing
from certipatch.reproduce.measures import half, outcomes
from certipatch.reproduce.plots import BLACK, BLUE, GREEN, PURPLE, RED, Series
from certipatch.reproduce.rows import Plan, fill, make_rows, paper_rows
from certipatch.reproduce.schema import Ablation, Measurement, patch_words
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Share, Table
from certipatch.runs.metrics import wilson

COLOURS = {"columns": BLUE, "rows": GREEN, "blocks": RED, "pixels": PURPLE}
MARKERS = {"columns": "o", "rows": "^", "blocks": "s", "pixels": "D"}
THETAS = (*(tenth / 10 for tenth in range(10)), None)  # None: votes for the top class alone
Key = TypeVar("Key")


def choose(candidates: Mapping[Key, Outcomes]) -> Key | None:
    """The key that certifies most of the validation half; the first on a tie; None without a key."""
    return max(candidates, key=lambda key: int(half(candidates[key], "validation").certified.sum()), default=None)


def reported(whole: Outcomes, at: str = "") -> tuple[Share, Share]:
    """Clean and certified accuracy of the test half, with parameters ``at``."""
    clean, certified = half(whole, "test").shares()
    return clean, Share(certified.count, certified.n, at)


def best_of_each_method(plan: Plan) -> Table:
    """Table 1: the best of all bands, blocks and θ, beside the paper and Chiang et al. 2020."""
    study = plan.study
    assert study.patch is not None
    name = f"{study.title} {patch_words(study.patch)}"
    rows = [Row(f"{name}, {row.label}", row.cells, "paper") for row in paper_rows(plan)]
    for words, margin in (("margin per location", "location"), ("the paper's margin", "paper")):
        cells: list[Cell] = [NotRun(f"not run (--data {study.data})")]
        if plan.local:
            candidates = grid(plan, margin)
            key = choose(candidates)
            if key is None:
                cells = [missing(next(a for a in study.of("columns") if a.name == a.train_command))]
            else:
                clean, certified = reported(candidates[key], f"{key[0].label}, {threshold_words(key[1])}")
                cells = [certified, clean]
        rows.append(Row(f"{name}, ours, {words}", cells))
    return Table(list(plan.columns), rows)


def grid(plan: Plan, margin: str) -> dict[tuple[Ablation, float | None], Outcomes]:
    """All ablations of the rows × θ, of the models that are there; one pass of each serves every θ."""
    candidates = {}
    for row in plan.rows:
        for theta in THETAS:
            cell = row.model_copy(update={"settings": {"threshold": theta, "margin": margin}})
            whole = outcomes(plan.context, plan.study, cell)
            if not isinstance(whole, NotRun):
                candidates[_ablation(plan, row), theta] = whole
    return candidates


def methods(plan: Plan) -> Table:
    """Table 2: derandomized with θ = 0.3, derandomized top-1, and randomized column smoothing."""
    strict: list[Cell] = [_best(plan, column, {"margin": "paper"}) for column in list(plan.columns.values())[:2]]
    rows = [
        *fill(plan),
        Row("best s, test half", [_best(plan, column) for column in plan.columns.values()]),
        Row("best s by the paper's margin, test half", [*strict, "the same"]),
        *paper_rows(plan),
    ]
    return Table(list(plan.columns), rows)


def _best(plan: Plan, column: Measurement, changes: dict[str, Any] | None = None) -> Cell:
    """Certified accuracy of a column's best row, with its hyperparameter."""
    candidates = {}
    for row in plan.rows:
        cell = row.merged(column)
        whole = outcomes(
            plan.context, plan.study, cell.model_copy(update={"settings": cell.settings | (changes or {})})
        )
        if not isinstance(whole, NotRun):
            candidates[_ablation(plan, row).hyperparameter] = whole
    key = choose(candidates)
    return NotRun("not run") if key is None else reported(candidates[key], key)[1]


def clean_and_certified(plan: Plan) -> Table:
    """Figure 1: clean against certified accuracy, of structured ablation, random pixels and interval bounds."""
    table = make_rows(plan)
    series: list[Series] = []
    for kind in ("columns", "pixels"):
        measured = [(a, row.cells) for a, row in _by_kind(plan, table, kind) if isinstance(row.cells[0], Share)]
        if measured:
            points = [(clean.percent, certified.percent) for _, (clean, certified) in measured]  # type: ignore[union-attr]
            intervals = [_interval(certified) for _, (_, certified) in measured]  # type: ignore[arg-type]
            tags = [ablation.hyperparameter for ablation, _ in measured]
            series.append(Series(f"ours, {kind}", points, COLOURS[kind], MARKERS[kind], intervals, tags))
    for row, marker in zip(paper_rows(plan), "Xo", strict=True):
        clean, certified = (float(str(cell)) for cell in row.cells)
        series.append(Series(row.label, [(clean, certified)], BLACK, marker, joined=False, hollow=True))
    low = 10 * (min(x for one in series for x, _ in one.points) // 10)
    figure = plots.draw(series, ("clean accuracy, %", "certified accuracy, %"), ((low, 100), (0, 100)))
    return Table(table.columns, table.rows, figures={"figure.png": figure})


def single_views(plan: Plan) -> Table:
    """Figure 3: accuracy of single views, against the chance Δ that a view meets the patch."""
    table = make_rows(plan)
    series: list[Series] = []
    for kind in ("pixels", "blocks", "columns"):
        measured = [(a, row.cells) for a, row in _by_kind(plan, table, kind) if isinstance(row.cells[2], Number)]
        if measured:
            points = [(cells[1].value, cells[2].value) for _, cells in measured]  # type: ignore[union-attr]
            tags = [ablation.hyperparameter for ablation, _ in measured]
            series.append(Series(kind, points, COLOURS[kind], MARKERS[kind], tags=tags))
    assert plan.study.patch is not None
    met = f"Δ: chance that a view meets the {patch_words(plan.study.patch)} patch"
    figure = plots.draw(series, (met, "accuracy of single views, %"), ((0, 1), (0, 100)))
    return Table(table.columns, table.rows, figures={"figure.png": figure})


def thresholds(plan: Plan) -> Table:
    """Figure 5: certified accuracy over s × θ, for bands and blocks."""
    rows = fill(plan)
    series: list[Series] = []
    tops = len(plan.columns)  # a step to the right of the largest θ
    best: dict[str, int] = {}
    for kind in ("columns", "rows", "blocks"):
        measured = [(a, row) for a, row in _by_kind(plan, Table([], rows), kind) if isinstance(row.cells[0], Share)]
        for (_, row), colour in zip(measured, plots.shades(COLOURS[kind], len(measured)), strict=True):
            shares = [cell for cell in row.cells if isinstance(cell, Share)]
            line = [(i, share.percent) for i, share in enumerate(shares[:-1])]
            intervals = [_interval(share) for share in shares]
            series.append(Series(row.label, line, colour, MARKERS[kind], intervals[:-1]))
            top = [(tops, shares[-1].percent)]
            series.append(Series("", top, colour, MARKERS[kind], intervals[-1:], joined=False))
            best |= {f"{row.label}, {name}": share.count for name, share in zip(plan.columns, shares, strict=True)}
    chosen: Cell = max(best, key=lambda label: best[label]) if best else NotRun("not run")
    ticks = [(i, name.removeprefix("θ = ")) for i, name in enumerate(plan.columns)]
    ticks[-1] = (tops, ticks[-1][1])
    assert plan.study.patch is not None
    names = ("threshold θ", f"certified accuracy, {patch_words(plan.study.patch)} patch, %")
    highest = max((y for one in series for _, y in one.points), default=90.0)
    ceiling = min(100.0, 10 * (highest // 10 + 2))
    figure = plots.draw(series, names, ((-0.3, tops + 0.5), (0, ceiling)), ticks)
    rows += [Row("best of the grid", [chosen]), *paper_rows(plan)]
    return Table(list(plan.columns), rows, figures={"figure.png": figure})


def patch_sizes(plan: Plan) -> Table:
    """Figure 6: certified accuracy against the side of the patch, for every width of column bands."""
    reach: dict[Ablation, LargestCertified] = {}
    for row in plan.rows:
        ablation = _ablation(plan, row)
        largest = plan.context.largest_certified(ablation, row.method or "", **row.settings)
        if not isinstance(largest, NotRun):
            reach[ablation] = largest
    last = max((int(one.largest.max()) for one in reach.values()), default=0)
    sides = range(1, max(9, last) + 1)
    colours = dict(zip(reach, plots.shades(BLUE, len(reach)), strict=True))
    rows: list[Row] = []
    series: list[Series] = []
    for number, row in enumerate(plan.rows):
        ablation = _ablation(plan, row)
        if ablation not in reach:
            rows.append(Row(ablation.label, [missing(ablation)]))
            continue
        shares = [half(reach[ablation].outcomes(side), "validation").shares()[1] for side in sides]
        rows.append(Row(ablation.label, list[Cell](shares)))
        line = [(side, share.percent) for side, share in zip(sides, shares, strict=True)]
        intervals = [_interval(share) for share in shares]
        series.append(Series(ablation.label, line, colours[ablation], "os^Dv<>P"[number % 8], intervals))
    winners: list[Cell] = []
    for side in sides:
        key = choose({ablation: one.outcomes(side) for ablation, one in reach.items()})
        some = key is not None and bool(half(reach[key].outcomes(side), "validation").certified.any())
        winners.append(key.hyperparameter if key is not None and some else "none")
    rows.append(Row("best s", winners if reach else [NotRun("not run")]))
    names = ("side m of a square patch anywhere, pixels", "certified accuracy, %")
    figure = plots.draw(series, names, ((0.5, sides[-1] + 0.5), (0, 100)), [(side, str(side)) for side in sides])
    return Table([f"{side}x{side}" for side in sides], rows, figures={"figure.png": figure})


def attack_curves(plan: Plan) -> Table:
    """Figure 7: accuracy under patches of every size (a), and under L∞ changes of every size (b)."""
    rows = fill(plan)
    columns, figures = list(plan.columns), {}
    first, undefended = plan.rows[0], next(iter(plan.columns.values()))
    clean = [plan.measure(first.merged(Measurement(measure="attack", show="clean", model=role)))
             for role in (undefended.model, first.model)]  # fmt: skip
    for figure, axis, chosen in (
        ("a", "side of a square patch anywhere, pixels", [i for i, row in enumerate(plan.rows) if not row.epsilon]),
        ("b", "ε of the L∞ attack", [i for i, row in enumerate(plan.rows) if row.epsilon]),
    ):
        ticks = ["0", *(plan.rows[i].epsilon or str(plan.rows[i].patch) for i in chosen)]
        cells = [[*rows[i].cells, *rows[i].cells[:1] * 2][: len(columns)] for i in chosen]  # one stands for all
        standing, defended, proven = ([line[which] for line in cells] for which in range(3))
        series = [
            *_line("undefended", [clean[0], *standing], RED, "o"),
            *_line("column smoothing", [clean[1], *defended], BLUE, "o"),
            *_line("certified", ["", *proven], GREEN, "^"),
        ]
        limits = ((-0.2, len(ticks) - 0.8), (-2.0, 102.0))
        figures[f"figure-{figure}.png"] = plots.draw(series, (axis, "accuracy, %"), limits, [*enumerate(ticks)])
    return Table(columns, [Row("no attack", [*clean, ""]), *rows], figures=figures)


def threshold_words(theta: float | None) -> str:
    return "top-1" if theta is None else f"θ = {theta:.1f}"


def _line(name: str, cells: Sequence[Cell], colour: str, marker: str) -> list[Series]:
    """The shares among some cells; none if there are none."""
    shares = [(x, cell) for x, cell in enumerate(cells) if isinstance(cell, Share)]
    if not shares:
        return []
    intervals = [_interval(share) for _, share in shares]
    return [Series(name, [(x, share.percent) for x, share in shares], colour, marker, intervals)]


def _ablation(plan: Plan, row: Measurement) -> Ablation:
    slot = plan.study.model(row.model)
    assert isinstance(slot, Ablation)
    return slot


def _by_kind(plan: Plan, table: Table, kind: str) -> list[tuple[Ablation, Row]]:
    """The rows of a kind of views."""
    ours = [row for row in table.rows if row.source == "ours"]
    pairs = ((_ablation(plan, spec), row) for spec, row in zip(plan.rows, ours, strict=True))
    return [(ablation, row) for ablation, row in pairs if ablation.kind == kind]


def _interval(share: Share) -> tuple[float, float]:
    low, high = wilson(share.count, share.n)
    return 100 * low, 100 * high
