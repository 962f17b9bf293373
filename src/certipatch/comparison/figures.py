"""The figures of a comparison: readable in print and in every common colour blindness, each run drawn as its letter."""

import io
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from certipatch.comparison.pairs import Comparison
from certipatch.comparison.runs import Run
from certipatch.comparison.tables import amount, number
from certipatch.runs.metrics import wilson

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#56789A", "#8C6D00", "#000000")  # after Okabe & Ito, all dark
RULES: Any = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 9.0,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E0",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.dpi": 100.0,
    "savefig.dpi": 220.0,
    "svg.hashsalt": "certipatch",
    "pdf.fonttype": 42,
}
DETECTION = (0, (4, 1.6))
COSTS = {"multiply_adds": "multiply-adds per picture", "milliseconds": "milliseconds per picture"}
DISC = (0.045, 0.055)  # width and height of a letter's disc, as fractions of the axes


def figures(comparison: Comparison) -> dict[str, Any]:
    """Matplotlib figures by name; one that has nothing to show is left out."""
    with _style():
        drawn = {"differences": differences(comparison), "patch-size": patch_size(comparison)}
        drawn |= {f"cost-{kind.replace('_', '-')}": cost(comparison, kind) for kind in COSTS}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as ``png``, ``pdf`` or ``svg``. The same figure gives the same bytes."""
    file = io.BytesIO()
    date = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Producer": None}}
    with _style():
        figure.savefig(file, format=kind, metadata=date.get(kind, {"Software": None}))
    return file.getvalue()


def patch_size(comparison: Comparison) -> Any:
    """Certified accuracy against the side of a square patch: a line where a run knows it, else a point at its threat."""
    runs = comparison.runs
    relative = len({run.image_size for run in runs}) > 1
    lines = {i: _line(run, relative) for i, run in enumerate(runs) if run.by_patch}
    sides = {i: _scaled(run, side, relative) for i, run in enumerate(runs) if not run.by_patch and (side := run.side)}
    if not lines and len(sides) < 2:
        return None
    figure, axes = _axes(6.2, 3.9)
    reach = max([*(line[-1, 0] for line in lines.values()), *sides.values()])
    axes.set_xlim(0, 1.03 * reach + (0 if lines else reach))
    axes.set_ylim(0, 100)
    unit = "% of the picture's side" if relative else "pixels"
    axes.set(xlabel=f"side of a square patch placed anywhere, {unit}", ylabel="certified accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    discs = _points(axes, comparison, sides)
    for i, line in lines.items():
        run, look = runs[i], _look(runs[i], i)
        x, y = line.T
        low, high = 100 * np.array([wilson(round(share * run.n / 100), run.n) for share in y]).T
        axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
        axes.plot(x, y, **look)
        evaluated = -1.0
        if run.side in run.by_patch:
            evaluated = _scaled(run, run.side, relative)
            height = float(np.interp(evaluated, x, y))
            axes.plot([evaluated], [height], marker="o", markersize=8, fillstyle="none", color=look["color"])
        places = [(a, b) for a, b in line[1:] if a != evaluated] or [tuple(line[-1])]
        a, b = _first_free(axes, discs, [(a, b, b) for a, b in places])[:2]
        _letter(axes, comparison, i, a, b)
    _legend(figure, comparison, [*lines, *sides])
    return figure


def cost(comparison: Comparison, kind: str) -> Any:
    """Certified accuracy against the cost of an image; None if fewer than two runs know it."""
    runs = comparison.runs
    values = {i: float(value) for i, run in enumerate(runs) if (value := getattr(run, kind)) is not None}
    if len(values) < 2:
        return None
    figure, axes = _axes(4.7, 3.7)
    low, high = min(values.values()), max(values.values())
    room = max(2.0, (high / low) ** 0.35)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    ends = [100 * end for i in values for end in runs[i].interval(runs[i].certified)]
    middle, half = (min(ends) + max(ends)) / 2, max(0.62 * (max(ends) - min(ends)), 8)
    axes.set_ylim(max(middle - half, -2), min(middle + half, 102))
    places = [place for place, *_ in _points(axes, comparison, values)]
    aside = " (close ones side by side)" if places != list(values.values()) else ""
    against = f" against {runs[0].threat}" if len({str(run.threat) for run in runs}) == 1 else ""
    axes.set(xlabel=COSTS[kind] + aside, ylabel=f"certified accuracy{against}, %")
    words = number if kind == "milliseconds" else amount
    few = math.log10(high / low * room**2) < 1.5  # powers of ten; ticks between them are written too
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5) if few else (1,))
    axes.xaxis.set_major_formatter(lambda value, _: words(float(value)))
    axes.xaxis.set_minor_formatter("")
    _legend(figure, comparison, list(values))
    return figure


def differences(comparison: Comparison) -> Any:
    """Paired differences with their intervals, one row per pair."""
    pairs = [pair for pair in comparison.pairs if pair.clean]
    if not pairs:
        return None
    labels = run_labels(comparison)
    figure, axes = _axes(4.1 + 0.062 * max(map(len, labels)), 0.9 + 0.5 * len(pairs))
    axes.axvline(0, color="#333333", linewidth=0.9)
    ends = [0.0]
    for row, pair in enumerate(pairs):
        for one, place, colour, style in (
            (pair.certified, row - 0.14, COLOURS[0], {"marker": "o"}),
            (pair.clean, row + 0.14, "#666666", {"marker": "D", "markerfacecolor": "white"}),
        ):
            if one is not None:
                low, high = one.ci95
                axes.plot([100 * low, 100 * high], [place] * 2, color=colour, linewidth=1.5)
                axes.plot([100 * one.difference], [place], color=colour, markersize=5, linestyle="", **style)
                ends += [100 * low, 100 * high]
        if pair.certified is None:
            axes.annotate("certified: not subtracted", (0, row - 0.14), (4, 0), textcoords="offset points", va="center",
                          fontsize=7.5, color="#555555")  # fmt: skip
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_yticks(range(len(pairs)))
    ticks = axes.set_yticklabels([f"{labels[p.second]}\nminus {labels[p.first]}" for p in pairs], fontsize=7.5)
    for tick in ticks:
        tick.set_parse_math(False)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    room = 0.08 * (max(ends) - min(ends))
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_xlabel("difference in percentage points, 95 % interval")
    axes.plot([], [], color=COLOURS[0], marker="o", markersize=5, label="certified accuracy")
    axes.plot([], [], color="#666666", marker="D", markerfacecolor="white", markersize=5, label="clean accuracy")
    figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)
    return figure


def run_labels(comparison: Comparison) -> list[str]:
    """Letter and name of each run, with data, threat and notion as far as runs differ in them."""
    runs = comparison.runs
    several_data, several_threats = len({run.data for run in runs}) > 1, len({str(run.threat) for run in runs}) > 1
    labels = []
    for letter, run in comparison.named_runs():
        name = run.name if len(run.name) <= 40 else f"{run.name[:26]}…{run.name[-13:]}"
        more = [run.data] * several_data + [str(run.threat)] * several_threats
        parts = [f"{letter} {name}", *(text for text in more if text not in name)]
        labels.append(", ".join([*parts, *["detection"] * (run.notion == "detection")]))
    return labels


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(RULES), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold letters that the font lacks
        yield


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _look(run: Run, i: int) -> dict[str, Any]:
    """Colour and line of run i: detection is dashed."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DETECTION if run.notion == "detection" else "-"}


