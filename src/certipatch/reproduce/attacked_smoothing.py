"""Figure 7 of (De)Randomized Smoothing (Levine & Feizi 2020): attacks on column smoothing and on an undefended network.

The paper's values are drawn there and not printed, so ours stand alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from certipatch.evaluation.metrics import wilson
from certipatch.reproduce import plots
from certipatch.reproduce.attacked import Attacked, Strength, lacking, outcome
from certipatch.reproduce.bench import Bench, Wanted
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.plots import BLUE, GREEN, RED, Series
from certipatch.reproduce.studies import Study
from certipatch.reproduce.table import Cell, NotRun, Row, Share, Table
from certipatch.threats import PatchThreat, Threat

PICTURES = 500  # the paper's
PATCH = Strength()  # the paper's: 80 x 150 steps of 0.05
LINF = Strength("linf", starts=1)  # the paper's 50 steps
EPSILONS = {"cifar10": ("1/255", "2/255", "4/255", "8/255"), "mnist": ("0.05", "0.1", "0.2", "0.3")}
"""Of the L∞ attack, by data."""


def _study(data: str, title: str, size: int, plain: Wanted, columns: Wanted) -> Study:
    return Study(data, (1, 3, 5, 8), (plain, columns), title, (size, size))


STUDIES = (
    _study("cifar10", "CIFAR-10", 32, Wanted("plain", "cifar10-plain", 1), Wanted("columns", "cifar10-columns", 3.3)),
    _study("mnist", "MNIST", 28, Wanted("plain", "mnist-plain", 0.4), Wanted("columns", "mnist-columns-votes", 0.7)),
)


def attacks(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 7: accuracy under patches of every size (a), and under L∞ changes of every size (b)."""
    bench = bench.first(PICTURES)
    plain, columns = study.model("plain"), study.model("columns")
    rows: list[Row] = []
    figures: dict[str, bytes] = {}
    clean: list[Cell] = [wanted.missing() for wanted in (plain, columns)]
    patches = [(f"{side}x{side} patch", PatchThreat(side), PATCH) for side in study.patches]
    changes = [
        (f"L∞, ε = {epsilon}", None, replace(LINF, epsilon=float(Fraction(epsilon))))
        for epsilon in EPSILONS[study.data]
    ]
    for figure, questions, axis in (
        ("a", patches, "side of a square patch anywhere, pixels"),
        ("b", changes, "ε of the L∞ attack"),
    ):
        found: list[tuple[Attacked | NotRun, Attacked | NotRun]] = []
        for label, threat, strength in questions:
            found.append((outcome(bench, plain, threat, strength), outcome(bench, columns, threat, strength)))
            rows.append(Row(label, _cells(*found[-1], threat)))
        clean = [pair.clean if isinstance(pair, Attacked) else pair for pair in found[0]]
        names = [
            "0",
            *(label.split(" ")[-1] if threat is None else label.split("x")[0] for label, threat, _ in questions),
        ]
        figures[f"figure-{figure}.png"] = _drawn(found, clean, names, axis)
    notes = [
        *bench.describe(),
        f"attacks: {PATCH.within(bench).words} on the patch, as in the paper; {LINF.within(bench).words} of ε/10, the "
        "paper's 50 of 0.5/255; certified pictures are attacked too",
        "the paper's own values are drawn in its Figure 7 and not printed; it attacks s = 4, θ = 0.3 through softmax "
        "scores, ours through soft votes",
    ]
    columns_ = ["undefended", "column smoothing", "certified"]
    return Table(columns_, [Row("no attack", [*clean, ""]), *rows], notes + lacking(bench, [plain, columns]), figures)


def _cells(plain: Attacked | NotRun, columns: Attacked | NotRun, threat: Threat | None) -> list[Cell]:
    certified: Cell = columns if isinstance(columns, NotRun) else columns.certified
    return [*(one if isinstance(one, NotRun) else one.attacked for one in (plain, columns)), certified]


def _drawn(
    found: Sequence[tuple[Attacked | NotRun, Attacked | NotRun]], clean: Sequence[Cell], names: Sequence[str], axis: str
) -> bytes:
    """Accuracy from no attack on, one place for each size."""
    series: list[Series] = []
    for which, name, colour in ((0, "undefended", RED), (1, "column smoothing", BLUE)):
        runs = [pair[which] for pair in found]
        shares = [clean[which], *(run.attacked for run in runs if isinstance(run, Attacked))]
        points = [(float(i), share) for i, share in enumerate(shares) if isinstance(share, Share)]
        series += _line(name, points, colour, "o")
        proven = [(i + 1.0, run.certified) for i, run in enumerate(runs) if isinstance(run, Attacked)]
        series += _line("certified", [(i, share) for i, share in proven if isinstance(share, Share)], GREEN, "^")
    limits = ((-0.2, len(names) - 0.8), (0.0, 100.0))
    return plots.draw(series, (axis, "accuracy, %"), limits, [(i, name) for i, name in enumerate(names)])


def _line(name: str, shares: Sequence[tuple[float, Share]], colour: str, marker: str) -> list[Series]:
    if not shares:
        return []
    intervals = [tuple(100 * end for end in wilson(share.count, share.n)) for _, share in shares]
    return [Series(name, [(x, share.percent) for x, share in shares], colour, marker, intervals)]  # type: ignore[arg-type]
