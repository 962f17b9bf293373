"""Rules as graphs: evidence → label, in operations that do not depend on the data.

Each is what ``predict`` of the rule says, written for a graph: without checks, and with sums over windows as one product.
Sums are in float64 there too, so that another order of them changes nothing but ties of reals.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor

from certipatch.errors import InputError
from certipatch.rules import (
    ClippedSum,
    DoubleMask,
    JointWindows,
    MaskedDetection,
    Median,
    MinorityReports,
    RobustMask,
    Rule,
    TrimmedMean,
    Vote,
    Windows,
)
from certipatch.rules.base import clipped
from certipatch.rules.double_mask import double_masking, number_of_masks, top2_gap
from certipatch.rules.masked_detection import EPSILON
from certipatch.views.masks import pair_table

Answers = tuple[Tensor, ...]
"""The label (B,), and of a defense that detects the alarm (B,)."""
Graph = Callable[[Tensor, "Tensor | None"], Answers]
"""Evidence (B, V, K), and how far its scores may be off (B,) → answers."""


def graph(rule: Rule, views: int, classes: int) -> Graph:
    """How ``rule`` answers, with its windows and tables as constants. InputError on a rule that is not known."""
    if isinstance(rule, Vote):
        return lambda values, _: (values.double().sum(1).argmax(1),)
    if isinstance(rule, ClippedSum):
        return lambda values, _: (clipped(values, rule.lo, rule.hi).sum(1).argmax(1),)
    if isinstance(rule, Median | TrimmedMean):
        kept = slice(rule.trimmed(views), views - rule.trimmed(views))
        return lambda values, _: (clipped(values, rule.lo, rule.hi).sort(1).values[:, kept].mean(1).argmax(1),)
    if isinstance(rule, RobustMask):
        return _robust_mask(rule)
    if isinstance(rule, DoubleMask):
        return _double_mask(rule, views, classes)
    if isinstance(rule, MaskedDetection):
        return _masked_detection(rule)
    if isinstance(rule, MinorityReports):
        return _minority_reports(rule)
    raise InputError(f"export: the rule {type(rule).__name__} has no graph")


def _robust_mask(rule: RobustMask) -> Graph:
    assert not isinstance(rule.windows, Tensor)
    least_outside, keep = _least(rule.windows), 1 - rule.threshold

    def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
        scores = clipped(values, 0.0, rule.clip)
        total = scores.sum(1)
        if rule.threshold == 1:
            return (total.argmax(1),)
        least = least_outside(scores)
        return (torch.where(least < keep * total, least, total).argmax(1),)

    return answer


def _least(windows: Windows | JointWindows) -> Callable[[Float64[Tensor, "B V K"]], Float64[Tensor, "B K"]]:
    """The least that a window leaves over. Of pairs it is the least of the one family and the least of the other."""
    if isinstance(windows, JointWindows):
        first, second, split = _least(windows.first), _least(windows.second), windows.first.number_of_views
        return lambda scores: first(scores[:, :split]) + second(scores[:, split:])
    others = (~windows.members).double()
    return lambda scores: (others @ scores).amin(1)


def _double_mask(rule: DoubleMask, views: int, classes: int) -> Graph:
    pairs, every = pair_table(number_of_masks(views - rule.unmasked)), torch.arange(classes)

    def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
        predicted = values.argmax(2)
        table = predicted[:, pairs]
        alone = table.diagonal(dim1=1, dim2=2)
        majority = (alone[:, :, None] == every).double().sum(1).argmax(1)
        may_win = rule.reaches_min_gap(top2_gap(values)[:, pairs]) if rule.min_mean_gap else None
        return (double_masking(table, predicted[:, -1] if rule.unmasked else majority, may_win),)

    return answer


def _masked_detection(rule: MaskedDetection) -> Graph:
    assert not isinstance(rule.windows, Tensor)
    others = (~rule.windows.members).double()
    left = others.sum(1)

    def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
        scores = clipped(values, -torch.inf, torch.inf)
        label = scores.sum(1).argmax(1)
        confidence = ((others @ scores) / left.clamp(min=1)[:, None]).softmax(2)
        confidence = torch.where(left[:, None] == 0, 0.0, confidence)
        rounding = 8 * values.shape[1] * EPSILON * (1 + scores.abs().amax((1, 2)))
        if error is not None:
            rounding = rounding + 2 * error
        return label, _alarm(confidence, label, rule.threshold, rounding)

    return answer


def _minority_reports(rule: MinorityReports) -> Graph:
    def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
        scores = clipped(values, -torch.inf, torch.inf)
        label = scores[:, 0].argmax(1)
        rounding = torch.zeros_like(scores[:, 0, 0]) if error is None else 2 * error
        return label, _alarm(scores[:, 1:], label, rule.threshold, rounding)

    return answer


def _alarm(
    scores: Float64[Tensor, "B W K"], label: Tensor, threshold: float, rounding: Float64[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Whether a masked answer dissents; scores of 0 for all classes say nothing. See ``masked_detection.dissent``."""
    chosen = label[:, None, None].expand(-1, scores.shape[1], 1)
    own, others = scores.gather(2, chosen)[..., 0], scores.scatter(2, chosen, -torch.inf).amax(2)
    off = rounding[:, None]
    return ((others > threshold - off) & (others >= own - off) & (scores != 0).any(2)).any(1)
