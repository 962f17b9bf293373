"""Several networks that answer together (Lakshminarayanan et al. 2017, of logits): errors that they do not share cancel."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.cnn import CNNSettings
from certipatch.models.conv import ConvSettings
from certipatch.models.efficientnet import EfficientNetLiteSettings
from certipatch.models.mlp import MLPSettings
from certipatch.models.resnet import ResNet18Settings
from certipatch.models.settings import NetworkSettings, refuse_names
from certipatch.views import RandomViews, Views
from certipatch.views.render import Fill, constant

Member = ConvSettings | ResNet18Settings | MLPSettings | CNNSettings | EfficientNetLiteSettings
"""Settings of networks whose logits may be averaged."""
EnsembleMember = Annotated[
    Member, Field(discriminator="name"), refuse_names("the ensemble cannot have {name} as a member; use {known}")
]


class EnsembleSettings(NetworkSettings):
    """Several networks that answer together: the mean of their logits."""

    name: Literal["ensemble"] = "ensemble"
    members: tuple[EnsembleMember, ...] = Field(min_length=2, max_length=8)

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return Ensemble([one.build(views, channels, classes, image_size) for one in self.members])


@final
class NullToFill(nn.Module):
    """A network of filled images that is shown NULL-encoded ones: pixels that are zeros in all channels get its ``fill``.

    ``forward`` maps ``[x, 1 − x]`` (N, 2C, H, W) to logits (N, K).
    """

    encoding = "null"

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.fills = network, _fill(network)

    def forward(self, views: Float[Tensor, "N C2 H W"]) -> Float[Tensor, "N K"]:
        seen, rest = views.chunk(2, dim=1)
        return self.network(seen + constant(seen, self.fills) * (1 - seen - rest))


class Ensemble(nn.Module):
    """The mean of the logits of networks that read the same, as separately trained ones (start: one model for each).

    Args:
        parts: the networks; all read the same ``encoding``, and masks of the same ``fill``. Where one of them reads
            NULL-encoded images, those of filled ones get them as such.

    ``forward`` maps what they read (N, C, H, W) to logits (N, K). Errors: InputError if they read something else.
    """

    DEFAULT_ENCODING: ClassVar[str] = "null"
    """The ``encoding`` of networks that have no such attribute."""

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        read = [getattr(part, "encoding", self.DEFAULT_ENCODING) for part in parts]
        if "null" in read and set(read) <= {"null", "picture", "fill"}:
            parts = [part if reads == "null" else NullToFill(part) for part, reads in zip(parts, read, strict=True)]
            read = ["null"] * len(parts)
        ways = {(reads, _fill(part)) for part, reads in zip(parts, read, strict=True)}
        if len(ways) > 1:
            raise InputError("the members of an ensemble must read pictures in the same way, with masks of one fill")
        ((self.encoding, self.fill),) = ways
        self.parts = nn.ModuleList(parts)

    def forward(self, views):  # torch.fx calls it with a proxy, which has no shape to check
        first, *others = self.parts
        answer = first(views)
        for part in others:
            answer = answer + part(views)
        return answer / len(self.parts)


def _fill(network: nn.Module) -> Fill:
    return getattr(network, "fill", 0.5)
