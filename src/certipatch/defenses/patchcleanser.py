"""PatchCleanser (Xiang et al., USENIX Security 2022): double masking around any classifier."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence
from certipatch.defenses.masked import MaskDefense, PerAxis, checked_sure
from certipatch.errors import InputError
from certipatch.rules import DoubleMask
from certipatch.rules.double_mask import predictions, sureness
from certipatch.threats import PatchThreat
from certipatch.views import MaskPairs
from certipatch.views.masks import pair_table
from certipatch.views.render import Fill


@final
class PatchCleanser(MaskDefense):
    """Double masking: the answer that stays when any second mask is laid over the picture. Around any classifier.

    Args:
        model: an ``nn.Module`` in eval mode that maps pictures (N, C, H, W) in [0, 1] to logits (N, K), whatever it does
            with them inside; or one of our networks that read NULL-encoded pictures.
        threat: the patch that masks are made for, or several, such as different sizes; the answer depends on it.
        masks: masks per axis, k or (rows, columns); by default 6, or as many as ``stride`` needs. Or bool (M, H, W), your
            own.
        stride: pixels from mask to mask; None for the smallest that so many masks allow.
        fill: what masks are painted with; None for the model's own ``fill``, else 0.5.
        maps: margins of all places; False stops as soon as the verdict on the threat is known, and leaves −inf where
            nothing was proven until then.
        batch_size: masked pictures per forward pass (default: 2²⁰ pixels).
        sure: the mean lead in confidence that lets a mask win against the majority (see ``rules.DoubleMask``); 0 asks nothing.

    First all one-mask pictures are looked at, then rows of disagreers until they fail, then pairs in the order of their
    one-mask confidence, the weakest first; a pair is looked at once, and not at all where both its masks have failed.
    Labels, and which places are certified, are those of the full table of M(M+1)/2.

    The masks are cut out of the picture that the attacker paints, before anything that the model does to it. That they
    cover the threat is checked with ``sees``; certificates for other threats keep the label, and have margin −inf where
    no mask covers.
    """

    name: ClassVar[str] = "patchcleanser"

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat | Sequence[PatchThreat],
        masks: PerAxis | Bool[Tensor, "M H W"] = None,
        stride: PerAxis = None,
        fill: Fill | None = None,
        maps: bool = True,
        batch_size: int | None = None,
        sure: float = 0.0,
    ):
        super().__init__(model, threat, masks, stride, fill, batch_size)
        self.maps, self.sure = maps, checked_sure(sure)
        self.theorem = DoubleMask(self.sure).theorem
        self._covers: dict[tuple[int, int], Bool[Tensor, "L M"]] = {}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"sure": self.sure, "maps": self.maps}

    def views_of(self, image_size: tuple[int, int]) -> MaskPairs:
        if image_size not in self._views:
            masks, self._covers[image_size] = self.covering(image_size)
            self._views[image_size] = MaskPairs(masks)
        found = self._views[image_size]
        assert isinstance(found, MaskPairs)
        return found

    def rule(self, image_size: tuple[int, int]) -> DoubleMask:
        return DoubleMask(self.sure)

    def values(self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance) -> tuple[Tensor, None, Tensor]:
        return ev.scores(logits), None, _error(tolerance, logits)

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        return self.label(self._looked_at(images, certify=False).evidence())

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        return self._looked_at(images, certify=True).evidence()

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return self.number_of_views(image_size)

    def _looked_at(self, images: Float[Tensor, "B C H W"], certify: bool) -> "_Look":
        ev.check_images(images)
        look = _Look(self, images, self.tolerance(images))
        look.at_single_masks()
        look.at_disagreers()
        if certify:
            covers = self._covers[images.shape[2], images.shape[3]]
            look.at_pairs(None if self.maps else covers.to(images.device))
        return look


class _Look:
    """Which views of B pictures have been looked at, and what they say. No answer depends on the other pictures."""

    def __init__(self, defense: PatchCleanser, images: Float[Tensor, "B C H W"], tolerance: ev.Tolerance):
        self.defense, self.images = defense, images
        self.size = images.shape[2], images.shape[3]
        self.views = defense.views_of(self.size)
        self.error = _error(tolerance, images)
        self.table = pair_table(len(self.views.masks)).to(images.device)
        self.known = torch.zeros((len(images), self.views.number(self.size)), dtype=torch.bool, device=images.device)
        self.scores: Float[Tensor, "B V K"] = torch.zeros(0)
        self.answers: Int64[Tensor, "B V"] = torch.zeros(self.known.shape, dtype=torch.int64, device=images.device)
        self.gaps: Float64[Tensor, "B V"] = torch.zeros(self.known.shape, dtype=torch.float64, device=images.device)

    def evidence(self) -> Evidence:
        """What is known; views that were not looked at are unsure: the attacker may have them."""
        return Evidence(self.scores, ~self.known, self.size, self.error, passes=self.known.sum(1))

    def ask(self, wanted: Bool[Tensor, "B V"]) -> None:
        """Look at the wanted views of every picture that are not known yet, in full batches."""
        picture, view = (wanted & ~self.known).nonzero().T
        if len(picture) == 0:
            return
        defense = self.defense
        logits = ev.logits_of(defense.model, self.views, self.images, picture, view.cpu(), defense.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        scores = ev.scores(logits)
        if len(self.scores) == 0:
            self.scores = torch.zeros((*self.known.shape, scores.shape[1]), dtype=scores.dtype, device=scores.device)
        top = scores.double().topk(2, 1).values
        self.scores[picture, view] = scores
        self.answers[picture, view], self.gaps[picture, view] = predictions(scores[None])[0], top[:, 0] - top[:, 1]
        self.known[picture, view] = True

    def at_single_masks(self) -> None:
        """The first round."""
        wanted = torch.zeros_like(self.known)
        wanted[:, self.table.diagonal()] = True
        self.ask(wanted)

    def at_disagreers(self) -> None:
        """The second round: every disagreer with the majority until a pair fails it, likely failures first."""
        alone, sure = self.answers[:, self.table.diagonal()], self.gaps[:, self.table.diagonal()]
        counts = nn.functional.one_hot(alone, self.scores.shape[2]).sum(1)
        left = alone != counts.argmax(1, keepdim=True)
        differs = alone[:, :, None] != alone[:, None]  # second masks that alone say otherwise, the sure ones first
        order = (differs * (1 + sure)[:, None]).argsort(dim=2, descending=True, stable=True)
        first, step = 0, 1
        while first < len(self.table) and bool(left.any()):
            picture, mask = left.nonzero().T
            views = self.table[mask[:, None], order[picture, mask, first : first + step]]
            wanted = torch.zeros_like(self.known)
            wanted[picture[:, None], views] = True
            self.ask(wanted)
            left[picture, mask] = (self.answers[picture[:, None], views] == alone[picture, mask][:, None]).all(1)
            first, step = first + step, 2 * step

    def at_pairs(self, covers: Bool[Tensor, "L M"] | None) -> None:
        """Pairs of masks that have not failed, weakest first; with ``covers`` until the verdict on it is known."""
        label = self.defense.label(self.evidence())[:, None]
        one, other = torch.triu_indices(len(self.table), len(self.table)).to(self.images.device)
        alone = torch.where(self.answers == label, self.gaps, -self.gaps)[:, self.table.diagonal()]
        weakness, step = alone[:, one] + alone[:, other], 4
        while True:
            good = (self.answers == label) & (self.gaps > 2 * self.error[:, None])
            holds = (good | ~self.known)[:, self.table].all(2)  # (B, M): has not failed
            if self.defense.sure:
                lead = (self.gaps - 2 * self.error[:, None]).masked_fill(~self.known, 1.0)  # a lead is at most 1
                holds &= sureness(lead[:, self.table]) > self.defense.sure
            wanted = (holds[:, one] | holds[:, other]) & ~self.known
            if covers is not None:
                proven = holds & self.known[:, self.table].all(2)
                lost = ~(covers & holds[:, None]).any(2).all(1)
                won = (covers & proven[:, None]).any(2).all(1)
                wanted &= ~(lost | won)[:, None]
            if not bool(wanted.any()):
                return
            now = weakness.masked_fill(~wanted, torch.inf).topk(min(step, wanted.shape[1]), 1, largest=False).indices
            self.ask(torch.zeros_like(wanted).scatter(1, now, True) & wanted)
            step *= 2


def _error(tolerance: ev.Tolerance, images: Float[Tensor, "B C H W"]) -> Float64[Tensor, " B"]:
    return tolerance.of(torch.ones(len(images), dtype=torch.float64, device=images.device))  # scores are at most 1
