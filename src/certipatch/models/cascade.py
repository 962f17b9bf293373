"""Networks asked one after another (Wang et al., *Wisdom of Committees*, ICLR 2022): most pictures need only the first."""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.ensemble import Ensemble
from certipatch.models.passes import run_in_passes

ROWS = 4  # in a pass of the networks that only some rows need
BLEND = 0.1  # of a lead: from so much below ``confident`` the first answer counts, more and more


class Cascade(Ensemble):
    """The first network's answer where that is confident, else the mean of the logits of all.

    Args:
        parts: the networks, as for an ensemble; the first is asked for every picture, so let it be a fast one.
        confident: the lead of its best class over the next, in confidence, from which the first answer is enough.
        mirror: each network is asked for the mirror image, left to right, too, which shows the same pixels; the first for
            its pictures themselves first.

    Little below ``confident`` the two answers are blended, so that confidences move with the pictures without jumps, and
    rounding is magnified at most ``steepness`` times. ``forward`` maps pictures (N, C, H, W) to log confidences (N, K), and
    while it is trained to the mean of the logits. With ``skips`` False all are asked for every picture, to the same answers.
    """

    steepness = 1 + 2 / BLEND
    """|Δp| ≤ |Δp₁| + |Δ share| of confidences p, and a lead changes by at most twice what they do."""

    def __init__(self, parts: Sequence[nn.Module], confident: float = 0.6, mirror: bool = False):
        super().__init__(parts)
        if mirror and self.encoding not in ("picture", "null"):
            raise InputError("a cascade mirrors whole pictures; its networks read others")
        self.confident, self.mirror, self.skips = confident, mirror, True

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return super().forward(views) if self.training else self.asked(list(self.parts), views)

    def with_parts(self, parts: Sequence[nn.Module]) -> "Cascade":
        """A cascade of other networks that answer as these do."""
        other = copy.copy(self)
        other._modules = {"parts": nn.ModuleList(parts)}
        return other

    def asked(
        self, parts: Sequence[Callable[[Tensor], Tensor]], views: Float[Tensor, "N C H W"]
    ) -> Float[Tensor, "N K"]:
        """What the cascade answers where ``parts`` are its networks, or other ways to run them."""
        answer = parts[0](views)
        first = torch.log_softmax(answer, 1)
        best = first.exp().topk(2, 1).values
        share = ((best[:, :1] - best[:, 1:] - self.confident) / BLEND + 1).clamp(0, 1)  # of the first answer
        left = share[:, 0] < 1
        asked = [(part, turned) for part in parts for turned in (False, True)[: 1 + self.mirror]]

        def others(views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
            answers = [part(views.flip(3) if turned else views) for part, turned in asked[1:]]
            return torch.stack(answers).sum(0)

        if self.skips:
            if not bool(left.any()):
                return first
            more = run_in_passes(lambda rows: others(views[rows]), left.nonzero()[:, 0], ROWS)
            answer, share = answer[left] + more, share[left]
        else:
            answer = answer + others(views)
        every = torch.log_softmax(answer / len(asked), 1)
        share = share.clamp(1e-12, 1 - 1e-7)  # whose logarithms have gradients
        blended = torch.logaddexp(share.log() + (first[left] if self.skips else first), (1 - share).log() + every)
        return first.index_put((left,), blended) if self.skips else torch.where(left[:, None], blended, first)
