"""The figures of (De)Randomized Smoothing (Levine & Feizi 2020) on our models, each with the table of its points."""

from collections.abc import Sequence

import torch

from certipatch.defenses import RandomizedAblation
from certipatch.reproduce import plots
from certipatch.reproduce.bench import Bench, Reach
from certipatch.reproduce.papers import SMOOTHING_BEST, Numbers
from certipatch.reproduce.plots import BLACK, BLUE, GREEN, PURPLE, RED, Series
from certipatch.reproduce.smoothing import (
    DERANDOMIZED,
    RANDOMIZED,
    THETA,
    THETAS,
    choose,
    described,
    grid,
    halves,
    model,
    remarks,
    reported,
    run,
    threshold_words,
    validation,
)
from certipatch.reproduce.studies import Ablation, Kind, Study
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Share, Table
from certipatch.runs.metrics import wilson
from certipatch.saved import open_defense
from certipatch.threats import PatchThreat
from certipatch.views import RandomPixels
from certipatch.views import create as create_views
from certipatch.views.incidence import sees

COLOURS = {"columns": BLUE, "rows": GREEN, "blocks": RED, "pixels": PURPLE}
MARKERS = {"columns": "o", "rows": "^", "blocks": "s", "pixels": "D"}
DRAWS = 100  # of random pixels, per picture, where only the accuracy on single views is asked
SMOOTHING: dict[str, object] = {"threshold": THETA, "margin": "location"}


