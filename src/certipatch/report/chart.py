"""Certified accuracy against patch side: the coordinates of a line chart."""

from dataclasses import dataclass
from typing import Any, final

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 44, 448, 14, 228


@final
@dataclass(frozen=True)
class Chart:
    """Positions in a drawing of WIDTH x HEIGHT: ticks as (position, text), points as (x, y, side, fraction)."""

    points: tuple[tuple[float, float, int, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    clean: float
    mark: tuple[float, float, int, float] | None
    """The point of the evaluated threat, if it is a square placed anywhere."""

    @property
    def line(self) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y, _, _ in self.points)

    @property
    def area(self) -> str:
        return f"{self.points[0][0]:g},{BOTTOM} {self.line} {self.points[-1][0]:g},{BOTTOM}"


def chart(by_patch: dict[str, float], clean: float, threat: dict[str, Any]) -> Chart | None:
    """The chart of ``certified_by_patch`` up to one step after zero; None with fewer than two sides."""
    values = sorted((int(side), float(fraction)) for side, fraction in by_patch.items())
    last = max((i for i, (_, fraction) in enumerate(values) if fraction > 0), default=0)
    mark = _side(threat)
    values = [pair for i, pair in enumerate(values) if i <= last + 1 or pair[0] == mark]
    if len(values) < 2:
        return None
    first, end = values[0][0], values[-1][0]

    def x(side: int) -> float:
        return round(LEFT + 10 + (RIGHT - LEFT - 20) * (side - first) / (end - first), 2)

    points = tuple((x(side), _y(fraction), side, fraction) for side, fraction in values)
    return Chart(
        points,
        tuple((x(side), str(side)) for side in _sides(first, end)),
        tuple((_y(fraction), f"{100 * fraction:.0f}") for fraction in (0.0, 0.25, 0.5, 0.75, 1.0)),
        _y(float(clean)),
        next((point for point in points if point[2] == mark), None),
    )


def _y(fraction: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * fraction, 2)


def _sides(first: int, last: int) -> list[int]:
    """About ten whole numbers at most, as ticks of the axis."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, last) if (last - first) / step <= 12)
    return [side for side in range(first, last + 1) if side % step == 0 or step == 1]


def _side(threat: dict[str, Any]) -> int | None:
    size = threat.get("size")
    square = isinstance(size, list | tuple) and len(size) == 2 and isinstance(size[0], int) and size[0] == size[1]
    alone = threat.get("count") == 1 and threat.get("where") == "anywhere"
    return size[0] if square and alone and isinstance(size, list | tuple) else None
