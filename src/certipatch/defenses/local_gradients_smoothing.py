"""Local gradients smoothing (Naseer, Khan & Porikli, WACV 2019, https://arxiv.org/abs/1807.01216)."""

from typing import ClassVar, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.defenses.empirical import EmpiricalDefense
from certipatch.defenses.settings import DefenseSettings
from certipatch.errors import InputError


class GradientSettings(DefenseSettings):
    """The paper's."""

    window: int = Field(default=15, ge=1, le=4096)
    overlap: int = Field(default=5, ge=0, le=4096)
    threshold: float = Field(default=0.1, ge=0, le=1)
    smoothing: float = Field(default=2.3, ge=0)


DEFAULT = GradientSettings()


@final
class LocalGradientsSmoothing(EmpiricalDefense):
    """Darkens regions whose pixels change sharply: x̂ = x ⊙ (1 − clip(λ·g(x), 0, 1)).

    g is the size of the image's gradient (first differences of its grey values), scaled to [0, 1] per image; windows
    of a mean up to the threshold are left alone.

    Args:
        model: a plain network in eval mode.
        window: side k of a window in pixels; 15 in the paper, for images of 299 pixels.
        overlap: pixels that neighbouring windows share; 5 in the paper.
        threshold: γ; 0.1 in the paper.
        smoothing: λ; 2.3 in the paper.
        batch_size: images per forward pass.

    Departs from the paper: a window is at most half as wide as the image, so that small images have several; the
    last windows end at the border, so that every pixel is in one. Differentiable, but for the choice of windows.
    """

    name: ClassVar[str] = "lgs"
    settings_class = GradientSettings

    def __init__(
        self,
        model: nn.Module,
        window: int = DEFAULT.window,
        overlap: int = DEFAULT.overlap,
        threshold: float = DEFAULT.threshold,
        smoothing: float = DEFAULT.smoothing,
        batch_size: int | None = None,
    ):
        super().__init__(model, batch_size)
        if not 0 <= overlap < window:
            raise InputError(f"windows of {window} pixels overlap by 0 to {window - 1}, not {overlap}")
        self.options = GradientSettings.checked(
            window=window, overlap=overlap, threshold=threshold, smoothing=smoothing
        )
        self.window, self.overlap, self.threshold, self.smoothing = window, overlap, threshold, smoothing

    def cleaned(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        sharp = sharpness(images)
        kept = sharp * self._dense(sharp.detach())
        return images * (1 - (self.smoothing * kept).clamp(0, 1))[:, None]

    def _dense(self, sharp: Float[Tensor, "N H W"]) -> Float[Tensor, "N H W"]:
        """1 in windows of a mean above the threshold, else 0."""
        starts, sides = [], []
        for length in sharp.shape[1:]:
            side = max(1, min(self.window, length // 2))
            stride = max(1, round(side * (1 - self.overlap / self.window)))
            starts.append(sorted({min(start, length - side) for start in range(0, length - side + stride, stride)}))
            sides.append(side)
        means = F.avg_pool2d(sharp[:, None], tuple(sides), 1)[:, 0]  # type: ignore[arg-type]
        dense = torch.zeros_like(sharp)
        for top in starts[0]:
            for left in starts[1]:
                above = (means[:, top, left] > self.threshold).to(sharp)[:, None, None]
                part = dense[:, top : top + sides[0], left : left + sides[1]]
                part.copy_(torch.maximum(part, above))
        return dense


def sharpness(images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N H W"]:
    """Size of the gradient of the grey values, scaled so that each image's smallest is 0 and its largest 1."""
    grey = images.mean(1)
    down = F.pad(grey[:, 1:] - grey[:, :-1], (0, 0, 0, 1))
    across = F.pad(grey[:, :, 1:] - grey[:, :, :-1], (0, 1))
    size = (down**2 + across**2 + 1e-12).sqrt()
    low, high = size.amin((1, 2), keepdim=True), size.amax((1, 2), keepdim=True)
    return (size - low) / (high - low).clamp(min=1e-6)
