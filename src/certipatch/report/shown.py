"""One picture of a report's gallery."""

from dataclasses import dataclass
from typing import final

import numpy as np


@final
@dataclass(frozen=True, eq=False)
class Shown:
    """One picture, the answer to it, and where a patch could change that answer.

    image: uint8 (H, W, C), C = 1 or 3. title: "picture 17" or a file name. target: the true class's name; None for the
    user's own pictures. label: the answer. margin: the smallest margin, may be -inf. weakest: (top, left, height,
    width) of the location that has it, in pixels. largest_patch: side of the largest certified square in pixels, 0 for
    none. map: float (H, W), for each pixel the smallest margin over the locations that cover it, may hold ±inf.
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

    def __post_init__(self):
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] not in (1, 3):
            raise ValueError(f"image is uint8 (H, W, 1 or 3), not {self.image.dtype} {self.image.shape}")
        if self.map is not None and self.map.shape != self.image.shape[:2]:
            raise ValueError(f"map has the shape {self.image.shape[:2]} of the picture, not {self.map.shape}")

    @property
    def state(self) -> str:
        """``certified``, ``open`` (not certified, and not known to be wrong) or ``wrong``."""
        if self.target is not None and self.target != self.label:
            return "wrong"
        return "certified" if self.certified else "open"
