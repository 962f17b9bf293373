"""What a certified defense is, for every command: evidence once, then any certificate from it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from certipatch.certificate import Certificate, Notion
from certipatch.threats import Threat


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """What a rule needs to know of B pictures, computed once."""

    values: Tensor
    """(B, V, K): votes, logits or confidences."""
    unsure: Bool[Tensor, "B V"] | None
    image_size: tuple[int, int]


class Defense(ABC):
    """A certified defense. ``certify`` is ``certificate(evidence(images), threat)``: one pass serves every threat."""

    name: ClassVar[str]
    notion: ClassVar[Notion] = "recovery"
    theorem: str
    """The condition behind its certificates, in one line."""

    @abstractmethod
    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        """Run the network over all views. InputError on pictures that are not floats in [0, 1]."""

    @abstractmethod
    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        """Labels and margins from evidence. InputError if the threat does not fit the pictures."""

    @abstractmethod
    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        """Labels from evidence."""

    @abstractmethod
    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        """Refuse a model that breaks the theorem's conditions (InputError with the reason)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The defense's own settings, as plain JSON values."""

    @abstractmethod
    def forward_passes(self, image_size: tuple[int, int]) -> int:
        """Network calls per picture."""

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"] | None:
        """Side of the largest certified square, anywhere, per picture; 0 if none; None where predict depends on it."""
        return None

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        """The label of every picture; the same as the label that ``certify`` gives."""
        return self.label(self.evidence(images))

    def certify(self, images: Float[Tensor, "B C H W"], threat: Threat) -> Certificate:
        """Labels, and margins for every location of the threat. Another threat never changes the label."""
        return self.certificate(self.evidence(images), threat)

    def to(self, device: str | torch.device) -> "Defense":
        """Move the network; defenses without one stay where they are."""
        return self
