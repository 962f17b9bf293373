"""Figure 7 of (De)Randomized Smoothing (Levine & Feizi 2020): attacks on column smoothing and on an undefended network.

The paper's values are drawn there and not printed, so ours stand alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from certipatch.attacks.linf import step_size
from certipatch.reproduce import plots
from certipatch.reproduce.attacked import Attacked, Strength, lacking, outcome
from certipatch.reproduce.bench import Bench, Wanted
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.plots import BLUE, GREEN, RED, Series
from certipatch.reproduce.studies import Study
from certipatch.reproduce.table import Cell, NotRun, Row, Share, Table
from certipatch.runs.metrics import wilson
from certipatch.threats import PatchThreat

PICTURES = 500  # the paper's
PATCH = Strength()  # the paper's: 80 x 150 steps of 0.05
LINF = Strength("linf", starts=1)  # the paper's 50 steps
EPSILONS = {"cifar10": ("1/255", "2/255", "4/255", "8/255"), "mnist": ("0.05", "0.1", "0.2", "0.3")}
"""Of the L∞ attack, by data."""
Pair = tuple[Attacked | NotRun, Attacked | NotRun]
"""An attack on the undefended network, and on column smoothing."""


def _study(data: str, title: str, size: int, plain: Wanted, columns: Wanted) -> Study:
    return Study(data, (1, 3, 5, 8), (plain, columns), title, (size, size))


STUDIES = (
    _study(
        "cifar10", "CIFAR-10", 32, Wanted("plain", "cifar10-plain", 0.25), Wanted("columns", "cifar10-columns", 3.3)
    ),
    _study("mnist", "MNIST", 28, Wanted("plain", "mnist-plain", 0.4), Wanted("columns", "mnist-columns-votes", 0.7)),
)


def attacks(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 7: accuracy under patches of every size (a), and under L∞ changes of every size (b)."""
    bench = bench.first(PICTURES)
    plain, columns = study.model("plain"), study.model("columns")
    patches = [(f"{side}x{side} patch", str(side), PatchThreat(side), PATCH) for side in study.patches]
    changes = [
        (f"L∞, ε = {epsilon}", epsilon, None, replace(LINF, epsilon=float(Fraction(epsilon))))
        for epsilon in EPSILONS[study.data]
    ]
    rows: list[Row] = []
    figures: dict[str, bytes] = {}
    clean: list[Cell] = []
    for figure, questions, axis in (
        ("a", patches, "side of a square patch anywhere, pixels"),
        ("b", changes, "ε of the L∞ attack"),
    ):
        found: list[Pair] = []
        for label, _, threat, strength in questions:
            found.append((outcome(bench, plain, threat, strength), outcome(bench, columns, threat, strength)))
            proven = found[-1][1]
            cells: list[Cell] = [one if isinstance(one, NotRun) else one.attacked for one in found[-1]]
            rows.append(Row(label, [*cells, proven if isinstance(proven, NotRun) else proven.certified]))
        clean = [one if isinstance(one, NotRun) else one.clean for one in found[0]]
        figures[f"figure-{figure}.png"] = _drawn(found, clean, ["0", *(tick for _, tick, _, _ in questions)], axis)
    size = step_size(1.0, LINF.within(bench).rounds[1])
    notes = [
        *bench.describe(),
        f"attacks: {PATCH.within(bench).words} on the patch, the paper's 80 x 150; {LINF.within(bench).words} of {size:.2g} ε "
        "from a random picture within ε, the paper's 50 of 0.5/255; certified pictures are attacked too",
        "the paper's own values are drawn in its Figure 7 and not printed; it attacks s = 4, θ = 0.3 through softmax "
        "scores, ours through soft votes",
    ]
    rows.insert(0, Row("no attack", [*clean, ""]))
    notes += lacking(bench, [plain, columns])
    return Table(["undefended", "column smoothing", "certified"], rows, notes, figures)


def _drawn(found: Sequence[Pair], clean: Sequence[Cell], ticks: Sequence[str], axis: str) -> bytes:
    """Accuracy from no attack on, one place for each size."""
    series: list[Series] = []
    for which, name, colour in ((0, "undefended", RED), (1, "column smoothing", BLUE)):
        runs = [pair[which] for pair in found]
        standing = [clean[which], *(one.attacked for one in runs if isinstance(one, Attacked))]
        proven = ["", *(one.certified for one in runs if isinstance(one, Attacked))]
        series += [*_line(name, standing, colour, "o"), *_line("certified", proven, GREEN, "^")]
    limits = ((-0.2, len(ticks) - 0.8), (-2.0, 102.0))
    return plots.draw(series, (axis, "accuracy, %"), limits, [*enumerate(ticks)])


def _line(name: str, cells: Sequence[Cell], colour: str, marker: str) -> list[Series]:
    """The shares among some cells; none where there are none."""
    shares = [(x, cell) for x, cell in enumerate(cells) if isinstance(cell, Share)]
    if not shares:
        return []
    intervals = []
    for _, share in shares:
        low, high = wilson(share.count, share.n)
        intervals.append((100 * low, 100 * high))
    return [Series(name, [(x, share.percent) for x, share in shares], colour, marker, intervals)]
