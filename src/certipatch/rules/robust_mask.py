"""Robust masking: the rule of PatchGuard (Xiang et al. 2021), with a certificate that holds."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Rule, Verdict, check_evidence, check_relation, clipped
from certipatch.rules.windows import Windows

EPSILON = torch.finfo(torch.float64).eps
CHUNK_BYTES = 128 * 2**20  # working memory of one step


@final
@dataclass(frozen=True, eq=False)
class RobustMask(Rule):
    """The class of largest sum after each class has lost the window of largest sum, when that stands out.

    Scores are clipped to [0, c]. A class loses its heaviest window when this holds more than T times the class's total;
    T = 1 never masks. ``predict`` looks at what each window leaves over, added up directly: a class scores
    ``min_w out_w`` when that is below ``(1 − T)·total``, else its total. So huge scores of an attacker that lie in a
    window never meet the others in a sum, and rounding cannot carry him past the theorem.

    **Theorem.** At location l the attacker owns A. With v the evidence of y outside A, V = Σ v, t_k = Σ_out e_k, and
    any windows, y stays for every attack when L_y > U_k for every rival k:

        U_k = min( t_k + |A|·c,  min_w r_w / (1 − T) ),   r_w = Σ_{v ∉ w∪A} e_k + |A∖w|·c
        L_y = V − max{ v(w) : m = |w∩A|, v(w) + (1 − T)·m·c ≥ T·V }   over windows with m > 0 or v(w) > 0

    (0·∞ = 0; T = 1: U_k = t_k + |A|·c and L_y = V; c = ∞ and T < 1: every window with m > 0 counts.)

    *Proof.* k scores at most its total, t_k + |A|·c. For any window w: if k loses a window, it keeps at most what w
    leaves, which is at most r_w; if not, its total S obeys out_w ≥ (1 − T)·S, so S ≤ r_w / (1 − T). For y, let the
    attacker add a inside w and a' outside w, and w be masked: y keeps V − v(w) + a' ≥ V − v(w), and w was masked
    only if v(w) + a > T·(V + a + a'), so v(w) + (1 − T)·a > T·V, where a ≤ m·c. L_y is attained.

    The margin is ``min_k L_y − U_k`` less rounding; comparisons with T that rounding could turn fall to the attacker.

    Departs from the paper: every class is masked, as in its defense, but its Algorithms 1 and 2 mask one window chosen
    on the predicted class; an attacker who leaves that class alone makes the defense throw away true evidence.

    Args:
        windows: bool (W, V), or ``Windows`` of boxes or runs, which are much faster.
        threshold: T in [0, 1]; smaller masks more often.
        clip: c > 0, inf for none.
    """

    windows: Windows | Bool[Tensor, "W V"]
    threshold: float = 0.0
    clip: float = math.inf

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], not {self.threshold}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}")
        if isinstance(self.windows, Tensor):
            object.__setattr__(self, "windows", Windows.any_of(self.windows))

    @property
    def theorem(self) -> str:
        return f"L_y > U_k for every rival k and location (robust masking, T = {self.threshold:g}, clip {self.clip:g})"

    @property
    def _windows(self) -> Windows:
        assert isinstance(self.windows, Windows)
        return self.windows

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        self._check(evidence)
        return torch.cat([self._label(part)[0] for part in self._parts(evidence)])

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        self._check(evidence)
        check_relation(evidence, sees, unsure, error)
        labels, margins, first = [], [], 0
        for part in self._parts(evidence, len(sees)):  # at least one, also of no pictures
            label, outside = self._label(part)
            here = slice(first, first + len(part))
            off = torch.zeros(len(part), dtype=torch.float64) if error is None else error[here]
            off = off.to(part.device)
            if unsure is None or not bool(unsure[here].any()):
                margin = self._margin(part, label, outside, sees, off)
            else:  # the attacker of each picture owns other views
                owned = sees | unsure[here, None]
                margin = torch.cat(
                    [
                        self._margin(
                            part[[b]], label[[b]], None if outside is None else outside[[b]], owned[b], off[[b]]
                        )
                        for b in range(len(part))
                    ]
                )
            labels.append(label)
            margins.append(margin)
            first += len(part)
        return Verdict(torch.cat(labels), torch.cat(margins))

    def _check(self, evidence: Tensor) -> None:
        check_evidence(evidence)
        if evidence.shape[1] != self._windows.number_of_views:
            raise ValueError(f"evidence has {evidence.shape[1]} views, the windows {self._windows.number_of_views}")

    def _parts(self, evidence: Tensor, locations: int = 1) -> list[Float64[Tensor, "b V K"]]:
        """Clipped evidence of as many pictures as fit the working memory."""
        _, views, classes = evidence.shape
        each = 8 * (2 * classes * (views + len(self._windows) + locations) + 3 * locations * len(self._windows))
        step = max(1, CHUNK_BYTES // each)
        return [clipped(part, 0.0, self.clip) for part in evidence.split(step)]

    def _label(self, scores: Tensor) -> tuple[Int64[Tensor, " b"], Float64[Tensor, "b W K"] | None]:
        """Labels, and what every window leaves over of every class (None where nothing is ever masked)."""
        total = scores.sum(1)
        if self.threshold == 1:
            return total.argmax(1), None
        outside = self._windows.outside(scores)
        least = outside.amin(1)
        return torch.where(least < (1 - self.threshold) * total, least, total).argmax(1), outside

    def _margin(
        self,
        scores: Float64[Tensor, "b V K"],
        label: Int64[Tensor, " b"],
        outside: Float64[Tensor, "b W K"] | None,
        sees: Bool[Tensor, "L V"],
        error: Float64[Tensor, " b"],
    ) -> Float64[Tensor, "b L"]:
        windows, keep = self._windows, 1 - self.threshold
        found = windows.factor(sees)
        places, row = (Windows.any_of(sees), torch.arange(len(sees))) if found is None else found
        if found is None:  # no products: windows and places become lists
            windows = Windows.any_of(windows.members)
        shared = windows.overlap_sums(places, torch.ones(1, scores.shape[1], dtype=torch.float64))[0]
        size = places.members.sum(1).double()
        slack = 4 * scores.shape[1] * EPSILON
        off = scores.shape[1] * error[:, None]

        own = scores.gather(2, label[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
        beside = places.outside(own[..., None])[..., 0]  # V, (b, places)
        if outside is None:
            lower = beside
        else:
            inside = own @ windows.members.double().T
            held = inside[:, None] - windows.overlap_sums(places, own)  # v(w)
            doubt = slack * own.sum(1) + 2 * off[:, 0]
            reach = torch.where(shared > 0, shared * self.clip, 0.0) * keep
            possible = held + reach >= (self.threshold * beside - doubt[:, None])[..., None]
            possible &= (shared > 0) | (held > -doubt[:, None, None])
            lower = beside - held.clamp_(min=0).mul_(possible).amax(2)
        upper = self._rivals(scores, label, outside, windows, places, shared, size)
        rounding = slack * (2 * scores.sum(1).amax(1)[:, None] + torch.where(upper.isfinite(), upper.abs(), 0))
        rounding += off * (1 + 1 / keep if keep > 0 else 2)
        return (lower - upper - rounding)[:, row]

    def _rivals(
        self,
        scores: Float64[Tensor, "b V K"],
        label: Int64[Tensor, " b"],
        outside: Float64[Tensor, "b W K"] | None,
        windows: Windows,
        places: Windows,
        shared: Float64[Tensor, "P W"],
        size: Float64[Tensor, " P"],
    ) -> Float64[Tensor, "b P"]:
        """The largest U_k of a rival at every place."""
        keep, rivals = (
            1 - self.threshold,
            torch.ones_like(scores[:, 0], dtype=torch.bool).scatter_(1, label[:, None], 0),
        )
        reach = torch.where(size > 0, size * self.clip, 0.0)
        bound = None
        if not math.isinf(self.clip) or bool((size == 0).any()) or outside is None:
            bound = places.outside(scores) + reach[:, None]
        if outside is not None:
            covering = shared == size[:, None]  # windows that hold all of A
            covered = _least(outside, covering) / keep
            bound = covered if bound is None else torch.minimum(bound, covered)
        assert bound is not None
        bound = bound.masked_fill(~rivals[:, None], -torch.inf)
        if outside is None or math.isinf(self.clip):
            return bound.amax(2)
        return self._refined(bound, scores, windows, places, shared, size)

    def _refined(
        self, bound: Tensor, scores: Tensor, windows: Windows, places: Windows, shared: Tensor, size: Tensor
    ) -> Float64[Tensor, "b P"]:
        """The largest exact U_k, with windows that hold only a part of A too, for finite c.

        ``bound`` is at least U_k. Classes are refined in order of it, until no other can exceed what was found.
        """
        order = bound.amax(1).argsort(1, descending=True)
        best = torch.full_like(bound[..., 0], -torch.inf)
        left = torch.arange(len(bound))
        for step in range(bound.shape[2] - 1):
            chosen = order[left, step]
            limit = bound[left].gather(2, chosen[:, None, None].expand(-1, bound.shape[1], 1))[..., 0]
            rival = scores[left].gather(2, chosen[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
            aside = places.outside(rival[..., None])[..., 0]  # t_k
            held = (rival @ windows.members.double().T)[:, None] - windows.overlap_sums(places, rival)
            least = (aside[..., None] - held + (size[:, None] - shared) * self.clip).amin(2) / (1 - self.threshold)
            best[left] = torch.maximum(best[left], torch.minimum(limit, least))
            if step + 2 > bound.shape[2] - 1:
                break
            following = bound[left].gather(
                2, order[left, step + 1 :, None].transpose(1, 2).expand(-1, bound.shape[1], -1)
            )
            left = left[(following.amax(2) > best[left]).any(1)]
            if len(left) == 0:
                break
        return best


def _least(outside: Float64[Tensor, "b W K"], covering: Bool[Tensor, "P W"]) -> Float64[Tensor, "b P K"]:
    """min over the covering windows of each place; inf where there is none."""
    count = covering.sum(1)
    most = int(count.max())
    result = torch.full((len(outside), len(covering), outside.shape[2]), torch.inf, dtype=torch.float64)
    if most == 0:
        return result.to(outside.device)
    if most == 1 and bool((count == 1).all()):
        return outside[:, covering.int().argmax(1)]
    order = covering.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    result = outside[:, order[:, 0]].masked_fill((count == 0)[:, None], torch.inf)
    for n in range(1, most):
        more = outside[:, order[:, n]].masked_fill((count <= n)[:, None], torch.inf)
        result = torch.minimum(result, more)
    return result
