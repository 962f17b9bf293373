"""No defense: a plain network, to compare with. It certifies nothing."""

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Certificate
from certipatch.defenses.base import Defense, Evidence
from certipatch.errors import InputError
from certipatch.threats import PatchThreat, Threat
from certipatch.views.incidence import sees
from certipatch.views.render import image_size


@final
class Undefended(Defense):
    """The class of largest logit of a network (B, C, H, W) → (B, K); every location has margin −inf.

    Args:
        model: an ``nn.Module`` in eval mode.
        batch_size: most images of a pass on an accelerator (default: 2²⁰ pixels); see ``inference``.
    """

    name: ClassVar[str] = "undefended"
    theorem = "none: nothing is certified"
    in_words: ClassVar[str] = (
        "A plain network that looks at the whole picture: any patch may change its answer, nothing is proven."
    )
    reads_whole_images: ClassVar[bool] = True

    def __init__(self, model: nn.Module, batch_size: int | None = None):
        self.model, self.batch_size = model, batch_size

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        ev.check_images(images)
        logits = ev.image_logits(self.model, images, self.batch_size)
        return Evidence(logits[:, None], None, image_size(images))

    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return evidence.values[:, 0].argmax(1)

    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        label = self.label(evidence)
        whole = torch.ones(1, *evidence.image_size, dtype=torch.bool)
        relation = sees(whole, threat, evidence.image_size) if isinstance(threat, PatchThreat) else None
        places = 1 if relation is None else len(relation.row_of)
        margin = torch.full((len(label), places), -torch.inf, dtype=torch.float64, device=label.device)
        return Certificate(label, margin, threat, self.theorem, relation)

    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        if self.model.training:
            raise InputError("model refused: it is in training mode, call model.eval()")

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        return self.network_leads(images)

    def exported_network(self, image_size: tuple[int, int]) -> nn.Module:
        return self.model

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return 1

    def to(self, device: str | torch.device) -> "Undefended":
        self.model.to(device)
        return self
