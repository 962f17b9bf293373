"""A network for masked pictures and one for whole ones: what each has to learn does not take from the other."""

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.ensemble import Ensemble


@final
class Specialists(Ensemble):
    """Double masking asks the first network under masks, and the second about whole pictures, where no mask wins.

    Args:
        parts: the two networks; they read pictures as the members of an ensemble do.

    ``forward`` is the first, and maps what it reads (N, C, H, W) to logits (N, K); ``whole`` is the second. Which is asked does
    not depend on what is seen, so each answer is a network's own.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__(parts)
        if len(parts) != 2:
            raise InputError(f"specialists are two networks, for masked pictures and for whole ones, not {len(parts)}")
        self.steepness: float = getattr(self.parts[0], "steepness", 1.0)

    @property
    def whole(self) -> nn.Module:
        return self.parts[1]

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.parts[0](views)
