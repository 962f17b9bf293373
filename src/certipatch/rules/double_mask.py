"""Double masking (PatchCleanser, Xiang et al., USENIX Security 2022): a rule on tables of predictions under masks."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import HUGE, Rule, Verdict, check_evidence, check_relation
from certipatch.views.masks import pair_table

CHUNK_BYTES = 256 * 2**20  # working memory of one step
SUM_ROUNDING = 1e-9  # relative, of a float64 sum in another order


@final
@dataclass(frozen=True)
class DoubleMask(Rule):
    """The answer that survives every second mask.

    Args:
        sure: how far the best class must lead the next, in the mean over the views of a mask, for that mask to win
            against the majority. 0 asks nothing, as the paper. A mask that hides what there is to see answers alike
            under every second mask, too, but seldom surely.
        whole: whether one view more, the last, shows the whole picture. Its prediction then takes the majority's place.

    Evidence is about the picture under every mask and every two of them: V = M(M+1)/2 views, numbered as
    ``views.masks.pair_table`` says. A view predicts its largest entry, on a tie the smaller class; so 0/1 tables of
    predictions are evidence, and so are scores.

    *Rule* (Algorithm 1). Every disagreer with the majority of one-mask predictions (of smallest class on a tie) is looked
    at under every second mask; the first disagreer whose predictions all stay its own, and which is sure, is the answer;
    without one, the majority.

    **Theorem.** If some mask c predicts y alone and together with every second mask, and is sure, and the attacker owns
    none of these views, the answer is y before and after the attack.

    *Proof.* Mask c still predicts y alone and in every pair, as surely. Every disagreer d that predicts another class than y has
    the pair (d, c), which predicts y: it fails. So a disagreer that passes predicts y. If the majority is y, the answer
    is y: without a passing disagreer the majority, with one the y that it predicts. If it is another class, then c is a
    disagreer, and passes.

    Of the majority the proof uses nothing: any class may stand in its place, such as what a network says that sees the whole
    picture, the attacker's patch included. So that network, of which nothing is certified, may be the most accurate one.

    A patch within mask c is hidden in all views of c, so c's views are nobody's. The condition is also necessary, as
    long as less than half of the masks cover the location: if no mask that covers it is so, the attacker makes all
    others predict some z ≠ y alone, which is then the majority, and every pair that he owns; no disagreer passes. With
    ``whole`` it is always: he makes that z, too.

    The margin is the smallest gap between y and another class over the views of c, for the best such c: of integers the
    difference plus 1 − [y > k], so that it is positive exactly where y is predicted. Where ``sure`` is asked for, it is
    at most how far the mean exceeds that. −inf where no mask covers.

    Departs from the paper: its certificate (Algorithm 2) asks the condition of every mask and of every pair; this asks
    it of one mask for each location, which is implied, certifies more where covers overlap, and says where it fails.
    ``whole`` is ours.
    """

    sure: float = 0.0
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sure < math.inf:
            raise ValueError(f"sure is a finite lead of at least 0, not {self.sure}")

    @property
    def theorem(self) -> str:
        surely = f", with a mean lead of {self.sure:g}" if self.sure else ""
        return f"some mask that covers the patch predicts y alone and together with every second mask{surely}"

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        said, table = predictions(evidence), self.table(evidence)
        return double_masking(
            said[:, table], evidence.shape[2], self.is_sure(evidence), said[:, -1] if self.whole else None
        )

    def table(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, "M M"]:
        """``pair_table`` of as many masks as there is evidence about. ValueError where there are no such tables."""
        return pair_table(number_of_masks(evidence.shape[1] - self.whole)).to(evidence.device)

    def is_sure(self, evidence: Shaped[Tensor, "B V K"]) -> Bool[Tensor, "B M"] | None:
        """Which masks lead by ``sure`` in the mean over their views; None where that is not asked for."""
        if not self.sure:
            return None
        return sureness(best_leads(evidence)[:, self.table(evidence)]) >= self.sure

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
            gap = leads(evidence[here], label[here])
            if error is not None:
                gap = gap - 2 * error[here, None].to(gap.device)
            if unsure is not None:
                gap = gap.masked_fill(unsure[here], -torch.inf)
            rows = gap[:, table].amin(2)
            if self.sure:  # of integers the lead itself, without what a tie adds
                lead = best_leads(evidence[here]) - (0 if error is None else 2 * error[here, None].to(gap.device))
                rows = torch.minimum(rows, sureness(lead[:, table]) * (1 - SUM_ROUNDING) - self.sure)
            margins.append(torch.where(covers, rows[:, None], -torch.inf).amax(2))
        return Verdict(label, torch.cat(margins))


def number_of_masks(views: int) -> int:
    """M of V = M(M+1)/2 views. ValueError where V is no such number."""
    masks = (math.isqrt(8 * views + 1) - 1) // 2
    if masks * (masks + 1) // 2 != views:
        raise ValueError(f"double masking has M(M+1)/2 views (1, 3, 6, 10, …), not {views}")
    return masks


def predictions(evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, "B V"]:
    """The class of largest entry of every view; the smaller one on a tie."""
    return (evidence.to(torch.uint8) if evidence.dtype == torch.bool else evidence).argmax(2)


def leads(evidence: Shaped[Tensor, "B V K"], label: Int64[Tensor, " B"]) -> Float64[Tensor, "B V"]:
    """How far the label leads in every view: positive exactly where it is predicted (of reals: and not by a tie)."""
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


def best_leads(evidence: Shaped[Tensor, "*n K"]) -> Float64[Tensor, "*n"]:
    """How far the best class of every view leads the next."""
    values = evidence if evidence.is_floating_point() else evidence.double()
    top = values.topk(2, -1).values.double().clamp(-HUGE, HUGE)
    return top[..., 0] - top[..., 1]


def sureness(rows: Float64[Tensor, "B M M"]) -> Float64[Tensor, "B M"]:
    """The mean lead of every mask over its views: alone, and with every second mask."""
    return (rows / rows.shape[2]).sum(2)


def double_masking(
    table: Int64[Tensor, "B M M"],
    classes: int,
    sure: Bool[Tensor, "B M"] | None = None,
    otherwise: Int64[Tensor, " B"] | None = None,
) -> Int64[Tensor, " B"]:
    """Labels from predictions under every two masks; on the diagonal those under one. Only ``sure`` masks win, and
    ``otherwise``, by default the majority, where none does."""
    alone = table.diagonal(dim1=1, dim2=2)
    if otherwise is None:
        otherwise = torch.nn.functional.one_hot(alone, classes).sum(1).argmax(1)
    passes = (alone != otherwise[:, None]) & (table == alone[:, :, None]).all(2)
    passes &= True if sure is None else sure
    first = passes.int().argmax(1, keepdim=True)
    return torch.where(passes.any(1), alone.gather(1, first)[:, 0], otherwise)
