"""One image of a report."""

from dataclasses import dataclass
from typing import final

import numpy as np

STATES = ("certified", "open", "wrong", "alarm")


@final
@dataclass(frozen=True, eq=False)
class ExplorerData:
    """The explorer's data of one image, for R rows of ``sees``, V views and K classes.

    answer: the predicted class. target: the true class, if it is known. margins: float64 (R,), the margin of the locations
    of each row. evidence: (V, K), bool votes or float32 scores as the rule counts them. unsure: bool (V,), views that
    belong to the attacker everywhere, or None.
    """

    answer: int
    target: int | None
    margins: np.ndarray
    evidence: np.ndarray
    unsure: np.ndarray | None = None


@final
@dataclass(frozen=True, eq=False)
class ReportImage:
    """One image, its prediction, and the locations at which a patch could change the prediction.

    image: uint8 (H, W, C), C = 1 or 3. title: "picture 17" or a file name. target: the true class's name; None for the
    user's own images. label: the predicted class. margin: the smallest margin, may be -inf. weakest: (top, left, height,
    width) of the location that has it, in pixels. largest_patch: side of the largest certified square in pixels, 0 for
    none. map: float (H, W), for each pixel the smallest margin over the locations that cover it, may hold ±inf.
    alarm: True if the clean image raises one. explored: the explorer's data, if the image is in the explorer.
    """

    image: np.ndarray
    title: str
    target: str | None
    label: str
    certified: bool
    margin: float
    weakest: tuple[int, int, int, int] | None = None
    largest_patch: int | None = None
    map: np.ndarray | None = None
    alarm: bool = False
    explored: ExplorerData | None = None

    def __post_init__(self):
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] not in (1, 3):
            raise ValueError(f"image is uint8 (H, W, 1 or 3), not {self.image.dtype} {self.image.shape}")
        if self.map is not None and self.map.shape != self.image.shape[:2]:
            raise ValueError(f"map has the shape {self.image.shape[:2]} of the picture, not {self.map.shape}")

    @property
    def state(self) -> str:
        """``alarm`` (a false one), ``wrong``, ``certified`` or ``open`` (not certified, and not known to be wrong)."""
        if self.alarm:
            return "alarm"
        if self.target is not None and self.target != self.label:
            return "wrong"
        return "certified" if self.certified else "open"


def evenly(n: int, count: int) -> list[int]:
    """``count`` of the numbers 0 … n − 1, evenly spaced, the first and last among them; all of them if n ≤ count."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, count)).round().astype(int)).tolist()
