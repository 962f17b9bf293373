"""The figures of a comparison: each run is drawn as its letter."""

import math
from typing import Any

import numpy as np

from certipatch.comparison.pairs import Comparison
from certipatch.comparison.runs import Run
from certipatch.comparison.tables import amount, number
from certipatch.report.drawing import COLOURS, new_figure, style
from certipatch.runs.metrics import wilson

COSTS = {"multiply_adds": "multiply-adds per picture", "milliseconds": "milliseconds per picture"}
WIDTH, HEIGHT = 0.045, 0.055  # of a letter's disc, as fractions of the axes


def figures(comparison: Comparison) -> dict[str, Any]:
    """Matplotlib figures by name; a figure without data is left out."""
    with style():
        drawn = {"differences": differences(comparison), "patch-size": patch_size(comparison)}
        drawn |= {f"cost-{kind.replace('_', '-')}": cost(comparison, kind) for kind in COSTS}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def patch_size(comparison: Comparison) -> Any:
    """Certified accuracy at the side of each run's square patch, and a line over all sides if a run knows them."""
    runs = comparison.runs
    relative = len({run.image_size for run in runs}) > 1
    lines = {i: _line(run, relative) for i, run in enumerate(runs) if run.by_patch}
    sides = {i: _scaled(run, side, relative) for i, run in enumerate(runs) if (side := run.side) is not None}
    if not lines and len(sides) < 2:
        return None
    figure = new_figure(6.2, 3.9)
    axes = figure.add_subplot()
    reach = max([*(line[-1, 0] for line in lines.values()), *sides.values()])
    axes.set_xlim(0, 1.03 * reach + (0 if lines else reach))
    axes.set_ylim(0, 100)
    unit = "% of the picture's side" if relative else "pixels"
    axes.set(xlabel=f"side of a square patch placed anywhere, {unit}", ylabel="certified accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for i, line in lines.items():
        x, y = line.T
        low, high = 100 * np.array([wilson(round(share * runs[i].n / 100), runs[i].n) for share in y]).T
        axes.fill_between(x, low, high, color=_colour(i), alpha=0.13, linewidth=0)
        axes.plot(x, y, color=_colour(i), linestyle=_dashes(runs[i]))
        if i not in sides:
            _letter(axes, comparison, i, *line[len(line) // 2])
    _points(axes, comparison, sides)
    _legend(figure, comparison, sorted({*lines, *sides}))
    return figure


def cost(comparison: Comparison, kind: str) -> Any:
    """Certified accuracy against the cost of an image; None if fewer than two runs know it."""
    runs = comparison.runs
    values = {i: float(value) for i, run in enumerate(runs) if (value := getattr(run, kind)) is not None}
    if len(values) < 2:
        return None
    figure = new_figure(4.7, 3.7)
    axes = figure.add_subplot()
    low, high = min(values.values()), max(values.values())
    room = max(2.0, (high / low) ** 0.35)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    ends = [100 * end for i in values for end in runs[i].interval(runs[i].certified)]
    middle, half = (min(ends) + max(ends)) / 2, max(0.62 * (max(ends) - min(ends)), 8)
    axes.set_ylim(max(middle - half, -2), min(middle + half, 102))
    aside = " (close ones side by side)" if _points(axes, comparison, values) else ""
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
    figure = new_figure(4.1 + 0.062 * max(map(len, labels)), 0.9 + 0.5 * len(pairs))
    axes = figure.add_subplot()
    axes.axvline(0, color="#333333", linewidth=0.9)
    ends = [0.0]
    for row, pair in enumerate(pairs):
        for one, place, colour, marker in (
            (pair.certified, row - 0.14, COLOURS[0], {"marker": "o"}),
            (pair.clean, row + 0.14, "#666666", {"marker": "D", "markerfacecolor": "white"}),
        ):
            if one is not None:
                low, high = one.ci95
                axes.plot([100 * low, 100 * high], [place] * 2, color=colour, linewidth=1.5)
                axes.plot([100 * one.difference], [place], color=colour, markersize=5, linestyle="", **marker)
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
    """Letter and name of each run, with data, threat and notion if runs differ in them."""
    runs = comparison.runs
    several_data, several_threats = len({run.data for run in runs}) > 1, len({str(run.threat) for run in runs}) > 1
    labels = []
    for letter, run in comparison.named_runs():
        name = run.name if len(run.name) <= 40 else f"{run.name[:26]}…{run.name[-13:]}"
        more = [run.data] * several_data + [str(run.threat)] * several_threats
        parts = [f"{letter} {name}", *(text for text in more if text not in name)]
        labels.append(", ".join([*parts, *["detection"] * (run.notion == "detection")]))
    return labels


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _dashes(run: Run) -> Any:
    return (0, (4, 1.6)) if run.notion == "detection" else "-"


def _scaled(run: Run, side: float, relative: bool) -> float:
    return 100 * side / math.sqrt(run.image_size[0] * run.image_size[1]) if relative else float(side)


def _line(run: Run, relative: bool) -> np.ndarray:
    """(position, percent) by side, from side 0 (no attack) to one step after zero percent."""
    shares = {0: run.clean / run.n} | run.by_patch
    last = max((i for i, share in enumerate(shares.values()) if share > 0), default=0) + 2
    return np.array([(_scaled(run, side, relative), 100 * share) for side, share in shares.items()][:last])


def _points(axes: Any, comparison: Comparison, places: dict[int, float]) -> bool:
    """Draw certified accuracies of runs with their intervals, side by side if they would overlap; True if any would."""
    fractions = axes.transScale + axes.transLimits
    taken: list[tuple[float, float, float]] = []
    for i, place in places.items():
        run = comparison.runs[i]
        ends = [100 * end for end in run.interval(run.certified)]
        (x, low), (_, high) = fractions.transform([(place, end) for end in ends])
        while any(abs(x - u) < 0.99 * WIDTH and low < b + HEIGHT and a < high + HEIGHT for u, a, b in taken):
            x += WIDTH
        taken.append((x, low, high))
        place = fractions.inverted().transform((x, 0))[0]
        axes.plot([place, place], ends, linewidth=1.2, color=_colour(i))
        _letter(axes, comparison, i, place, 100 * run.certified / run.n)
    return any(x != fractions.transform((place, 0))[0] for (x, *_), place in zip(taken, places.values(), strict=True))


def _letter(axes: Any, comparison: Comparison, i: int, x: float, y: float) -> None:
    """Draw the letter of run i in a disc: filled, or hollow for detection."""
    colour = _colour(i)
    edge, face, ink = (
        (colour, "white", colour) if comparison.runs[i].notion == "detection" else ("white", colour, "white")
    )
    axes.plot([x], [y], marker="o", markersize=11, markerfacecolor=face, markeredgecolor=edge, zorder=4)
    axes.annotate(comparison.letters[i], (x, y), color=ink, ha="center", va="center_baseline", fontsize=7.5, weight="bold",
                  zorder=5)  # fmt: skip


def _legend(figure: Any, comparison: Comparison, shown: list[int]) -> None:
    """Name the letters of the runs that are drawn, below the axes."""
    from matplotlib.lines import Line2D

    labels = run_labels(comparison)
    handles = [Line2D([], [], color=_colour(i), linestyle=_dashes(comparison.runs[i])) for i in shown]
    columns = 2 if max(len(labels[i]) for i in shown) * 2 < 13 * figure.get_figwidth() else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(shown) / columns))
    legend = figure.legend(handles, [labels[i] for i in shown], loc="outside lower left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
