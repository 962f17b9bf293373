"""A network for masked pictures, and others that help with whole ones: what each has to learn does not take from the other."""

from collections.abc import Sequence
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.cascade import Cascade
from certipatch.models.ensemble import Ensemble


@final
class Together(Ensemble):
    """An ensemble that with ``mirror`` is asked for mirror images, left to right, too; the mean counts."""

    unsaid: ClassVar[str] = "picture"

    def __init__(self, parts: Sequence[nn.Module], mirror: bool):
        super().__init__(parts)
        self.mirror = mirror

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        answer = super().forward(views)
        return (answer + super().forward(views.flip(3))) / 2 if self.mirror else answer


@final
class Specialists(Ensemble):
    """Double masking asks the first network under masks, and about whole pictures, where no mask wins, all of them together.

    Args:
        parts: the networks; they read pictures as the members of an ensemble do. The first may be a cascade or an ensemble,
            the others are asked about whole pictures alone, so let them have learned those.

    ``forward`` is the first, and maps what it reads (N, C, H, W) to logits (N, K); ``whole`` is the mean of the logits of
    all, those of a cascade or an ensemble counted one by one, to mirror images too where a cascade asks for them. Which is
    asked does not depend on what is seen, so each answer is a network's own.
    """

    unsaid: ClassVar[str] = "picture"

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__(parts)
        if len(parts) < 2:
            raise InputError("specialists are at least two networks: for masked pictures, and one more for whole ones")
        self.steepness: float = getattr(self.parts[0], "steepness", 1.0)

    @property
    def whole(self) -> Together:
        first, *others = self.parts
        single = list(first.parts) if isinstance(first, Ensemble) else [first]
        return Together([*single, *others], isinstance(first, Cascade) and first.mirror)

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.parts[0](views)
