"""Empirical defenses: an answer and no proof. They have no ``certify``, so that a false certificate cannot be written."""

from abc import abstractmethod
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.method import Method
from certipatch.errors import InputError
from certipatch.inference import batch_size_for
from certipatch.rules.soft import lead_of


class EmpiricalDefense(Method):
    """Cleans an image of anything like a patch, then asks a plain network.

    Args:
        model: an ``nn.Module`` (N, C, H, W) → (N, K) in eval mode.
        batch_size: most images of a pass on an accelerator (default: 2²⁰ pixels); see ``inference``.
    """

    theorem = "none: nothing is certified"
    reads_whole_images: ClassVar[bool] = True

    def __init__(self, model: nn.Module, batch_size: int | None = None):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.batch_size = model, batch_size

    @abstractmethod
    def cleaned(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """The images that the network is shown."""

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        """Through the cleaning itself."""
        return lead_of(self.model(self.cleaned(images)).float())

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        """The label of every image. InputError on images that are not floats in [0, 1]."""
        ev.check_images(images)
        batch = batch_size_for(images[0, 0].numel(), self.batch_size)
        logits = [ev.image_logits(self.model, self.cleaned(part), self.batch_size) for part in images.split(batch)]
        return torch.cat(logits).argmax(1)

    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        """Refuse a model in training mode (InputError)."""
        if self.model.training:
            raise InputError("model refused: it is in training mode, call model.eval()")

    def to(self, device: str | torch.device) -> Self:
        """Move the network."""
        self.model.to(device)
        return self