def _scaled(run: Run, side: float, relative: bool) -> float:
    return 100 * side / math.sqrt(run.image_size[0] * run.image_size[1]) if relative else float(side)


def _line(run: Run, relative: bool) -> np.ndarray:
    """(place, percent) by side, from 0, where nothing is attacked, to one step after it has reached zero."""
    shares = {0: run.clean / run.n} | run.by_patch
    last = max((i for i, share in enumerate(shares.values()) if share > 0), default=0) + 2
    return np.array([(_scaled(run, side, relative), 100 * share) for side, share in shares.items()][:last])


Box = tuple[float, float, float]  # x, lowest y, highest y


def _points(axes: Any, comparison: Comparison, places: dict[int, float]) -> list[Box]:
    """Draw runs' certified accuracies with their intervals, side by side if they would overlap; gives their boxes."""
    drawn: list[Box] = []
    step = axes.transScale + axes.transLimits
    for i, place in places.items():
        run = comparison.runs[i]
        low, high = (100 * end for end in run.interval(run.certified))
        start = step.transform((place, 0))
        shifted = [step.inverted().transform(start + (k * DISC[0], 0))[0] for k in range(1, 2 * len(places))]
        x, *_ = _first_free(axes, drawn, [(x, low, high) for x in (place, *shifted)])
        axes.plot([x, x], [low, high], linewidth=1.2, color=_look(run, i)["color"])
        _letter(axes, comparison, i, x, 100 * run.certified / run.n)
    return drawn


def _first_free(axes: Any, taken: list[Box], boxes: Iterable[Box]) -> Box:
    """The first of some boxes whose disc or interval overlaps none of those ``taken``, else the first; it is taken then."""
    boxes, fractions = list(boxes), axes.transScale + axes.transLimits

    def corners(box: Box) -> np.ndarray:
        x, low, high = box
        ends = fractions.transform([(x, low), (x, high)])
        return ends + np.array([(-0.495, -0.495), (0.495, 0.495)]) * DISC

    def overlap(one: np.ndarray, other: np.ndarray) -> bool:
        return bool((one[0] < other[1]).all() and (other[0] < one[1]).all())

    others = [corners(box) for box in taken]
    free = (box for box in boxes if not any(overlap(corners(box), other) for other in others))
    taken.append(next(free, boxes[0]))
    return taken[-1]


def _letter(axes: Any, comparison: Comparison, i: int, x: float, y: float) -> None:
    """Draw the letter of run i in a disc: filled, or hollow for detection."""
    colour, hollow = _look(comparison.runs[i], i)["color"], comparison.runs[i].notion == "detection"
    edge, face, ink = (colour, "white", colour) if hollow else ("white", colour, "white")
    axes.plot([x], [y], marker="o", markersize=11, markerfacecolor=face, markeredgecolor=edge, zorder=4)
    style = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "fontweight": "bold", "zorder": 5}
    axes.annotate(comparison.letters[i], (x, y), color=ink, **style)


def _legend(figure: Any, comparison: Comparison, shown: list[int]) -> None:
    """Name the letters of the runs that are drawn, below the axes."""
    from matplotlib.lines import Line2D

    labels = run_labels(comparison)
    shown = sorted(shown)
    handles = [Line2D([], [], **_look(comparison.runs[i], i)) for i in shown]
    columns = 2 if max(len(labels[i]) for i in shown) * 2 < 13 * figure.get_figwidth() else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(shown) / columns))
    legend = figure.legend(handles, [labels[i] for i in shown], loc="outside lower left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
