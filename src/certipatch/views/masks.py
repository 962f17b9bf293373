"""Views given pixel by pixel: the picture with a mask over it, or any other pixel sets."""

from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.errors import InputError
from certipatch.views.base import Views


@final
class PixelSets(Views):
    """Views listed one by one.

    Args:
        visible: bool (V, H, W), True where the view shows the pixel.
    """

    def __init__(self, visible: Tensor):
        if visible.dtype != torch.bool or visible.ndim != 3 or visible.numel() == 0:
            raise InputError(
                f"pixel sets are a bool tensor (V, H, W) with at least one view, not {visible.dtype} {tuple(visible.shape)}"
            )
        self._visible = visible.detach().cpu().clone()

    def number(self, image_size: tuple[int, int]) -> int:
        if tuple(image_size) != tuple(self._visible.shape[1:]):
            raise InputError(
                f"these views are for pictures of {tuple(self._visible.shape[1:])} pixels, not {tuple(image_size)}"
            )
        return len(self._visible)

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        self.number(image_size)
        return self._visible if index is None else self._visible[index]

    def settings(self) -> dict[str, Any]:
        return {"name": "pixel-sets", "visible": self._visible.to(torch.uint8).tolist()}


def masked(masks: Tensor) -> PixelSets:
    """Views that show everything but a mask: bool ``masks`` (V, H, W), True where the mask hides the pixel."""
    return PixelSets(~masks)
