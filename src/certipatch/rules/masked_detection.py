"""Attack detection: an alarm when hiding some window of evidence gives another answer (PatchGuard++, Xiang & Mittal 2021)."""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Rule, Verdict, check_evidence, check_relation, clipped
from certipatch.rules.windows import JointWindows, Windows

EPSILON = torch.finfo(torch.float64).eps
CHUNK_BYTES = 128 * 2**20  # working memory of one step


@final
@dataclass(frozen=True, eq=False)
class MaskedDetection(Rule):
    """ŷ = class of largest mean logit; an alarm when without some window another class has a softmax score above τ.

    **Theorem.** On the clean picture ŷ = y raises no alarm, and some window that holds all of A leaves evidence that
    says y with a score above τ. Then after any attack at l the answer is y, or an alarm is raised.

    *Proof.* What that window leaves over is not the attacker's: without it the answer is still y with a score above τ.
    If the attacked picture's own answer is another class, that is a masked answer that differs from it: an alarm.

    The margin is the largest such score, less τ and rounding; −inf where the picture raises an alarm as it is.

    Args:
        windows: bool (W, V), or ``Windows`` of boxes or runs, or ``JointWindows``.
        threshold: τ in [0, 1).
    """

    windows: Windows | JointWindows | Bool[Tensor, "W V"]
    threshold: float = 0.5

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), not {self.threshold}")
        if isinstance(self.windows, Tensor):
            object.__setattr__(self, "windows", Windows.any_of(self.windows))

    @property
    def _windows(self) -> Any:  # Windows or JointWindows, whose places are of their own kind
        assert not isinstance(self.windows, Tensor)
        return self.windows

    @property
    def theorem(self) -> str:
        return f"no alarm, and a window that holds all of A leaves y a score > {self.threshold:g}"

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        return clipped(evidence, -torch.inf, torch.inf).sum(1).argmax(1)

    def alarm(self, evidence: Shaped[Tensor, "B V K"]) -> Bool[Tensor, " B"]:
        """Pictures that raise an alarm."""
        everything = torch.zeros((1, evidence.shape[1]), dtype=torch.bool, device=evidence.device)
        found = self.certify(evidence, everything).alarm
        assert found is not None
        return found

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        label = self.predict(evidence)
        check_relation(evidence, sees, unsure, error)
        if unsure is not None and bool(unsure.any()):
            raise ValueError("detection reads scores, which have an error instead of unsure views")
        windows = self._windows
        if evidence.shape[1] != windows.number_of_views:
            raise ValueError(f"evidence has {evidence.shape[1]} views, the windows {windows.number_of_views}")
        covering = (sees[:, None] <= windows.members.to(sees.device)).all(2)  # (L, W)
        left = (~windows.members).sum(1).double().to(evidence.device)  # views that each window leaves over
        off = torch.zeros(len(evidence), dtype=torch.float64) if error is None else error
        step = max(1, CHUNK_BYTES // (32 * len(windows) * evidence.shape[2]))
        alarms, margins = [torch.zeros(0, dtype=torch.bool)], [torch.zeros((0, len(sees)), dtype=torch.float64)]
        for first in range(0, len(evidence), step):
            here = slice(first, first + step)
            scores = clipped(evidence[here], -torch.inf, torch.inf)
            means = windows.outside(scores) / left.clamp(min=1)[:, None]
            confidence = means.softmax(2)
            rounding = 8 * evidence.shape[1] * EPSILON * (1 + scores.abs().amax((1, 2))) + 2 * off[here].to(
                scores.device
            )
            own = confidence.gather(2, label[here, None, None].expand(-1, len(windows), 1))[..., 0]
            others = confidence.scatter(2, label[here, None, None].expand(-1, len(windows), 1), -1.0).amax(2)
            empty = left == 0
            alarm = ((others > self.threshold - rounding[:, None]) & (others >= own - rounding[:, None]) & ~empty).any(
                1
            )
            says = torch.where((own > others + rounding[:, None]) & ~empty, own, -torch.inf)
            best = torch.full((len(scores), len(sees)), -torch.inf, dtype=torch.float64, device=scores.device)
            for w in range(len(windows)):
                best = torch.where(covering[:, w], torch.maximum(best, says[:, w, None]), best)
            total = scores.sum(1)
            top = total.topk(2, 1).values  # an answer that rounding could turn is not certified
            safe = ~alarm & (top[:, 0] - top[:, 1] > evidence.shape[1] * rounding)
            margin = best - self.threshold - rounding[:, None]
            alarms.append(alarm)
            margins.append(torch.where(safe[:, None], margin, -torch.inf))
        return Verdict(label, torch.cat(margins), torch.cat(alarms))
