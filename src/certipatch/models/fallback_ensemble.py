"""A network for masked images, and an ensemble for unmasked ones: what each has to learn does not take from the other."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.cascade import Cascade, CascadeSettings
from certipatch.models.ensemble import Ensemble, EnsembleSettings, Member
from certipatch.models.settings import NetworkSettings, refuse_names
from certipatch.views import RandomViews, Views

FallbackMember = Annotated[
    Member | EnsembleSettings | CascadeSettings,
    Field(discriminator="name"),
    refuse_names("the fallback-ensemble cannot have {name} as a member; use {known}"),
]


class FallbackEnsembleSettings(NetworkSettings):
    """A network for masked images; for unmasked ones, where no mask wins, the ensemble of it and the others."""

    name: Literal["fallback-ensemble"] = "fallback-ensemble"
    members: tuple[FallbackMember, ...] = Field(min_length=2, max_length=8)

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return FallbackEnsemble([member.build(views, channels, classes, image_size) for member in self.members])


@final
class FlipEnsemble(Ensemble):
    """An ensemble that with ``flip_tta`` is asked for mirror images, left to right, too; the mean counts."""

    DEFAULT_ENCODING: ClassVar[str] = "picture"

    def __init__(self, parts: Sequence[nn.Module], flip_tta: bool):
        super().__init__(parts)
        self.flip_tta = flip_tta

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        answer = super().forward(views)
        return (answer + super().forward(views.flip(3))) / 2 if self.flip_tta else answer


@final
class FallbackEnsemble(Ensemble):
    """Double masking asks the first network under masks, and about whole images, where no mask wins, all of them together.

    Args:
        parts: the networks; they read images as the members of an ensemble do. The first may be a cascade or an ensemble,
            the others are asked about whole images alone, so let them have learned those.

    ``forward`` is the first, and maps what it reads (N, C, H, W) to logits (N, K); ``unmasked`` is the mean of the logits of
    all, those of a cascade or an ensemble counted one by one, to mirror images too where a cascade asks for them. Which is
    asked does not depend on what is seen, so each answer is a network's own.
    """

    DEFAULT_ENCODING: ClassVar[str] = "picture"

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__(parts)
        if len(parts) < 2:
            raise InputError(
                "a fallback ensemble has at least two networks: one for masked pictures, and one more for unmasked ones"
            )
        self.lipschitz: float = getattr(self.parts[0], "lipschitz", 1.0)

    @property
    def unmasked(self) -> FlipEnsemble:
        first, *others = self.parts
        single = list(first.parts) if isinstance(first, Ensemble) else [first]
        return FlipEnsemble([*single, *others], isinstance(first, Cascade) and first.flip_tta)

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.parts[0](views)
