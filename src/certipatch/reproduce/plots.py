"""Figures of tables: lines and points with a legend, in colours that every eye tells apart."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from certipatch.report.drawing import COLOURS, new_figure, rendered, style

BLUE, RED, GREEN, PURPLE, *_, BLACK = COLOURS


@final
@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Args:
        name: written in the legend; "" for none.
        points: (x, y).
        intervals: (lowest, highest) y of each point, or none.
        tags: written beside each point, or none.
        joined: drawn as a line.
        hollow: True for somebody else's measurement.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    marker: str = "o"
    intervals: Sequence[tuple[float, float]] = field(default_factory=tuple)
    tags: Sequence[str] = field(default_factory=tuple)
    joined: bool = True
    hollow: bool = False


def draw(
    series: Sequence[Series],
    axis_names: tuple[str, str],
    limits: tuple[tuple[float, float], tuple[float, float]],
    ticks: Sequence[tuple[float, str]] = (),
) -> bytes:
    """The figure as PNG; without a series, an empty figure with a remark."""
    with style():
        figure = new_figure(7.0, 4.6)
        axes = figure.add_subplot()
        axes.set(xlabel=axis_names[0], ylabel=axis_names[1], xlim=limits[0], ylim=limits[1])
        if ticks:
            axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
        for one in series:
            _plot(axes, one)
        if any(one.name for one in series):
            figure.legend(loc="outside right upper")
        else:
            axes.text(0.5, 0.5, "no model was run", transform=axes.transAxes, ha="center", color="#555555")
    return rendered(figure, "png")


def histograms(
    panels: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, str]]]], axis_names: tuple[str, str], bins: int
) -> bytes:
    """Histograms (name, values, colour) over each other, a panel for each title, as PNG; percent, logarithmic."""
    with style():
        figure = new_figure(7.0, 0.6 + 2.7 * max(1, len(panels)))
        every = figure.subplots(max(1, len(panels)), squeeze=False)[:, 0]
        every[-1].set(xlabel=axis_names[0])
        for axes, (title, shown) in zip(every, panels, strict=False):
            values = np.concatenate([values for _, values, _ in shown])
            edges = np.linspace(values.min(), max(values.max(), values.min() + 1e-6), bins + 1)
            lowest = 50 / max(len(values) for _, values, _ in shown)  # half of one value
            shares = [np.maximum(100 * np.histogram(values, edges)[0] / len(values), lowest) for _, values, _ in shown]
            axes.set(ylabel=axis_names[1], yscale="log", xlim=(edges[0], edges[-1]))
            axes.set_ylim(lowest, min(100.0, 4 * np.max(shares)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(title, fontsize=9, loc="left")
            for share, (name, _, colour) in zip(shares, shown, strict=True):
                axes.stairs(share, edges, baseline=lowest, fill=True, color=colour, alpha=0.13)
                axes.stairs(share, edges, baseline=lowest, color=colour, linewidth=1.2, label=name)
            axes.legend()
        if not panels:
            every[0].text(0.5, 0.5, "no model was run", transform=every[0].transAxes, ha="center", color="#555555")
    return rendered(figure, "png")


def shades(colour: str, number: int) -> list[str]:
    """From a colour to a light one of the same hue, dark ones first; all readable on white."""
    base = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    mixed = [base * (1 - t) + 255 * t * 0.75 for t in np.linspace(0, 0.55, number)]
    return ["#" + "".join(f"{int(value):02x}" for value in colour_values) for colour_values in mixed]


def _plot(axes: Any, one: Series) -> None:
    x, y = np.array(one.points, dtype=float).T
    if one.intervals and one.joined and len(x) > 1:
        axes.fill_between(x, *np.array(one.intervals).T, color=one.colour, alpha=0.13, linewidth=0)
    elif one.intervals:
        for place, ends in zip(x, one.intervals, strict=True):
            axes.plot([place, place], ends, color=one.colour, linewidth=1.0)
    axes.plot(
        x,
        y,
        color=one.colour,
        marker=one.marker,
        markersize=5 if one.hollow else 4,
        markerfacecolor="white" if one.hollow else one.colour,
        linestyle="-" if one.joined else "",
        label=one.name or None,
    )
    for tag, point in zip(one.tags, one.points, strict=False):
        axes.annotate(tag, point, (4, 4), textcoords="offset points", color=one.colour, fontsize=8.0)
