"""Attack detection: an alarm when hiding part of the image gives another answer.

``MaskedDetection`` hides windows of evidence (PatchGuard++, Xiang & Mittal 2021), ``MinorityReports`` parts of the image.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Answers, Graph, Rule, Verdict, check_evidence, check_relation, clipped
from certipatch.rules.soft import LEAK, lead_of, leads_of_each
from certipatch.rules.windows import ProductWindows, Windows

EPSILON = torch.finfo(torch.float64).eps
CHUNK_BYTES = 128 * 2**20  # working memory of one step


@final
@dataclass(frozen=True, eq=False)
class MaskedDetection(Rule):
    """ŷ = class of largest mean logit; an alarm when without some window another class has a softmax score above τ.

    **Theorem.** On the clean image ŷ = y raises no alarm, and some window that holds all of A leaves evidence that
    says y with a score above τ. Then after any attack at l the answer is y, or an alarm is raised.

    *Proof.* What that window leaves over is not the attacker's: without it the answer is still y with a score above τ.
    If the attacked image's own answer is another class, that is a masked answer that differs from it: an alarm.

    The margin is the largest such score, less τ and rounding; −inf where the image raises an alarm as it is.

    Args:
        windows: bool (W, V), or ``Windows`` of boxes or runs, or ``ProductWindows``.
        threshold: τ in [0, 1).
    """

    windows: Windows | ProductWindows | Bool[Tensor, "W V"]
    threshold: float = 0.5

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), not {self.threshold}")
        if isinstance(self.windows, Tensor):
            object.__setattr__(self, "windows", Windows.from_masks(self.windows))

    @property
    def _windows(self) -> Any:  # Windows or ProductWindows, whose locations are of their own kind
        assert not isinstance(self.windows, Tensor)
        return self.windows

    @property
    def theorem(self) -> str:
        return f"no alarm, and a window that holds all of A leaves y a score > {self.threshold:g}"

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        return clipped(evidence, -torch.inf, torch.inf).sum(1).argmax(1)

    def alarm(self, evidence: Shaped[Tensor, "B V K"]) -> Bool[Tensor, " B"]:
        """Images that raise an alarm."""
        everything = torch.zeros((1, evidence.shape[1]), dtype=torch.bool, device=evidence.device)
        alarms = self.certify(evidence, everything).alarm
        assert alarms is not None
        return alarms

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        label = self.predict(evidence)
        _check_scores(evidence, sees, unsure, error)
        windows = self._windows
        if evidence.shape[1] != windows.number_of_views:
            raise ValueError(f"evidence has {evidence.shape[1]} views, the windows {windows.number_of_views}")
        covering = sees.float() @ (~windows.members).to(sees.device).float().T == 0  # (L, W): no view beyond the window
        left = (~windows.members).sum(1).double().to(evidence.device)  # views that each window leaves over
        device = evidence.device
        off = torch.zeros(len(evidence), dtype=torch.float64, device=device) if error is None else error
        step = max(1, CHUNK_BYTES // (32 * len(windows) * evidence.shape[2]))
        alarms = [torch.zeros(0, dtype=torch.bool, device=device)]
        margins = [torch.zeros((0, len(sees)), dtype=torch.float64, device=device)]
        for first in range(0, len(evidence), step):
            here = slice(first, first + step)
            scores = clipped(evidence[here], -torch.inf, torch.inf)
            means = windows.outside(scores) / left.clamp(min=1)[:, None]
            confidence = means.softmax(2).masked_fill(left[:, None] == 0, 0.0)  # nothing left over says nothing
            rounding = 8 * evidence.shape[1] * EPSILON * (1 + scores.abs().amax((1, 2))) + 2 * off[here].to(
                scores.device
            )
            top = scores.sum(1).topk(2, 1).values  # an answer that rounding could turn is not certified
            sure = top[:, 0] - top[:, 1] > evidence.shape[1] * rounding
            alarm, margin = detection_margins(confidence, label[here], covering, self.threshold, rounding, sure)
            alarms.append(alarm)
            margins.append(margin)
        return Verdict(label, torch.cat(margins), torch.cat(alarms))

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        """The answer without an alarm, under every window."""
        windows = self._windows
        kept = (~windows.members).sum(1).to(evidence.device)
        means = (windows.outside(evidence) / kept.clamp(min=1)[:, None])[:, kept > 0]
        slope = LEAK * (lead_of(evidence.mean(1)) + leads_of_each(means).amin(1))
        return unseen(evidence.mean(1).softmax(1), means.softmax(2), self.threshold) + slope.clamp(max=0)

    def graph(self, views: int, classes: int) -> Graph:
        others = (~self._windows.members).double()
        left = others.sum(1)

        def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
            scores = clipped(values, -torch.inf, torch.inf)
            label = scores.sum(1).argmax(1)
            confidence = ((others @ scores) / left.clamp(min=1)[:, None]).softmax(2)
            confidence = torch.where(left[:, None] == 0, 0.0, confidence)
            rounding = 8 * values.shape[1] * EPSILON * (1 + scores.abs().amax((1, 2)))
            if error is not None:
                rounding = rounding + 2 * error
            return label, _alarm(confidence, label, self.threshold, rounding)

        return answer


@final
@dataclass(frozen=True)
class MinorityReports(Rule):
    """ŷ = answer to the whole image, view 0; an alarm where under some mask, views 1 to M, another class scores
    above τ, and no less than ŷ.

    **Theorem.** On the clean image ŷ = y raises no alarm, and some mask that covers the patch leaves an image that says
    y with a score above τ. Then after any attack at l the answer is y, or an alarm is raised.

    *Proof.* Under that mask the attacked image is the clean one: it still says y with a score above τ. If the attacked
    image's own answer is another class, that is a masked answer that differs from it: an alarm.

    The margin is the largest such score, less τ and ``error``; −inf where no mask covers, and where the image raises an
    alarm as it is. A comparison that ``error`` could turn raises an alarm, and certifies nothing.

    Source: McCoyd et al., Minority Reports Defense, 2020. Departs from it: masks cover every location by construction, also
    at borders and corners, where the paper's grid of predictions has fewer; the answer is that to the whole image.

    Args:
        threshold: τ in [0, 1), in the unit of the evidence (B, 1 + M, K): softmax scores.
    """

    threshold: float = 0.5

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), not {self.threshold}")

    @property
    def theorem(self) -> str:
        return f"no alarm, and a mask that covers the patch leaves y a score > {self.threshold:g}"

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        return clipped(evidence[:, 0], -torch.inf, torch.inf).argmax(1)

    def alarm(self, evidence: Shaped[Tensor, "B V K"]) -> Bool[Tensor, " B"]:
        """Images that raise an alarm."""
        alarms = self.certify(evidence, torch.ones((1, evidence.shape[1]), dtype=torch.bool)).alarm
        assert alarms is not None
        return alarms

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        label = self.predict(evidence)
        _check_scores(evidence, sees, unsure, error)
        if evidence.shape[1] < 2:
            raise ValueError("detection needs the whole picture and at least one masked one")
        scores = clipped(evidence, -torch.inf, torch.inf)
        rounding = scores.new_zeros(len(scores)) if error is None else 2 * error.to(scores.device)
        top = scores[:, 0].topk(2, 1).values
        sure = (top[:, 0] - top[:, 1] > rounding) | (error is None)  # nothing turns an exact answer, not even a tie
        covering = ~sees[:, 1:].to(scores.device)
        alarm, margin = detection_margins(scores[:, 1:], label, covering, self.threshold, rounding, sure)
        return Verdict(label, margin, alarm)

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        """The answer to the whole image without an alarm, under every mask."""
        slope = LEAK * lead_of((evidence[:, 0] + 1e-30).log())  # scores saturate, their logarithms do not
        return unseen(evidence[:, 0], evidence[:, 1:], self.threshold) + slope.clamp(max=0)

    def graph(self, views: int, classes: int) -> Graph:
        def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
            scores = clipped(values, -torch.inf, torch.inf)
            label = scores[:, 0].argmax(1)
            rounding = torch.zeros_like(scores[:, 0, 0]) if error is None else 2 * error
            return label, _alarm(scores[:, 1:], label, self.threshold, rounding)

        return answer


def detection_margins(
    scores: Float64[Tensor, "B W K"],
    label: Int64[Tensor, " B"],
    covering: Bool[Tensor, "L W"],
    threshold: float,
    rounding: Float64[Tensor, " B"],
    sure: Bool[Tensor, " B"],
) -> tuple[Bool[Tensor, " B"], Float64[Tensor, "B L"]]:
    """Alarms, and margins, from the scores of every masked answer; a score of 0 for all classes says nothing.

    Args:
        scores: of K classes under W masks.
        label: the answer to the whole.
        covering: masks that hide all that an attacker at l can change.
        threshold: τ; a masked answer counts above it.
        rounding: how far differences of scores may be off.
        sure: images whose answer to the whole rounding cannot turn.
    """
    chosen = label[:, None, None].expand(-1, scores.shape[1], 1)
    own, others = scores.gather(2, chosen)[..., 0], scores.scatter(2, chosen, -torch.inf).amax(2)
    silent = (scores == 0).all(2)
    off = rounding[:, None]
    alarm = ((others > threshold - off) & (others >= own - off) & ~silent).any(1)
    says = torch.where((own > others + off) & ~silent, own, -torch.inf)
    best = torch.full((len(scores), len(covering)), -torch.inf, dtype=torch.float64, device=scores.device)
    for w in range(scores.shape[1]):
        best = torch.where(covering[:, w], torch.maximum(best, says[:, w, None]), best)
    return alarm, torch.where((sure & ~alarm)[:, None], best - threshold - off, -torch.inf)


def _check_scores(
    evidence: Shaped[Tensor, "B V K"],
    sees: Bool[Tensor, "L V"],
    unsure: Bool[Tensor, "B V"] | None,
    error: Float64[Tensor, " B"] | None,
) -> None:
    """ValueError unless ``sees`` and ``error`` fit the evidence, and no view is unsure."""
    check_relation(evidence, sees, unsure, error)
    if unsure is not None and bool(unsure.any()):
        raise ValueError("detection reads scores, which have an error instead of unsure views")


def unseen(whole: Float[Tensor, "N K"], masked: Float[Tensor, "N W K"], threshold: float) -> Float[Tensor, "N K"]:
    """Leads as an answer that no masked one contradicts: under every mask class k leads, or nothing else scores above τ.

    The hardest masks of each class count, the weakest links of the attack.
    """
    ahead = leads_of_each(masked)
    others = masked - ahead
    hardest = torch.maximum(ahead, threshold - others).topk(min(3, masked.shape[1]), 1, largest=False).values
    return torch.minimum(lead_of(whole), hardest.mean(1))


def _alarm(
    scores: Float64[Tensor, "B W K"], label: Tensor, threshold: float, rounding: Float64[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """``detection_margins``'s alarm as a graph."""
    chosen = label[:, None, None].expand(-1, scores.shape[1], 1)
    own, others = scores.gather(2, chosen)[..., 0], scores.scatter(2, chosen, -torch.inf).amax(2)
    off = rounding[:, None]
    return ((others > threshold - off) & (others >= own - off) & (scores != 0).any(2)).any(1)
