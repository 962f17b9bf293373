"""PatchCleanser (Xiang et al., USENIX Security 2022): double masking around any classifier."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence
from certipatch.defenses.masked import (
    BehindMasks,
    MaskDefense,
    PerAxis,
    checked_sure,
    checked_whole,
    covering_masks,
    per_axis,
)
from certipatch.errors import InputError
from certipatch.model_check import check_model
from certipatch.rules import DoubleMask
from certipatch.rules.double_mask import best_leads, predictions, sureness
from certipatch.threats import PatchThreat
from certipatch.views import MaskPairs, PixelSets
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
        finer: parts per axis that each of the masks is divided into, d or (rows, columns), by one prime factor after another,
            such as 4 by halves twice. Double masking is then that of the smallest, and what is said under larger ones is taken
            for all within, where that is confident.
        confident: the lead in confidence from which it is; one number, or one for each size of masks but the smallest.
        whole: whether the answer where no mask wins is that to the whole picture, not the majority's; the model's own, or
            where it has one that of its network ``whole``, which may be one that has learned for accuracy alone.

    First the whole picture is looked at, where that is asked for, and all one-mask pictures, then rows of those that disagree
    with the whole picture or the majority until they fail, then pairs in the order of their one-mask confidence, the weakest
    first; a pair is looked at once, and not at all where both its masks have failed.
    Labels, and which places are certified, are those of the full table of M(M+1)/2.

    The masks are cut out of the picture that the attacker paints, before anything that the model does to it. That they
    cover the threat is checked with ``sees``; certificates for other threats keep the label, and have margin −inf where
    no mask covers.

    What stands for two of the smallest masks comes from pictures that hide both, whole: a patch within one of them changes
    nothing of its row, and the theorem holds as it is. Where a lead is within rounding of ``confident``, both ways must
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
        confident: float | Sequence[float] = 0.5,
        whole: bool = False,
    ):
        super().__init__(model, threat, masks, stride, fill, batch_size)
        self.maps, self.sure, self.whole = maps, checked_sure(sure), checked_whole(whole)
        own = getattr(model, "unmasked", None)
        self.unmasked = BehindMasks(own if whole and isinstance(own, nn.Module) else model, fill)
        self.finer = per_axis(finer, "parts of finer masks")
        self.divisions = divisions(self.finer or (1, 1))
        leads = list(confident) if isinstance(confident, Sequence) else [confident] * len(self.divisions)
        self.confident = tuple(checked_sure(lead, "confident") for lead in leads)
        if len(leads) != len(self.divisions):
            raise InputError(
                f"confident is a lead, or one for each of {len(self.divisions)} larger sizes of masks, not {confident}"
            )
        if self.finer and isinstance(masks, Tensor):
            raise InputError("finer divides masks per axis; give their number as masks, not masks of your own")
        self.theorem = DoubleMask(self.sure).theorem
        self._covers: dict[tuple[int, int], Bool[Tensor, "L M"]] = {}
        self._sizes: dict[tuple[int, int], list[MaskPairs]] = {}
        self._around: dict[tuple[int, int], list[Int64[Tensor, " V"]]] = {}

    def settings(self) -> dict[str, Any]:
        finer = {"finer": list(self.finer), "confident": list(self.confident)} if self.finer and self.divisions else {}
        whole = {"whole": True} if self.whole else {}
        return super().settings() | {"sure": self.sure, "maps": self.maps} | finer | whole

    def views_of(self, image_size: tuple[int, int]) -> MaskPairs:
        if image_size not in self._views:
            sizes = [self.divisions[:number] for number in range(len(self.divisions) + 1)]
            found = [covering_masks(self.threats, image_size, self.masks, self.stride, parts) for parts in sizes]
            smallest, self._covers[image_size] = found[-1]
            self._sizes[image_size] = [MaskPairs(masks) for masks, _ in found]
            self._around[image_size] = nested([masks for masks, _ in found])
            self._views[image_size] = MaskPairs(smallest, self.whole)
        views = self._views[image_size]
        assert isinstance(views, MaskPairs)
        return views

    def larger(self, image_size: tuple[int, int]) -> list[tuple[MaskPairs, Int64[Tensor, " V"]]]:
        """Pairs of masks of every size but the smallest, the largest first, and which of them is around each of the smallest."""
        return list(zip(self.sizes(image_size)[:-1], self._around[image_size], strict=True))

    def sizes(self, image_size: tuple[int, int]) -> list[MaskPairs]:
        """Pairs of masks of every size, the largest first."""
        self.views_of(image_size)
        return self._sizes[image_size]

    def rule(self, image_size: tuple[int, int]) -> DoubleMask:
        return DoubleMask(self.sure, self.whole)

    def checked(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        """The network under masks, whose rounding counts; of one of whole pictures only that its answers are its own."""
        pairs = self.sizes((images.shape[2], images.shape[3]))[-1]
        if self.whole:
            check_model(self.unmasked, PixelSets(torch.ones_like(pairs.masks[:1])), images, self.batch_size)
        return check_model(self.model, pairs, images, self.batch_size)

    def values(self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance) -> tuple[Tensor, None, Tensor]:
        return ev.scores(logits), None, _error(tolerance, logits)

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        return self.label(self._looked_at(images, certify=False).evidence())

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        return self._looked_at(images, certify=True).evidence()

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return self.whole + sum(pairs.number(image_size) for pairs in self.sizes(image_size))

    def to(self, device: str | torch.device) -> "PatchCleanser":
        self.unmasked.to(device)
        super().to(device)
        return self

    def _looked_at(self, images: Float[Tensor, "B C H W"], certify: bool) -> "_Look":
        ev.check_images(images)
        look = (_FinerLook if self.divisions else _Look)(self, images, self.tolerance(images))
        look.at_whole()
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

    def ask(self, wanted: Bool[Tensor, "B v"]) -> None:
        """Look at the wanted views of every picture that are not known yet, in full batches."""
        picture, view = self.left(wanted)
        if len(picture):
            self.keep(picture, view, self.looked(self.defense.model, self.views, picture, view))

    def left(self, wanted: Bool[Tensor, "B v"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """Pictures and their views, of the first v, that are wanted and not known yet."""
        picture, view = (wanted & ~self.known[:, : wanted.shape[1]]).nonzero().T
        return picture, view

    def looked(
        self, model: nn.Module, views: MaskPairs, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n K"]:
        """A network's confidences in what some pictures show under pairs of masks; counted as passes."""
        logits = ev.logits_of(model, views, self.images, picture, view.cpu(), self.defense.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        self.passes += picture.bincount(minlength=len(self.passes))
        return ev.scores(logits)

    def keep(self, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """Write down what is known from now on."""
        self.write(picture, view, scores)
        self.known[picture, view] = True

    def write(self, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """Put scores into the table."""
        if len(self.scores) == 0:
            self.scores = torch.zeros((*self.known.shape, scores.shape[1]), dtype=scores.dtype, device=scores.device)
        if self.scores.shape[2] != scores.shape[1]:
            numbers = self.scores.shape[2], scores.shape[1]
            raise InputError(
                f"the model answers whole pictures with {numbers[0]} classes, masked ones with {numbers[1]}"
            )
        self.scores[picture, view] = scores.to(self.scores.dtype)
        self.answers[picture, view], self.gaps[picture, view] = predictions(scores[None])[0], best_leads(scores)

    def least(self) -> Float64[Tensor, "B V"]:
        """By how much each answer leads, however what the network says is rounded."""
        return self.gaps - 2 * self.error[:, None]

    def at_whole(self) -> None:
        """The whole picture, where the rule asks for it."""
        if self.defense.whole:
            every = torch.arange(len(self.images), device=self.images.device)
            view = torch.full_like(every, self.known.shape[1] - 1)
            self.keep(every, view, self.looked(self.defense.unmasked, self.views, every, view))

    def at_single_masks(self) -> None:
        """The first round."""
        wanted = torch.zeros_like(self.known)
        wanted[:, self.table.diagonal()] = True
        self.ask(wanted)

    def at_disagreers(self) -> None:
        """The second round: every disagreer with the majority, or the whole picture, until a pair fails it, likely failures
        first."""
        alone, sure = self.answers[:, self.table.diagonal()], self.gaps[:, self.table.diagonal()]
        counts = nn.functional.one_hot(alone, self.scores.shape[2]).sum(1)
        left = alone != (self.answers[:, -1] if self.defense.whole else counts.argmax(1))[:, None]
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
        weakness, step, known = alone[:, one] + alone[:, other], 4, self.known[:, : len(one)]
        while True:
            least = self.least()
            good = (self.answers == label) & (least > 0)
            holds = (good | ~self.known)[:, self.table].all(2)  # (B, M): has not failed
            if self.defense.sure:
                lead = least.masked_fill(~self.known, 1.0)  # a lead is at most 1
                holds &= sureness(lead[:, self.table]) > self.defense.sure
            wanted = (holds[:, one] | holds[:, other]) & ~known
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
    """With masks of several sizes: the largest are looked at first, and smaller ones where those are not confident."""

    def __init__(self, defense: PatchCleanser, images: Float[Tensor, "B C H W"], tolerance: ev.Tolerance):
        super().__init__(defense, images, tolerance)
        self.larger = [(pairs, around.to(images.device)) for pairs, around in defense.larger(self.size)]
        self.seen = [torch.zeros_like(self.known[:, : pairs.number(self.size)]) for pairs, _ in self.larger]
        self.taken = torch.zeros_like(self.known)
        """Cells that larger masks fill by less than rounding: what smaller ones say is looked at, but does not count."""
        self.other = torch.full_like(self.answers, -1)
        """The class that a cell would have if rounding were other, −1 where none, −2 where it might be one of several."""
        self.other_lead = torch.full_like(self.gaps, torch.inf)
        """The least lead that it would have then."""

    def least(self) -> Float64[Tensor, "B V"]:
        lead = torch.minimum(self.gaps, self.other_lead) - 2 * self.error[:, None]
        return lead.masked_fill((self.other != -1) & (self.other != self.answers), -torch.inf)

    def evidence(self) -> Evidence:
        """Of cells that might hold something else the smaller lead; those of which that is another class are unsure.

        Labels are those of what cells hold: what they might hold depends on the rounding, here and under attack. A mask that
        wins with the smaller leads wins with theirs, too.
        """
        found = super().evidence()
        doubtful = (self.other != -1) & self.known
        if not bool(doubtful.any()):
            return found
        lost = doubtful & (self.least() <= 0)
        weaker = doubtful & ~lost & (self.other_lead < self.gaps)
        share = (self.other_lead[weaker] / self.gaps[weaker])[:, None]  # of the scores, the rest spread evenly
        values = found.values.clone()
        values[weaker] = (share * values[weaker] + (1 - share) / values.shape[2]).to(values.dtype)
        assert found.unsure is not None
        labels = self.defense.label(found) if self.defense.sure else None  # without, they hang on classes alone
        return replace(found, values=values, unsure=found.unsure | lost, labels=labels)

    def ask(self, wanted: Bool[Tensor, "B v"]) -> None:
        for number, ((pairs, around), seen) in enumerate(zip(self.larger, self.seen, strict=True)):
            picture, view = self.left(wanted)
            asked = torch.zeros_like(seen)
            asked[picture, around[view]] = True
            picture, view = (asked & ~seen).nonzero().T
            if len(picture):
                seen[picture, view] = True
                self._take(number, picture, view, self.looked(self.defense.model, pairs, picture, view))
        super().ask(wanted)

    def _take(
        self, size: int, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]
    ) -> None:
        """Of what larger masks say what is confident, for all cells within."""
        over, around = best_leads(scores) - self.defense.confident[size], self.larger[size][1]
        numbers = torch.full(self.seen[size].shape, -1, device=picture.device)
        numbers[picture, view] = torch.arange(len(picture), device=picture.device)
        numbers = numbers[:, around].masked_fill(self.known[:, : len(around)], -1)
        owner, cell = (numbers >= 0).nonzero().T
        said = numbers[owner, cell]
        over, rounding = over[said], 2 * self.error[owner]
        for ours, do in (
            (over >= rounding, self.keep),
            ((over >= 0) & (over < rounding), self._fill),
            ((over >= -rounding) & (over < 0), self._doubt),
        ):
            do(owner[ours], cell[ours], scores[said[ours]])

    def keep(self, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        self._fill(picture, view, scores)
        self.known[picture, view] = True

    def _fill(self, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """What cells hold; where they hold something already, what they might hold."""
        taken = self.taken[picture, view]
        self._doubt(picture[taken], view[taken], scores[taken])
        self.write(picture[~taken], view[~taken], scores[~taken])
        self.taken[picture, view] = True

    def _doubt(self, picture: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """What cells might hold."""
        claim, before = predictions(scores[None])[0], self.other[picture, view]
        self.other[picture, view] = torch.where((before == -1) | (before == claim), claim, -2)
        self.other_lead[picture, view] = torch.minimum(self.other_lead[picture, view], best_leads(scores))


def divisions(parts: tuple[int, int]) -> list[tuple[int, int]]:
    """Prime factors of the parts along rows and columns, one pair after another: (4, 2) → [(2, 2), (2, 1)]."""
    found, rest = [], list(parts)
    while rest != [1, 1]:
        factors = [next((f for f in range(2, number + 1) if number % f == 0), 1) for number in rest]
        found.append((factors[0], factors[1]))
        rest = [number // factor for number, factor in zip(rest, factors, strict=True)]
    return found


def nested(sizes: Sequence[Bool[Tensor, "_ H W"]]) -> list[Int64[Tensor, " V"]]:
    """For every pair of the smallest masks the pair of each larger size around it, from the largest to the smallest size.

    What is around one pair is around all pairs within the same pair of the next size: a cell is filled by what is looked at
    for itself, in whatever order cells are asked for.
    """
    found: list[Int64[Tensor, " V"]] = []
    for larger, finer in reversed(list(itertools.pairwise(sizes))):
        table = within(finer, larger)
        found.insert(0, table[found[0]] if found else table)
    return found


def within(finer: Bool[Tensor, "M H W"], larger: Bool[Tensor, "N H W"]) -> Int64[Tensor, " V"]:
    """For every pair of finer masks the pair of larger ones that hides at least as much, both numbered by ``pair_table``."""
    inside = (finer.flatten(1).double() @ (~larger).flatten(1).double().T) == 0
    assert bool(inside.any(1).all())
    of = inside.int().argmax(1)
    one, other = torch.triu_indices(len(finer), len(finer))
    return pair_table(len(larger))[of[one], of[other]]


def _error(tolerance: ev.Tolerance, images: Float[Tensor, "B C H W"]) -> Float64[Tensor, " B"]:
    return tolerance.of(torch.ones(len(images), dtype=torch.float64, device=images.device))  # scores are at most 1
