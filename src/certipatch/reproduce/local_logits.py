"""Local logits of any network with a map, undefended ones too; one cell alone, their mean, and other ways to add them up.

The last layer, applied to every cell of the last map before pooling, gives local logits (PatchGuard, section II-A).
Our conv networks pool by maximum, so the mean of local logits is not their own prediction.
"""

from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import ViewDefense
from certipatch.errors import InputError
from certipatch.inference import batch_size_for
from certipatch.models import ConvNet
from certipatch.rules import Rule
from certipatch.views import Views


@final
class LocalConv(nn.Module):
    """A conv network of whole images, its last layer on every cell: images (B, C, H, W) to local logits (B, V, K).

    The logits are those of the image alone, even if the network averages over its mirror image; they are divided by the
    network's temperature.
    """

    encoding = "all-views"

    def __init__(self, network: ConvNet):
        super().__init__()
        head = nn.Conv2d(network.head.in_features, network.head.out_features, 1)
        weight, bias = (tensor / network.temperature for tensor in (network.head.weight, network.head.bias))
        head.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
        self.local = nn.Sequential(network.body, head)
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V K"]:
        return self.local(images).flatten(2).transpose(1, 2)


@final
class Cell(nn.Module):
    """The logits (B, K) of one cell of a network of local logits."""

    def __init__(self, network: nn.Module, cell: int):
        super().__init__()
        self.network, self.cell = network, cell
        self.eval()

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.network(images)[:, self.cell]


@final
class MeanOfCells(nn.Module):
    """The mean (B, K) of the local logits: the logits of a BagNet without a defense."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.network(images).mean(1)


@final
class Aggregation(ViewDefense):
    """Unclipped local logits, added up by a rule.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        views: the bands or blocks; None for a network of local logits.
        rule: of logits.
    """

    name: ClassVar[str] = "aggregation"
    raw: ClassVar[bool] = True

    def __init__(self, model: nn.Module, views: Views | None, rule: Rule):
        super().__init__(model, views)
        self._rule, self.theorem = rule, rule.theorem

    def rule(self, image_size: tuple[int, int]) -> Rule:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        return logits, None, tolerance.of(logits).flatten(1).amax(1).double()

    def settings(self) -> dict[str, Any]:
        return {"rule": repr(self._rule)}


def network_of(defense: Any, name: str) -> tuple[nn.Module, Views | None]:
    """A defense's network as one of local logits, or of bands or blocks and these.

    Errors: InputError if the network has no map with a layer that can be put on its cells.
    """
    if isinstance(defense, ViewDefense):
        return defense.model, defense.views
    if isinstance(network := defense.model, ConvNet) and network.encoding == "picture":
        return LocalConv(network), None
    raise InputError(
        f"{name}: a {type(network).__name__} has no local logits; this table needs a conv network or a BagNet"
    )


def map_of(defense: Any, name: str) -> nn.Module:
    """A defense's network as one of local logits, a cell for every view. InputError as ``network_of``, and for bands."""
    network, views = network_of(defense, name)
    if views is not None:
        raise InputError(f"{name} looks at bands or blocks; this table needs a conv network or a BagNet")
    return network


def answers(network: nn.Module, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B ..."]:
    """The logits of a network on images, in full batches."""
    batch = batch_size_for(images[0, 0].numel())
    with torch.inference_mode():
        return torch.cat([network(part) for part in images.split(batch)])
