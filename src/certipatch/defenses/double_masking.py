"""The predictions of double masking, computed on demand: first round, second round, and the pairs that a certificate needs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence
from certipatch.errors import InputError
from certipatch.rules import DoubleMask
from certipatch.rules.double_mask import mean_gap, predictions, top2_gap
from certipatch.views import MaskPairs
from certipatch.views.masks import pair_table
from certipatch.views.render import image_size


class PredictionTable:
    """Predictions for B images under every mask and every two masks, each computed when it is first needed.

    The predictions for an image do not depend on the other images, apart from rounding.

    Args:
        rule: double masking.
        views: the pairs of masks; with the unmasked image if the rule's fallback is its prediction.
        network: predicts from images behind masks.
        images: or feature maps, if the masks hide cells of those.
        error: how far a score of each image may be off.
        batch_size: masked images per forward pass.
    """

    def __init__(
        self,
        rule: DoubleMask,
        views: MaskPairs,
        network: nn.Module,
        images: Float[Tensor, "B C H W"],
        error: Float64[Tensor, " B"],
        batch_size: int | None = None,
    ):
        self.rule, self.views, self.network, self.images = rule, views, network, images
        self.error, self.batch_size = error, batch_size
        self.size, device = image_size(images), images.device
        self.pairs = pair_table(len(views.masks)).to(device)
        self.known = torch.zeros((len(images), views.number(self.size)), dtype=torch.bool, device=device)
        self.unstable = torch.zeros_like(self.known)
        """Cells whose value may depend on rounding: the attacker may own them."""
        self.scores: Float[Tensor, "B V K"] = torch.zeros(0)
        self.predicted = torch.zeros(self.known.shape, dtype=torch.int64, device=device)
        self.gaps = torch.zeros(self.known.shape, dtype=torch.float64, device=device)
        self.passes = torch.zeros(len(images), dtype=torch.int64, device=device)

    def evidence(self) -> Evidence:
        """The scores, with the views that are unknown or unstable for the attacker's."""
        return Evidence(self.scores, ~self.known | self.unstable, self.size, self.error, passes=self.passes)

    def predict_unmasked(self, network: nn.Module) -> None:
        """Predict from the unmasked image, if the rule has use for it; ``network`` may be another one."""
        if self.rule.unmasked:
            image = torch.arange(len(self.images), device=self.images.device)
            view = torch.full_like(image, self.known.shape[1] - 1)
            self.record(image, view, self.predict_views(network, self.views, image, view))

    def first_round(self) -> None:
        """Predict under every mask alone."""
        wanted = torch.zeros_like(self.known)
        wanted[:, self.pairs.diagonal()] = True
        self.ensure_predicted(wanted)

    def second_round(self) -> None:
        """Predict under every disagreer and second masks, likely failures first, until a pair fails the disagreer."""
        alone, gap = self.predicted[:, self.pairs.diagonal()], self.gaps[:, self.pairs.diagonal()]
        fallback = self.rule.fallback_label(self.predicted, self.pairs, self.scores.shape[2])
        passing = alone != fallback[:, None]
        differs = alone[:, :, None] != alone[:, None]  # second masks that predict another class alone, large gaps first
        order = (differs * (1 + gap)[:, None]).argsort(dim=2, descending=True, stable=True)
        start, step = 0, 1
        while start < len(self.pairs) and bool(passing.any()):
            image, mask = passing.nonzero().T
            views = self.pairs[mask[:, None], order[image, mask, start : start + step]]
            wanted = torch.zeros_like(self.known)
            wanted[image[:, None], views] = True
            self.ensure_predicted(wanted)
            passing[image, mask] = (self.predicted[image[:, None], views] == alone[image, mask][:, None]).all(1)
            start, step = start + step, 2 * step

    def certify_pairs(self, covers: Bool[Tensor, "L M"] | None) -> None:
        """Predict under the pairs of all masks that may certify the label, weakest first.

        With ``covers``, the masks that cover each location, only until the verdict on all locations is known.
        """
        label = self.rule.predict(self.scores)[:, None]
        first, second = torch.triu_indices(len(self.pairs), len(self.pairs)).to(self.images.device)
        alone = torch.where(self.predicted == label, self.gaps, -self.gaps)[:, self.pairs.diagonal()]
        weakness, step, known = alone[:, first] + alone[:, second], 4, self.known[:, : len(first)]
        while True:
            holds = self.unrefuted(label)
            wanted = (holds[:, first] | holds[:, second]) & ~known
            if covers is not None:
                proven = holds & self.known[:, self.pairs].all(2)
                lost = ~(covers & holds[:, None]).any(2).all(1)
                won = (covers & proven[:, None]).any(2).all(1)
                wanted &= ~(lost | won)[:, None]
            if not bool(wanted.any()):
                return
            now = weakness.masked_fill(~wanted, torch.inf).topk(min(step, wanted.shape[1]), 1, largest=False).indices
            self.ensure_predicted(torch.zeros_like(wanted).scatter(1, now, True) & wanted)
            step *= 2

    def unrefuted(self, label: Int64[Tensor, "B 1"]) -> Bool[Tensor, "B M"]:
        """Masks that certify the label as far as their views are known."""
        gaps = self.gap_lower_bounds()
        agrees = (self.predicted == label) & (gaps > 0)
        holds = (agrees | ~(self.known | self.unstable))[:, self.pairs].all(2)
        if self.rule.min_mean_gap:
            possible = gaps.masked_fill(~self.known, 1.0)  # a gap is at most 1
            holds &= mean_gap(possible[:, self.pairs]) > self.rule.min_mean_gap
        return holds

    def gap_lower_bounds(self) -> Float64[Tensor, "B V"]:
        """The gap that each known prediction has at least, whatever the rounding."""
        return (self.gaps - 2 * self.error[:, None]).masked_fill(self.unstable, -torch.inf)

    def ensure_predicted(self, wanted: Bool[Tensor, "B v"]) -> None:
        """Predict the wanted views that are not known yet, in full batches."""
        image, view = self.pending(wanted)
        if len(image):
            self.record(image, view, self.predict_views(self.network, self.views, image, view))

    def pending(self, wanted: Bool[Tensor, "B v"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """Images and their views, of the first v, that are wanted and not known yet."""
        image, view = (wanted & ~self.known[:, : wanted.shape[1]]).nonzero().T
        return image, view

    def predict_views(
        self, network: nn.Module, views: MaskPairs, image: Int64[Tensor, " n"], view: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n K"]:
        """The scores of some images under pairs of masks, counted as passes."""
        logits = ev.logits_of(network, views, self.images, image, view.cpu(), self.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        self.passes += image.bincount(minlength=len(self.passes))
        return ev.scores(logits)

    def record(self, image: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """Write down scores that are known from now on."""
        self.write(image, view, scores)
        self.known[image, view] = True

    def write(self, image: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        """Put scores into the table."""
        if len(self.scores) == 0:
            self.scores = torch.zeros((*self.known.shape, scores.shape[1]), dtype=scores.dtype, device=scores.device)
        if self.scores.shape[2] != scores.shape[1]:
            numbers = self.scores.shape[2], scores.shape[1]
            raise InputError(
                f"the model answers whole pictures with {numbers[0]} classes, masked ones with {numbers[1]}"
            )
        self.scores[image, view] = scores.to(self.scores.dtype)
        self.predicted[image, view], self.gaps[image, view] = predictions(scores[None])[0], top2_gap(scores)


class LargerMasks(NamedTuple):
    """Masks of one of the larger sizes."""

    pairs: MaskPairs
    enclosing: Int64[Tensor, " V"]
    """For every pair of the smallest masks, the pair of these that hides at least as much."""
    exit_gap: float
    """The gap from which a prediction under two of these stands for every pair that they enclose."""


class MultiScaleTable(PredictionTable):
    """A prediction table for masks of several sizes: smaller masks are used only where the gap under larger ones is small.

    A cell, which is a pair of the smallest masks, takes its value from the largest pair around it whose gap reaches
    ``exit_gap``, else from its own pair (``merge_sizes``). Enclosure is nested: two cells within the same pair of one size
    are within the same pairs of all larger sizes. So a cell's value does not depend on the order of queries.

    *Soundness.* Two computations of the same masked image differ by at most ``error`` in a score, hence by 2·error in a gap. A
    cell's candidates are all values that it takes if gaps within 2·error of their exit gap fall on either side. ``gaps`` are
    the least of the candidates'; cells whose candidates differ in class are ``unstable``, and the attacker owns them. Let mask c
    certify the label y: it hides the patch, and none of its cells is unstable. Every pair that is compared for a cell of c hides
    all that the cell's own pair hides, the patch included. So the clean and the attacked image look alike behind it, and the
    attacked image gives each cell of c the value of a candidate of the clean one, off by ``error``. ``DoubleMask`` asks the
    gaps and the mean gap of c to exceed 2·error, so c satisfies the condition of the theorem with the values of either image.
    The theorem says that both labels are y. It allows any values in all cells outside of c. Labels are those of the values
    that the table holds, ``Evidence.values`` those with the least gaps.

    Args:
        larger: the masks of all sizes but the smallest, the largest first.
    """

    def __init__(
        self,
        rule: DoubleMask,
        views: MaskPairs,
        network: nn.Module,
        images: Float[Tensor, "B C H W"],
        error: Float64[Tensor, " B"],
        batch_size: int | None,
        larger: Sequence[LargerMasks],
    ):
        super().__init__(rule, views, network, images, error, batch_size)
        self.larger = [masks._replace(enclosing=masks.enclosing.to(images.device)) for masks in larger]
        self.evaluated = [torch.zeros_like(self.known[:, : masks.pairs.number(self.size)]) for masks in larger]
        self.held = torch.zeros_like(self.known)
        self.gaps.fill_(torch.inf)

    def evidence(self) -> Evidence:
        evidence = super().evidence()
        held = top2_gap(self.scores)
        weaker, proven = self.known & ~self.unstable & (self.gaps < held), self.gap_lower_bounds() > 0
        if not bool(weaker.any()):
            return evidence
        assert evidence.unsure is not None
        unsure, weaker = evidence.unsure | (weaker & ~proven), weaker & proven
        share = (self.gaps[weaker] / held[weaker])[:, None]  # of the scores, the rest spread evenly
        values = self.scores.clone()
        values[weaker] = (share * values[weaker] + (1 - share) / values.shape[2]).to(values.dtype)
        labels = self.rule.predict(self.scores) if self.rule.min_mean_gap else None  # else classes alone decide
        return replace(evidence, values=values, unsure=unsure, labels=labels)

    def ensure_predicted(self, wanted: Bool[Tensor, "B v"]) -> None:
        for masks, evaluated in zip(self.larger, self.evaluated, strict=True):
            image, view = self.pending(wanted)
            needed = torch.zeros_like(evaluated)
            needed[image, masks.enclosing[view]] = True
            image, pair = (needed & ~evaluated).nonzero().T
            if len(image):
                evaluated[image, pair] = True
                self._fill(masks, image, pair, self.predict_views(self.network, masks.pairs, image, pair))
        super().ensure_predicted(wanted)

    def _fill(
        self, masks: LargerMasks, image: Int64[Tensor, " n"], pair: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]
    ) -> None:
        """Copy each prediction whose gap reaches the exit gap to every cell within."""
        pairs = masks.pairs.number(self.size)
        number = torch.full((len(self.images), pairs), -1, device=image.device)
        number[image, pair] = torch.arange(len(image), device=image.device)
        number = number[:, masks.enclosing].masked_fill(self.known[:, : len(masks.enclosing)], -1)
        owner, cell = (number >= 0).nonzero().T
        source, rounding = number[owner, cell], 2 * self.error[owner]
        excess = (top2_gap(scores) - masks.exit_gap)[source]
        candidate, settled = excess >= -rounding, excess > rounding
        self._consider(owner[candidate], cell[candidate], scores[source[candidate]], excess[candidate] >= 0)
        self.known[owner[settled], cell[settled]] = True

    def record(self, image: Int64[Tensor, " n"], view: Int64[Tensor, " n"], scores: Float[Tensor, "n K"]) -> None:
        self._consider(image, view, scores, torch.ones_like(image, dtype=torch.bool))
        self.known[image, view] = True

    def _consider(
        self,
        image: Int64[Tensor, " n"],
        view: Int64[Tensor, " n"],
        scores: Float[Tensor, "n K"],
        exits: Bool[Tensor, " n"],
    ) -> None:
        """Note candidates of cells, each of which holds the first that exits."""
        predicted, gap = predictions(scores[None])[0], top2_gap(scores)
        held, before, least = self.held[image, view], self.predicted[image, view], self.gaps[image, view]
        first = exits & ~held
        self.write(image[first], view[first], scores[first])
        self.held[image, view] = held | exits
        self.predicted[image, view] = torch.where(held, before, predicted)
        self.gaps[image, view] = torch.minimum(least, gap)
        self.unstable[image, view] |= least.isfinite() & (before != predicted)


def merge_sizes(
    smallest: Float[Tensor, "B V K"], larger: Sequence[tuple[Float[Tensor, "B v K"], LargerMasks]]
) -> Float[Tensor, "B V K"]:
    """The table of ``MultiScaleTable`` from the scores of all pairs of all sizes, the largest first."""
    table = smallest
    for scores, masks in reversed(larger):
        enclosing = scores[:, masks.enclosing]
        table = torch.where((top2_gap(enclosing) >= masks.exit_gap)[..., None], enclosing, table)
    return table


def score_error(tolerance: ev.Tolerance, images: Float[Tensor, "B ..."]) -> Float64[Tensor, " B"]:
    """Bound the numerical error of a score of each image; scores are at most 1."""
    return tolerance.of(torch.ones(len(images), dtype=torch.float64, device=images.device))
