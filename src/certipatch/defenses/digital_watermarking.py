"""Digital watermarking (Hayes, CVPR workshops 2018): find the patch as a dense region of salient pixels, and mask it."""

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from certipatch.defenses.empirical import EmpiricalDefense
from certipatch.defenses.settings import DefenseSettings
from certipatch.errors import InputError
from certipatch.rules.soft import lead_of


class WatermarkSettings(DefenseSettings):
    """Shares of pixels, and the side of the neighbourhood."""

    renamed: ClassVar[dict[str, str]] = {
        "share": "pixel_fraction",
        "neighbours": "neighbour_fraction",
        "size": "window_size",
    }

    pixel_fraction: float = Field(default=0.1, gt=0, lt=1)
    neighbour_fraction: float = Field(default=0.4, ge=0, le=1)
    window_size: int | None = Field(default=None, ge=1, le=4095)


DEFAULT = WatermarkSettings()


@final
class DigitalWatermarking(EmpiricalDefense):
    """Masks dense clusters of pixels on which the network's answer depends most (the *blind* defense of the paper).

    The saliency of a pixel is the size of the gradient of the predicted class's log-probability. Of the most salient
    pixels those are kept that have enough salient neighbours; erosion removes what is thin, dilation closes the rest, and
    the mask is painted over with the mean of the image outside of it.

    Args:
        model: a plain network in eval mode.
        pixel_fraction: of all pixels, how many count as salient.
        neighbour_fraction: of the ``window_size`` x ``window_size`` pixels around a salient one, the share that must be
            salient too.
        window_size: side of the neighbourhood in pixels; None for 1/8 of the image, at least 3.
        batch_size: images per forward pass.

    Departs from the paper: the plain gradient stands for guided backpropagation, which needs networks made of ReLU layers;
    a mean colour for inpainting; sizes follow the image's, where the paper gives pixels of ImageNet. Chiang et al. 2020
    attack it through an identity on the way back (BPDA), and so do we (``leads``).
    """

    name: ClassVar[str] = "dw"
    settings_class = WatermarkSettings

    def __init__(
        self,
        model: nn.Module,
        pixel_fraction: float = DEFAULT.pixel_fraction,
        neighbour_fraction: float = DEFAULT.neighbour_fraction,
        window_size: int | None = DEFAULT.window_size,
        batch_size: int | None = None,
    ):
        super().__init__(model, batch_size)
        self.options = WatermarkSettings.checked(
            pixel_fraction=pixel_fraction, neighbour_fraction=neighbour_fraction, window_size=window_size
        )
        if window_size is not None and window_size % 2 == 0:
            raise InputError(f"window_size is an odd number of pixels, not {window_size}")
        self.pixel_fraction, self.neighbour_fraction, self.window_size = pixel_fraction, neighbour_fraction, window_size

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        """BPDA: the network sees the masked image, the gradient comes back as if nothing had been masked."""
        return lead_of(self.model(images + (self.cleaned(images) - images).detach()).float())

    def cleaned(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        mask = self.mask(images)[:, None]
        shown = (~mask).to(images)
        mean = (images * shown).sum((2, 3), keepdim=True) / shown.sum((2, 3), keepdim=True).clamp(min=1)
        return torch.where(mask, mean, images)

    def mask(self, images: Float[Tensor, "N C H W"]) -> Bool[Tensor, "N H W"]:
        """True on the pixels that are painted over; depends on the image alone, not on its neighbours in a batch."""
        size = self.window_size or max(3, min(images.shape[2:]) // 8 | 1)
        saliency = self.saliency(images.detach())
        number = max(1, round(self.pixel_fraction * saliency[0].numel()))
        limit = saliency.flatten(1).topk(number, 1).values[:, -1, None, None]
        salient = ((saliency >= limit) & (saliency > 0)).float()[:, None]
        around = F.avg_pool2d(salient, size, 1, size // 2, count_include_pad=False)
        dense = salient * (around >= self.neighbour_fraction)
        eroded = -F.max_pool2d(-F.max_pool2d(dense, 3, 1, 1), 3, 1, 1)  # closed: holes between salient pixels
        eroded = -F.max_pool2d(-eroded, 2, 1, 0)  # what is one pixel thin goes
        kept = F.max_pool2d(F.pad(eroded, (1, 1, 1, 1)), 2, 1, 0)
        return F.max_pool2d(kept, 3, 1, 1)[:, 0] > 0

    def saliency(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N H W"]:
        """The largest slope over the channels of the log-probability of the predicted class, at every pixel."""
        with torch.inference_mode(False), torch.enable_grad():
            probe = images.detach().clone().requires_grad_()
            top = torch.log_softmax(self.model(probe).float(), 1).amax(1)
            (gradient,) = torch.autograd.grad(top.sum(), probe)
        return gradient.abs().amax(1)
