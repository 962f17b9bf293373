"""Names beside what they name in a figure: each is put where it hides least."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Box = tuple[float, float, float, float]  # left, bottom, right, top, in display coordinates
DISTANCES = (0.6, 1.3, 2.4, 4.0, 6.0)  # of a line of text
ANGLES = np.arange(0, 360, 22.5)
OUTSIDE, HIDES_NAME, HIDES_DATA, ASTRAY, CROSSES_NAME, CROSSES_DATA, FAR = 1e6, 1e4, 120.0, 80.0, 400.0, 40.0, 10.0


def label(
    axes: Any,
    names: Sequence[str],
    colours: Sequence[str],
    anchors: Sequence[Float[np.ndarray, "_ 2"]],
    obstacles: Sequence[Float[np.ndarray, "_ 2"]],
    size: float,
) -> None:
    """Write ``names[i]`` near one of ``anchors[i]`` (data coordinates), off all ``obstacles`` and other names.

    Each name in turn takes the place of least cost: off the axes, over other names, over data, far from its anchor. A
    thin line leads from names that lie further away.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # the layout is known from here on
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    points = [axes.transData.transform(found) for found in obstacles]
    line = size * figure.dpi / 72 * 1.2
    taken: list[Box] = []
    for i in sorted(range(len(names)), key=lambda i: len(anchors[i])):  # those with little choice come first
        style = {"fontsize": size, "va": "bottom", "ha": "left", "parse_math": False, "zorder": 6}
        text = axes.text(0, 0, names[i], color=colours[i], **style)
        extent = text.get_window_extent(renderer)
        others = np.concatenate([np.empty((0, 2)), *points[:i], *points[i + 1 :]])
        best, anchor = min(
            _places(
                axes.transData.transform(anchors[i][:: 1 + len(anchors[i]) // 8]), (extent.width, extent.height), line
            ),
            key=lambda place: _cost(*place, line, frame, points[i], others, taken),
        )
        text.set_position(axes.transData.inverted().transform(best[:2]))
        text.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5})
        end = np.clip(anchor, best[:2], best[2:])
        if np.hypot(*(end - anchor)) > 0.9 * line:
            ends = axes.transData.inverted().transform([anchor, end])
            axes.plot(*ends.T, color=colours[i], linewidth=0.6, zorder=5, scalex=False, scaley=False)
        taken.append(best)


def _places(anchors: np.ndarray, shape: tuple[float, float], line: float) -> Iterator[tuple[Box, np.ndarray]]:
    """Boxes around the anchors, each with its anchor."""
    width, height = shape
    for anchor in anchors:
        for distance in DISTANCES:
            for angle in np.deg2rad(ANGLES):
                x, y = anchor + distance * line * np.array([np.cos(angle), np.sin(angle)])
                left = x if np.cos(angle) > 0.3 else x - width if np.cos(angle) < -0.3 else x - width / 2
                bottom = y - height / 2 if abs(np.sin(angle)) < 0.8 else y if np.sin(angle) > 0 else y - height
                yield (left, bottom, left + width, bottom + height), anchor


def _cost(
    box: Box, anchor: np.ndarray, line: float, frame: Any, own: np.ndarray, others: np.ndarray, taken: list[Box]
) -> float:
    left, bottom, right, top = box
    outside = max(frame.x0 - left, right - frame.x1, frame.y0 - bottom, top - frame.y1, 0)
    pad = 0.2 * line
    points = np.concatenate([own, others])
    hidden = ((points > (left - pad, bottom - pad)) & (points < (right + pad, top + pad))).all(1).sum()
    over = sum(_overlap(box, other) for other in taken)
    end = np.clip(anchor, (left, bottom), (right, top))
    way = anchor + np.linspace(0.15, 1, 12)[:, None] * (end - anchor)
    names = sum(bool(((way > other[:2]) & (way < other[2:])).all(1).any()) for other in taken)
    data = int((np.abs(way[:, None] - others).max(2, initial=0) < 0.15 * line).any(1).sum())
    astray = _distance(others, box) < _distance(own, box)  # the name would seem to be another's
    cost = OUTSIDE * outside + HIDES_NAME * over / line**2 + HIDES_DATA * float(hidden) + ASTRAY * astray
    return cost + CROSSES_NAME * names + CROSSES_DATA * data + FAR * float(np.hypot(*(end - anchor))) / line


def _distance(points: np.ndarray, box: Box) -> float:
    """From a box to the nearest of some points."""
    return float(np.hypot(*(np.clip(points, box[:2], box[2:]) - points).T).min(initial=np.inf))


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
