"""Double masking (PatchCleanser, Xiang et al., USENIX Security 2022): a rule on tables of predictions under masks."""

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import HUGE, Answers, Graph, Rule, Verdict, check_evidence, check_relation
from certipatch.rules.soft import LEAK, leads_of_each
from certipatch.views.masks import pair_table

CHUNK_BYTES = 256 * 2**20  # working memory of one step
SUM_ROUNDING = 1e-9  # relative, of a float64 sum in another order


Fallback = Literal["majority", "unmasked"]
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)


@final
@dataclass(frozen=True)
class DoubleMask(Rule):
    """The prediction that survives every second mask.

    Args:
        min_mean_gap: how far the best class must lead the next, in the mean over the views of a mask, for that mask to win
            against the fallback. 0 asks nothing, as the paper. A mask that hides the object gives one answer under every
            second mask, too, but seldom with a large gap.
        fallback: the label if no mask wins: the ``majority`` of the one-mask predictions, as the paper, or the prediction on
            the ``unmasked`` image, which is one view more, the last.

    Evidence is about the image under every mask and every two of them: V = M(M+1)/2 views, numbered as
    ``views.masks.pair_table`` says. A view predicts its largest entry, on a tie the smaller class; so 0/1 tables of
    predictions are evidence, and so are scores.

    *Rule* (Algorithm 1). A disagreer is a mask whose prediction differs from the fallback. Every disagreer is evaluated under
    every second mask. The first one whose predictions all stay its own, and whose mean gap is large enough, gives the label;
    without one, the fallback does. The majority takes the smallest class on a tie.

    **Theorem.** If some mask c predicts y alone and together with every second mask, with a large enough mean gap, and the
    attacker owns none of these views, the label is y before and after the attack.

    *Proof.* Mask c still predicts y alone and in every pair, by the same gaps. Every disagreer d that predicts another class
    than y has the pair (d, c), which predicts y: it fails. So a disagreer that passes predicts y. If the fallback is y, the
    label is y: without a passing disagreer the fallback, with one the y that it predicts. If it is another class, then c is a
    disagreer, and passes.

    The proof uses nothing of the fallback: any class may be the fallback, such as the prediction of a network on the
    unmasked image, the attacker's patch included. So that network, of which nothing is certified, may be the most accurate
    one.

    A patch within mask c is hidden in all views of c, so the attacker owns none of them. The condition is also necessary, as
    long as less than half of the masks cover the location: if no mask that covers it satisfies the condition, the attacker
    makes all others predict some z ≠ y alone, which is then the majority, and every pair that the attacker owns; no disagreer
    passes. With ``fallback="unmasked"`` it is always necessary, because the attacker also controls the unmasked prediction.

    The margin is the smallest gap between y and another class over the views of c, for the best such c: of integers the
    difference plus 1 − [y > k], so that it is positive exactly where y is predicted. With ``min_mean_gap`` it is at most how
    far the mean exceeds that. −inf where no mask covers.

    Departs from the paper: its certificate (Algorithm 2) asks the condition of every mask and of every pair; this asks
    it of one mask for each location, which is implied, certifies more where covers overlap, and says where it fails.
    ``min_mean_gap`` and the unmasked fallback are ours.
    """

    min_mean_gap: float = 0.0
    fallback: Fallback = "majority"

    def __post_init__(self) -> None:
        if not 0 <= self.min_mean_gap < math.inf:
            raise ValueError(f"min_mean_gap is a finite gap of at least 0, not {self.min_mean_gap}")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback is {' or '.join(FALLBACKS)}, not {self.fallback!r}")

    @property
    def theorem(self) -> str:
        gap = f", with a mean gap of {self.min_mean_gap:g}" if self.min_mean_gap else ""
        return f"some mask that covers the patch predicts y alone and together with every second mask{gap}"

    @property
    def unmasked(self) -> bool:
        """True if the last view shows the unmasked image."""
        return self.fallback == "unmasked"

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        predicted, table = predictions(evidence), self.table(evidence)
        large_enough = None
        if self.min_mean_gap:
            large_enough = self.reaches_min_gap(top2_gap(evidence)[:, table])
        return double_masking(
            predicted[:, table], self.fallback_label(predicted, table, evidence.shape[2]), large_enough
        )

    def table(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, "M M"]:
        """``pair_table`` of as many masks as there is evidence about. ValueError where there are no such tables."""
        return pair_table(number_of_masks(evidence.shape[1] - self.unmasked)).to(evidence.device)

    def fallback_label(
        self, predicted: Int64[Tensor, "B V"], table: Int64[Tensor, "M M"], classes: int
    ) -> Int64[Tensor, " B"]:
        """The label if no mask wins, from the predictions of all views."""
        if self.unmasked:
            return predicted[:, -1]
        alone = predicted[:, table.diagonal()]
        return torch.nn.functional.one_hot(alone, classes).sum(1).argmax(1)

    def reaches_min_gap(self, gaps: Float64[Tensor, "B M M"]) -> Bool[Tensor, "B M"]:
        """True for masks whose mean gap is large enough for them to win."""
        return mean_gap(gaps) >= self.min_mean_gap

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        check_evidence(evidence)
        check_relation(evidence, sees, unsure, error)
        table = self.table(evidence)
        label = self.predict(evidence)
        covers = ~sees.to(evidence.device)[:, table].any(2)  # (L, M)
        margins = [torch.zeros((0, len(sees)), dtype=torch.float64, device=evidence.device)]
        step = max(1, CHUNK_BYTES // (8 * max(3 * evidence[:1].numel(), 2 * covers.numel())))
        for first in range(0, len(evidence), step):
            here = slice(first, first + step)
            gap = label_gap(evidence[here], label[here])
            if error is not None:
                gap = gap - 2 * error[here, None].to(gap.device)
            if unsure is not None:
                gap = gap.masked_fill(unsure[here], -torch.inf)
            rows = gap[:, table].amin(2)
            if self.min_mean_gap:  # of integers the gap itself, without what a tie adds
                top = top2_gap(evidence[here]) - (0 if error is None else 2 * error[here, None].to(gap.device))
                rows = torch.minimum(rows, mean_gap(top[:, table]) * (1 - SUM_ROUNDING) - self.min_mean_gap)
            margins.append(torch.where(covers, rows[:, None], -torch.inf).amax(2))
        return Verdict(label, torch.cat(margins))

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        """From the full table of pairs."""
        each = leads_of_each(evidence)
        table = each[:, self.table(evidence)]
        alone = table.diagonal(dim1=1, dim2=2).movedim(-1, 1)
        return double_mask_leads(alone, table.amax(2), each[:, -1] if self.unmasked else None)

    def graph(self, views: int, classes: int) -> Graph:
        pairs, every = pair_table(number_of_masks(views - self.unmasked)), torch.arange(classes)

        def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
            predicted = values.argmax(2)
            table = predicted[:, pairs]
            alone = table.diagonal(dim1=1, dim2=2)
            majority = (alone[:, :, None] == every).double().sum(1).argmax(1)
            may_win = self.reaches_min_gap(top2_gap(values)[:, pairs]) if self.min_mean_gap else None
            return (double_masking(table, predicted[:, -1] if self.unmasked else majority, may_win),)

        return answer


def number_of_masks(views: int) -> int:
    """M of V = M(M+1)/2 views. ValueError where V is no such number."""
    masks = (math.isqrt(8 * views + 1) - 1) // 2
    if masks * (masks + 1) // 2 != views:
        raise ValueError(f"double masking has M(M+1)/2 views (1, 3, 6, 10, …), not {views}")
    return masks


def predictions(evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, "B V"]:
    """The class of largest entry of every view; the smaller one on a tie."""
    return (evidence.to(torch.uint8) if evidence.dtype == torch.bool else evidence).argmax(2)


def label_gap(evidence: Shaped[Tensor, "B V K"], label: Int64[Tensor, " B"]) -> Float64[Tensor, "B V"]:
    """The gap between the label and the best other class in every view.

    Positive exactly where the label is predicted (of reals: and not by a tie).
    """
    chosen = label[:, None, None].expand(-1, evidence.shape[1], 1)
    if evidence.is_floating_point():
        values = evidence.double().clamp(-HUGE, HUGE)
        return values.gather(2, chosen)[..., 0] - values.scatter(2, chosen, -torch.inf).amax(2)
    values = evidence.long()
    own = values.gather(2, chosen)[..., 0]
    classes = torch.arange(values.shape[2], device=values.device)
    earlier, later = classes < label[:, None], classes > label[:, None]
    gaps = []
    for rivals, tie in ((earlier, 0), (later, 1)):  # a tie goes to the smaller class
        top = values.masked_fill(~rivals[:, None], torch.iinfo(torch.int64).min).amax(2)
        gap = own.double() - top.double()  # the difference of the integers may not fit one
        gap = torch.where(own > top, gap.clamp(min=1), torch.where(own < top, gap.clamp(max=-1), gap)) + tie
        gaps.append(gap.masked_fill(~rivals.any(1, keepdim=True), torch.inf))
    return torch.minimum(*gaps)


def top2_gap(evidence: Shaped[Tensor, "*n K"]) -> Float64[Tensor, "*n"]:
    """The gap between the two best classes of every view."""
    values = evidence if evidence.is_floating_point() else evidence.double()
    top = values.topk(2, -1).values.double().clamp(-HUGE, HUGE)
    return top[..., 0] - top[..., 1]


def mean_gap(gaps: Float64[Tensor, "B M M"]) -> Float64[Tensor, "B M"]:
    """The mean gap of every mask over its views: alone, and with every second mask."""
    return (gaps / gaps.shape[2]).sum(2)


def double_masking(
    table: Int64[Tensor, "B M M"], fallback: Int64[Tensor, " B"], may_win: Bool[Tensor, "B M"] | None = None
) -> Int64[Tensor, " B"]:
    """Labels from predictions under every two masks (on the diagonal under one): of the first disagreer that passes.

    Only masks that ``may_win`` do; without one that passes, the label is the ``fallback``.
    """
    alone = table.diagonal(dim1=1, dim2=2)
    passes = (alone != fallback[:, None]) & (table == alone[:, :, None]).all(2)
    passes &= True if may_win is None else may_win
    first = passes.int().argmax(1, keepdim=True)
    return torch.where(passes.any(1), alone.gather(1, first)[:, 0], fallback)


def double_mask_leads(
    alone: Float[Tensor, "N M K"], paired: Float[Tensor, "N M K"], unmasked: Float[Tensor, "N K"] | None = None
) -> Float[Tensor, "N K"]:
    """Leads under double masking: k has the majority of masks, or the unmasked prediction, and no mask that disagrees passes.

    alone: k's lead under each mask. paired: its largest lead under that mask and a second one; above 0 a disagreer that
    says something else fails. The masks that are hardest to turn count, the weakest links of the attack.
    """
    hardest = torch.maximum(alone, paired).topk(min(3, alone.shape[1]), 1, largest=False).values.mean(1)
    otherwise = alone.median(1).values if unmasked is None else unmasked
    return torch.minimum(otherwise, hardest) + LEAK * alone.mean(1)
