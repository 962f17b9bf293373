"""The figures of a comparison: readable in print and in every common colour blindness, each run named where it is drawn."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from certipatch.report.compare import Comparison
from certipatch.report.compare_labels import label
from certipatch.report.compare_runs import Run
from certipatch.report.compare_tables import amount, number
from certipatch.runs.metrics import wilson

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#56789A", "#8C6D00", "#000000")  # after Okabe & Ito, all dark
MARKERS = "os^Dv<>"
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
    "figure.dpi": 100.0,
    "savefig.dpi": 220.0,
    "svg.hashsalt": "certipatch",
    "pdf.fonttype": 42,
}
DETECTION = (0, (4, 1.6))
COSTS = {"multiply_adds": "multiply-adds per picture", "milliseconds": "milliseconds per picture"}


def figures(found: Comparison) -> dict[str, Any]:
    """Matplotlib figures by name; one that has nothing to show is left out."""
    with _style():
        made = {"differences": differences(found), "patch-size": patch_size(found)}
        made |= {f"cost-{kind.replace('_', '-')}": cost(found, kind) for kind in COSTS}
    return {name: figure for name, figure in made.items() if figure is not None}


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as ``png``, ``pdf`` or ``svg``. The same figure gives the same bytes."""
    file = io.BytesIO()
    date = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Producer": None}}
    with _style():
        figure.savefig(file, format=kind, metadata=date.get(kind, {"Software": None}))
    return file.getvalue()


def patch_size(found: Comparison) -> Any:
    """Certified accuracy against the side of a square patch: a line where a run knows it, else a point at its threat."""
    runs = found.runs
    sized = len({run.image_size for run in runs}) > 1
    lines = {i: _line(run, sized) for i, run in enumerate(runs) if run.by_patch}
    sides = {i: side for i, run in enumerate(runs) if i not in lines and (side := run.side) is not None}
    if not lines and len(sides) < 2:
        return None
    figure, axes = _axes(6.2, 3.9)
    tags = names(found)
    anchors, obstacles, shown = [], [], sorted({*lines, *sides})
    steps = dict(zip(sides, _steps(list(sides.values())), strict=True))
    for i in shown:
        run, style = runs[i], _look(found, i)
        if i in lines:
            x, y = lines[i].T
            low, high = 100 * np.array([wilson(round(share * run.n / 100), run.n) for share in y]).T
            axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
            axes.plot(x, y, markersize=3.2, **style)
            anchors.append(lines[i][1:-1] if len(x) > 3 else lines[i])
            obstacles.append(_dense(lines[i]))
            if run.side in run.by_patch:
                here = _place(run, run.side, sized)
                at = float(np.interp(here, x, y))
                axes.plot([here], [at], linestyle="", marker="o", markersize=8, fillstyle="none", color=style["color"])
        else:
            anchors.append(_point(axes, run, _place(run, sides[i] + 0.3 * steps[i], sized), style))
            obstacles.append(_bar(run, anchors[-1]))
    reach = max([*(found[-1, 0] for found in lines.values()), *(_place(runs[i], sides[i], sized) for i in sides)])
    axes.set_xlim(0, 1.03 * reach + (0 if lines else reach))
    axes.set_ylim(0, 100)
    unit = "% of the picture's side" if sized else "pixels"
    axes.set(xlabel=f"side of a square patch placed anywhere, {unit}", ylabel="certified accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    label(axes, [_folded(tags[i], 40) for i in shown], [_colour(i) for i in shown], anchors, obstacles, 8.5)
    return figure


def cost(found: Comparison, kind: str) -> Any:
    """Certified accuracy against what a picture costs; None where fewer than two runs know it."""
    shown = [i for i, run in enumerate(found.runs) if getattr(run, kind) is not None]
    if len(shown) < 2:
        return None
    figure, axes = _axes(4.7, 3.7)
    axes.set_xscale("log")
    values = [getattr(found.runs[i], kind) for i in shown]
    room = max(2.0, (max(values) / min(values)) ** 0.35)
    axes.set_xlim(min(values) / room, max(values) * room)
    ends = [100 * end for i in shown for end in found.runs[i].interval(found.runs[i].certified)]
    middle, half = (min(ends) + max(ends)) / 2, max(0.62 * (max(ends) - min(ends)), 8)
    axes.set_ylim(max(middle - half, -2), min(middle + half, 102))
    low, high = axes.get_xlim()
    places = [value * (high / low) ** (0.035 * step) for value, step in zip(values, _steps(values), strict=True)]
    anchors = [_point(axes, found.runs[i], place, _look(found, i)) for i, place in zip(shown, places, strict=True)]
    obstacles = [_bar(found.runs[i], anchor) for i, anchor in zip(shown, anchors, strict=True)]
    threats = {str(run.threat) for run in found.runs}
    against = f" against {found.runs[0].threat}" if len(threats) == 1 else ""
    aside = " (equal ones side by side)" if any(_steps(values)) else ""
    axes.set(xlabel=COSTS[kind] + aside, ylabel=f"certified accuracy{against}, %")
    words = number if kind == "milliseconds" else amount
    axes.xaxis.set_major_formatter(lambda value, _: words(float(value)))
    axes.xaxis.set_minor_formatter(_sparse(values, room, words))
    label(axes, [_folded(names(found)[i]) for i in shown], [_colour(i) for i in shown], anchors, obstacles, 8.5)
    return figure


def differences(found: Comparison) -> Any:
    """Paired differences with their intervals, one row per pair."""
    pairs = [pair for pair in found.pairs if pair.clean]
    if not pairs:
        return None
    tags = names(found)
    figure, axes = _axes(4.1 + 0.062 * max(map(len, tags)), 0.9 + 0.5 * len(pairs))
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
    marks = axes.set_yticklabels([f"{tags[p.second]}\nminus {tags[p.first]}" for p in pairs], fontsize=7.5)
    for mark in marks:
        mark.set_parse_math(False)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    room = 0.08 * (max(ends) - min(ends))
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_xlabel("difference in percentage points, 95 % interval")
    axes.plot([], [], color=COLOURS[0], marker="o", markersize=5, label="certified accuracy")
    axes.plot([], [], color="#666666", marker="D", markerfacecolor="white", markersize=5, label="clean accuracy")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=1.6)
    return figure


