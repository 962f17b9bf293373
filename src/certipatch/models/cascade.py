"""Networks asked one after another (Wang et al., *Wisdom of Committees*, ICLR 2022): most images need only the first."""

import copy
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.ensemble import Ensemble, Member
from certipatch.models.passes import run_in_passes
from certipatch.models.settings import NetworkSettings, refuse_names
from certipatch.views import RandomViews, Views

ROWS = 4  # in a pass of the networks that only some rows need
BLEND_WIDTH = 0.1  # of a gap: from so much below ``exit_gap`` the first prediction counts, more and more

CascadeMember = Annotated[
    Member, Field(discriminator="name"), refuse_names("the cascade cannot have {name} as a member; use {known}")
]


class CascadeSettings(NetworkSettings):
    """The first network's answer where that is confident, else the mean of the logits of all."""

    name: Literal["cascade"] = "cascade"
    members: tuple[CascadeMember, ...] = Field(min_length=2, max_length=8)
    exit_gap: float = Field(default=0.6, gt=0, le=1)
    """Gap between the first network's two largest confidences from which its answer is enough."""
    flip_tta: bool = False
    """Mirror images, too, give logits; the mean counts."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        parts = [member.build(views, channels, classes, image_size) for member in self.members]
        return Cascade(parts, **self.sizes())


class Cascade(Ensemble):
    """The first network's answer where that is confident, else the mean of the logits of all.

    Args:
        parts: the networks, as for an ensemble; the first is asked for every image, so let it be a fast one.
        exit_gap: gap between the first network's two largest confidences from which its answer is enough.
        flip_tta: each network is asked for the mirror image, left to right, too, which shows the same pixels; the first for
            its images themselves first.

    Little below ``exit_gap`` the two answers are blended, so that confidences move with the images without jumps, and
    rounding is magnified at most ``lipschitz`` times. ``forward`` maps images (N, C, H, W) to log confidences (N, K), and
    while it is trained to the mean of the logits. With ``early_exit`` False all are asked for every image, to the same answers.
    """

    lipschitz = 1 + 2 / BLEND_WIDTH
    """|Δp| ≤ |Δp₁| + |Δ share| of confidences p, and a lead changes by at most twice what they do."""

    def __init__(self, parts: Sequence[nn.Module], exit_gap: float = 0.6, flip_tta: bool = False):
        super().__init__(parts)
        if flip_tta and self.encoding not in ("picture", "null"):
            raise InputError("flip_tta of a cascade mirrors whole pictures; its networks read others")
        self.exit_gap, self.flip_tta, self.early_exit = exit_gap, flip_tta, True

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return super().forward(views) if self.training else self.combine(list(self.parts), views)

    def with_parts(self, parts: Sequence[nn.Module]) -> "Cascade":
        """A cascade of other networks that answer as these do."""
        other = copy.copy(self)
        other._modules = {"parts": nn.ModuleList(parts)}
        return other

    def combine(
        self, parts: Sequence[Callable[[Tensor], Tensor]], views: Float[Tensor, "N C H W"]
    ) -> Float[Tensor, "N K"]:
        """The cascade's log confidences from ``parts``, which are its networks or other ways to run them."""
        answer = parts[0](views)
        first = torch.log_softmax(answer, 1)
        best = first.exp().topk(2, 1).values
        share = ((best[:, :1] - best[:, 1:] - self.exit_gap) / BLEND_WIDTH + 1).clamp(0, 1)  # of the first answer
        left = share[:, 0] < 1
        passes = [(part, turned) for part in parts for turned in (False, True)[: 1 + self.flip_tta]]

        def others(views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
            answers = [part(views.flip(3) if turned else views) for part, turned in passes[1:]]
            return torch.stack(answers).sum(0)

        if self.early_exit:
            if not bool(left.any()):
                return first
            more = run_in_passes(lambda rows: others(views[rows]), left.nonzero()[:, 0], ROWS)
            answer, share = answer[left] + more, share[left]
        else:
            answer = answer + others(views)
        every = torch.log_softmax(answer / len(passes), 1)
        share = share.clamp(1e-12, 1 - 1e-7)  # whose logarithms have gradients
        blended = torch.logaddexp(share.log() + (first[left] if self.early_exit else first), (1 - share).log() + every)
        return first.index_put((left,), blended) if self.early_exit else torch.where(left[:, None], blended, first)
