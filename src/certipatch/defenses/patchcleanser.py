"""PatchCleanser (Xiang et al., USENIX Security 2022): double masking around any classifier."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence
from certipatch.defenses.masked import MaskDefense, PerAxis, checked_sure, covering_masks, per_axis
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
        finer: parts per axis that each of the masks is divided into, d or (rows, columns); each covers a share of the places.
            Double masking is then theirs, and what is said under larger ones is taken for all within, where that is
            confident.
        confident: the lead in confidence from which it is; below it the mean of the two confidences counts.

    First all one-mask pictures are looked at, then rows of disagreers until they fail, then pairs in the order of their
    one-mask confidence, the weakest first; a pair is looked at once, and not at all where both its masks have failed.
    Labels, and which places are certified, are those of the full table of M(M+1)/2.

    The masks are cut out of the picture that the attacker paints, before anything that the model does to it. That they
    cover the threat is checked with ``sees``; certificates for other threats keep the label, and have margin −inf where
    no mask covers.

    What stands for two of the ``finer`` masks comes from pictures that hide both, whole: a patch within one of them changes
    nothing of its row, and the theorem holds as it is. Where the lead is within rounding of ``confident``, both ways must
    agree.
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
        finer: PerAxis = None,
        confident: float = 0.5,
    ):
        super().__init__(model, threat, masks, stride, fill, batch_size)
        self.maps, self.sure = maps, checked_sure(sure)
        self.finer, self.confident = per_axis(finer, "parts of finer masks"), checked_sure(confident, "confident")
        if self.finer and isinstance(masks, Tensor):
            raise InputError("finer divides masks per axis; give their number as masks, not masks of your own")
        self.theorem = DoubleMask(self.sure).theorem
        self._covers: dict[tuple[int, int], Bool[Tensor, "L M"]] = {}
        self._larger: dict[tuple[int, int], tuple[MaskPairs, Int64[Tensor, " V"]]] = {}

    def settings(self) -> dict[str, Any]:
        finer = {"finer": list(self.finer), "confident": self.confident} if self.finer else {}
        return super().settings() | {"sure": self.sure, "maps": self.maps} | finer

    def views_of(self, image_size: tuple[int, int]) -> MaskPairs:
        if image_size not in self._views:
            masks, self._covers[image_size] = self.covering(image_size)
            if self.finer:
                larger = MaskPairs(masks)
                masks, self._covers[image_size] = covering_masks(
                    self.threats, image_size, self.masks, self.stride, self.finer
                )
                self._larger[image_size] = larger, within(masks, larger.masks)
            self._views[image_size] = MaskPairs(masks)
        found = self._views[image_size]
        assert isinstance(found, MaskPairs)
        return found

    def larger(self, image_size: tuple[int, int]) -> tuple[MaskPairs, Int64[Tensor, " V"]] | None:
        """With ``finer``: the pairs of larger masks, and which of them hides what each pair of the finer ones does."""
        self.views_of(image_size)
        return self._larger.get(image_size)

    def rule(self, image_size: tuple[int, int]) -> DoubleMask:
        return DoubleMask(self.sure)

    def values(self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance) -> tuple[Tensor, None, Tensor]:
        return ev.scores(logits), None, _error(tolerance, logits)

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        return self.label(self._looked_at(images, certify=False).evidence())

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        return self._looked_at(images, certify=True).evidence()

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        larger = self.larger(image_size)
        return self.number_of_views(image_size) + (larger[0].number(image_size) if larger else 0)

    def _looked_at(self, images: Float[Tensor, "B C H W"], certify: bool) -> "_Look":
        ev.check_images(images)
        look = (_FinerLook if self.finer else _Look)(self, images, self.tolerance(images))
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
        self.passes = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def evidence(self) -> Evidence:
        """What is known; views that were not looked at are unsure: the attacker may have them."""
        return Evidence(self.scores, ~self.known, self.size, self.error, passes=self.passes)

    def ask(self, wanted: Bool[Tensor, "B V"]) -> None:
        """Look at the wanted views of every picture that are not known yet, in full batches."""
        picture, view = (wanted & ~self.known).nonzero().T
        if len(picture):
            self.keep(picture, view, self.looked(self.views, picture, view))

    def looked(self, views: MaskPairs, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"]) -> Float[Tensor, "n K"]:
        """Confidences in what some pictures show under pairs of masks; counted as passes."""
        defense = self.defense
        logits = ev.logits_of(defense.model, views, self.images, picture, view.cpu(), defense.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        self.passes += picture.bincount(minlength=len(self.passes))
        return ev.scores(logits)

    def keep(self, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """Write down what is known from now on."""
        if len(self.scores) == 0:
            self.scores = torch.zeros((*self.known.shape, scores.shape[1]), dtype=scores.dtype, device=scores.device)
        self.scores[picture, view] = scores
        self.answers[picture, view], self.gaps[picture, view] = predictions(scores[None])[0], gaps(scores)
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


class _FinerLook(_Look):
    """With finer masks: larger ones are looked at first, and finer ones where those are not confident."""

    def __init__(self, defense: PatchCleanser, images: Float[Tensor, "B C H W"], tolerance: ev.Tolerance):
        super().__init__(defense, images, tolerance)
        found = defense.larger(self.size)
        assert found is not None
        self.larger, self.within = found[0], found[1].to(images.device)
        self.known_larger = torch.zeros((len(images), self.larger.number(self.size)), dtype=torch.bool).to(
            images.device
        )
        self.scores_larger: Float[Tensor, "B U K"] = torch.zeros(0)
        self.doubtful = torch.zeros_like(self.known)

    def evidence(self) -> Evidence:
        found = super().evidence()
        assert found.unsure is not None
        return replace(found, unsure=found.unsure | self.doubtful)

    def ask(self, wanted: Bool[Tensor, "B V"]) -> None:
        picture, view = (wanted & ~self.known).nonzero().T
        if len(picture) == 0:
            return
        asked = torch.zeros_like(self.known_larger)
        asked[picture, self.within[view]] = True
        owner, pair = (asked & ~self.known_larger).nonzero().T
        if len(owner):
            self._larger(owner, pair)
        picture, view = (wanted & ~self.known).nonzero().T
        if len(picture) == 0:
            return
        finer, larger = self.looked(self.views, picture, view), self.scores_larger[picture, self.within[view]]
        both = (finer + larger) / 2
        near = gaps(larger) >= self.defense.confident - 2 * self.error[picture]  # rounding might take the larger alone
        self.doubtful[picture, view] = near & (predictions(both[None])[0] != predictions(larger[None])[0])
        weaker = near & (gaps(larger) < gaps(both))
        self.keep(picture, view, torch.where(weaker[:, None], larger, both))

    def _larger(self, picture: Int64[Tensor, " n"], pair: Int64[Tensor, " n"]) -> None:
        """Look at pairs of larger masks, and take what is said confidently for all that is within."""
        scores = self.looked(self.larger, picture, pair)
        if len(self.scores_larger) == 0:
            shape = (*self.known_larger.shape, scores.shape[1])
            self.scores_larger = torch.zeros(shape, dtype=scores.dtype, device=scores.device)
        self.scores_larger[picture, pair], self.known_larger[picture, pair] = scores, True
        confident = torch.zeros_like(self.known_larger)
        confident[picture, pair] = gaps(scores) >= self.defense.confident + 2 * self.error[picture]
        owner, view = confident[:, self.within].nonzero().T
        self.keep(owner, view, self.scores_larger[owner, self.within[view]])


def gaps(scores: Float[Tensor, "*n K"]) -> Float64[Tensor, "*n"]:
    """How far the largest leads the next."""
    top = scores.double().topk(2, -1).values
    return top[..., 0] - top[..., 1]


def within(finer: Bool[Tensor, "M H W"], larger: Bool[Tensor, "N H W"]) -> Int64[Tensor, " V"]:
    """For every pair of finer masks the pair of larger ones that hides at least as much, both numbered by ``pair_table``."""
    inside = (finer.flatten(1).double() @ (~larger).flatten(1).double().T) == 0
    assert bool(inside.any(1).all())
    of = inside.int().argmax(1)
    one, other = torch.triu_indices(len(finer), len(finer))
    return pair_table(len(larger))[of[one], of[other]]


def _error(tolerance: ev.Tolerance, images: Float[Tensor, "B C H W"]) -> Float64[Tensor, " B"]:
    return tolerance.of(torch.ones(len(images), dtype=torch.float64, device=images.device))  # scores are at most 1