def names(found: Comparison) -> list[str]:
    """What each run is called in a figure."""
    data = len({run.data for run in found.runs}) > 1
    threats = len({str(run.threat) for run in found.runs}) > 1
    tags = []
    for letter, run in zip(found.letters, found.runs, strict=True):
        name = run.name if len(run.name) <= 40 else f"{run.name[:26]}…{run.name[-13:]}"
        more = [
            text for text in ((run.data,) if data else ()) + ((str(run.threat),) if threats else ()) if text not in name
        ]
        tags.append(", ".join([f"{letter} {name}", *more, *(["detection"] if run.notion == "detection" else [])]))
    return tags


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


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _look(found: Comparison, i: int) -> dict[str, Any]:
    """Detection is dashed and hollow."""
    look: dict[str, Any] = {"color": _colour(i), "marker": MARKERS[i % len(MARKERS)]}
    if found.runs[i].notion == "detection":
        look |= {"linestyle": DETECTION, "markerfacecolor": "white"}
    return look


def _place(run: Run, side: int | float, sized: bool) -> float:
    return 100 * side / math.sqrt(run.image_size[0] * run.image_size[1]) if sized else float(side)


def _line(run: Run, sized: bool) -> np.ndarray:
    """(place, percent) by side, from 0, where nothing is attacked, to one step after it has reached zero."""
    sides = [0, *run.by_patch]
    shares = [run.clean / run.n, *run.by_patch.values()]
    last = max((i for i, share in enumerate(shares) if share > 0), default=0) + 2
    return np.array([(_place(run, side, sized), 100 * share) for side, share in zip(sides, shares, strict=True)][:last])


def _point(axes: Any, run: Run, x: float, style: dict[str, Any]) -> np.ndarray:
    """Draw certified accuracy with its interval; gives its place as (1, 2)."""
    y = 100 * run.certified / run.n
    low, high = (100 * end for end in run.interval(run.certified))
    axes.plot([x, x], [low, high], color=style["color"], linewidth=1.2)
    axes.plot([x], [y], markersize=6, zorder=4, **style)
    return np.array([[x, y]])


def _steps(values: list[Any]) -> list[float]:
    """Equal values are drawn side by side: by how many steps each is moved."""
    return [values[:i].count(value) - (values.count(value) - 1) / 2 for i, value in enumerate(values)]


def _folded(name: str, width: int = 26) -> str:
    """A long name in two lines."""
    if len(name) <= width + 6:
        return name
    middle = len(name) // 2
    ends = [i + 1 for i, c in enumerate(name[:-1]) if c in " :,/-"] or [middle]
    end = min(ends, key=lambda i: abs(i - middle))
    return f"{name[:end].rstrip()}\n{name[end:].lstrip()}"


def _bar(run: Run, anchor: np.ndarray) -> np.ndarray:
    low, high = (100 * end for end in run.interval(run.certified))
    return np.stack([np.full(12, anchor[0, 0]), np.linspace(low, high, 12)], 1)


def _dense(line: np.ndarray) -> np.ndarray:
    steps = np.linspace(0, len(line) - 1, 25 * len(line))
    return np.stack([np.interp(steps, np.arange(len(line)), column) for column in line.T], 1)


def _sparse(values: list[float], room: float, words: Callable[[float], str]) -> Any:
    """Ticks between powers of ten are written only where few powers are seen."""
    few = math.log10(max(values) / min(values) * room**2) < 1.5
    return lambda value, _: words(float(value)) if few and f"{value:.0e}"[0] in "235" else ""