def clean_and_certified(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 1: clean against certified accuracy, of structured ablation, random pixels and interval bounds."""
    rows: list[Row] = []
    series: list[Series] = []
    models = study.of("columns", "pixels")
    sampled: tuple[Kind, str, dict[str, object]] = ("pixels", RANDOMIZED, {})
    structured: tuple[Kind, str, dict[str, object]] = ("columns", DERANDOMIZED, SMOOTHING)
    for kind, method, settings in (structured, sampled):
        points, intervals, tags = [], [], []
        for ablation in study.of(kind):
            card = model(bench, ablation)
            if isinstance(card, NotRun):
                rows.append(Row(ablation.label, [card]))
                continue
            clean, certified = reported(run(bench, ablation, method, study.patches[0], settings))
            rows.append(Row(ablation.label, [clean, certified]))
            points.append((clean.percent, certified.percent))
            intervals.append(_interval(certified))
            tags.append(ablation.at)
        if points:
            series.append(Series(f"ours, {kind}", points, COLOURS[kind], MARKERS[kind], intervals, tags))
    for name, (certified, clean), marker in (
        ("Chiang et al.", SMOOTHING_BEST[study.title][:2], "X"),
        ("Levine & Feizi, their best", SMOOTHING_BEST[study.title][2:], "o"),
    ):
        rows.append(Row(name, [clean, certified], "paper"))
        series.append(Series(name, [(float(clean), float(certified))], BLACK, marker, joined=False, hollow=True))
    notes = [
        *described(bench),
        f"test half, {study.patches[0]}x{study.patches[0]} patch; columns: θ = {THETA}; the paper's other points are in no table",
    ]
    low = 10 * (min(x for one in series for x, _ in one.points) // 10)
    figure = plots.draw(series, ("clean accuracy, %", "certified accuracy, %"), ((low, 100), (0, 100)))
    return Table(["clean", "certified"], rows, notes + remarks(bench, models), {"figure.png": figure})


def single_views(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 3: how often a single view is classified right, against the chance Δ that it meets the patch."""
    rows: list[Row] = []
    series: list[Series] = []
    models = study.of("pixels", "blocks", "columns")
    for kind in ("pixels", "blocks", "columns"):
        points, tags = [], []
        for ablation in study.of(kind):
            pixels, delta = shown_and_met(ablation, study)
            found = accuracy_of_views(bench, ablation)
            cell: Cell = found if isinstance(found, NotRun) else Number(100 * found, " %")
            rows.append(Row(ablation.label, [Number(pixels, digits=0), Number(delta, digits=3), cell]))
            if not isinstance(found, NotRun):
                points.append((delta, 100 * found))
                tags.append(ablation.at)
        if points:
            series.append(Series(kind, points, COLOURS[kind], MARKERS[kind], tags=tags))
    names = (
        f"Δ: chance that a view meets the {study.patches[0]}x{study.patches[0]} patch",
        "accuracy of single views, %",
    )
    figure = plots.draw(series, names, ((0, 1), (0, 100)))
    notes = [*described(bench), f"validation half; top class of each view; random pixels: {DRAWS} views per picture"]
    columns = ["pixels shown", "Δ", "accuracy of single views"]
    return Table(columns, rows, notes + remarks(bench, models), {"figure.png": figure})


def thresholds(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 5: certified accuracy over s × θ, for bands and blocks."""
    models = study.of("columns", "rows", "blocks")
    found = grid(bench, study, models)
    rows: list[Row] = []
    series: list[Series] = []
    tops = len(THETAS)  # a step to the right of the largest θ
    for kind in ("columns", "rows", "blocks"):
        there = [a for a in study.of(kind) if (a, None) in found]
        colours = dict(zip(there, plots.shades(COLOURS[kind], len(there)), strict=True))
        for ablation in study.of(kind):
            if ablation not in colours:
                rows.append(Row(ablation.label, [ablation.wanted.missing()]))
                continue
            shares = [validation(found[ablation, theta]) for theta in THETAS]
            rows.append(Row(ablation.label, list[Cell](shares)))
            look = colours[ablation], MARKERS[kind]
            line = [(i, share.percent) for i, share in enumerate(shares[:-1])]
            series.append(Series(ablation.label, line, *look, [_interval(share) for share in shares[:-1]]))
            top = Series("", [(tops, shares[-1].percent)], *look, [_interval(shares[-1])], joined=False)
            series.append(top)
    key = choose(found)
    chosen: Cell = NotRun("not run") if key is None else f"{key[0].label}, {threshold_words(key[1])}"
    rows += [Row("best of the grid", [chosen]), Row("best of the grid", list(paper[study.title]), "paper")]
    ticks = [*((i, f"{theta:.1f}") for i, theta in enumerate(THETAS) if theta is not None), (tops, "top-1")]
    names = ("threshold θ", f"certified accuracy, {study.patches[0]}x{study.patches[0]} patch, %")
    figure = plots.draw(series, names, ((-0.3, tops + 0.5), (0, _ceiling(series))), ticks)
    notes = [*described(bench), "validation half, margin per location"]
    columns = [threshold_words(theta) for theta in THETAS]
    return Table(columns, rows, notes + remarks(bench, models), {"figure.png": figure})


def patch_sizes(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 6: certified accuracy against the side of the patch, for every width of column bands."""
    models = study.of("columns")
    found: dict[Ablation, Reach] = {}
    for ablation in models:
        if not isinstance(model(bench, ablation), NotRun):
            reach = bench.reach(ablation.wanted, DERANDOMIZED, **SMOOTHING)
            assert isinstance(reach, Reach)
            found[ablation] = reach
    last = max((int(reach.largest.max()) for reach in found.values()), default=0)
    sides = range(1, max(9, last) + 1)
    rows: list[Row] = []
    series: list[Series] = []
    colours = dict(zip(found, plots.shades(BLUE, len(found)), strict=True))
    for number, ablation in enumerate(models):
        if ablation not in found:
            rows.append(Row(ablation.label, [ablation.wanted.missing()]))
            continue
        shares = [validation(found[ablation].outcomes(side)) for side in sides]
        rows.append(Row(ablation.label, list[Cell](shares)))
        line = [(side, share.percent) for side, share in zip(sides, shares, strict=True)]
        intervals = [_interval(share) for share in shares]
        series.append(Series(ablation.label, line, colours[ablation], "os^Dv<>P"[number % 8], intervals))
    winners: list[Cell] = []
    for side in sides:
        key = choose({ablation: reach.outcomes(side) for ablation, reach in found.items()})
        some = key is not None and validation(found[key].outcomes(side)).count > 0
        winners.append(key.at if key is not None and some else "none")
    rows.append(Row("best s", winners if found else [NotRun("not run")]))
    names = ("side m of a square patch anywhere, pixels", "certified accuracy, %")
    figure = plots.draw(series, names, ((0.5, sides[-1] + 0.5), (0, 100)), [(side, str(side)) for side in sides])
    notes = [*described(bench), f"validation half, θ = {THETA}, margin per location"]
    return Table([f"{side}x{side}" for side in sides], rows, notes + remarks(bench, models), {"figure.png": figure})


def shown_and_met(ablation: Ablation, study: Study) -> tuple[int, float]:
    """Pixels that a view shows, and Δ: the chance that it meets the patch, at the place where that is largest."""
    size, side = study.image_size, study.patches[0]
    assert size is not None
    assert isinstance(side, int)
    if ablation.kind == "pixels":
        views = RandomPixels(ablation.size)
        return ablation.size, float(views.chance(torch.tensor([side**2]), size)[0])
    views = create_views(dict(ablation.views))
    relation = sees(views, PatchThreat(side), size)  # type: ignore[arg-type]
    return int(views.visible(size)[0].sum()), int(relation.sizes.max()) / relation.number_of_views  # type: ignore


def accuracy_of_views(bench: Bench, ablation: Ablation) -> float | NotRun:
    """Mean share of single views whose top class is right, over the validation half."""
    card = model(bench, ablation)
    folder = bench.folder(ablation.wanted)
    if isinstance(card, NotRun) or folder is None:
        return ablation.wanted.missing()
    shares: list[torch.Tensor] = []
    if ablation.kind == "pixels":
        changes = {"samples": 1, "samples_to_pick": DRAWS}
        defense = open_defense(RANDOMIZED, str(folder), None, changes)[0]
        assert isinstance(defense, RandomizedAblation)
        for counts, targets in bench.counts(card, defense):
            shares.append(counts[:, 0].gather(1, targets[:, None])[:, 0].double() / DRAWS)
    else:
        for logits, targets in bench.logits(folder):
            shares.append((logits.argmax(2) == targets[:, None]).double().mean(1))
    found = torch.cat(shares)
    return float(found[halves(len(found))[0]].mean())


def _interval(share: Share) -> tuple[float, float]:
    low, high = wilson(share.count, share.n)
    return 100 * low, 100 * high


def _ceiling(series: Sequence[Series]) -> float:
    """Room for the highest point, in tens of percent."""
    highest = max((y for one in series for _, y in one.points), default=90.0)
    return min(100.0, 10 * (highest // 10 + 2))
