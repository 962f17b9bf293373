"""Robust masking: the rule of PatchGuard (Xiang et al. 2021), with a certificate that holds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Answers, Graph, Rule, Verdict, check_numbers, check_relation, check_shape, clipped
from certipatch.rules.soft import lead_of, leaky
from certipatch.rules.windows import ProductWindows, Windows

EPSILON = torch.finfo(torch.float64).eps
CHUNK_BYTES = 128 * 2**20  # working memory of one step
CLASSES = 64  # looked at together; most of many classes have too little evidence to matter


@final
@dataclass(frozen=True, eq=False)
class RobustMask(Rule):
    """The class of largest sum after each class has lost the window of largest sum, when that stands out.

    Scores are clipped to [0, c]. A class loses its heaviest window when this holds more than T times the class's total;
    T = 1 never masks. ``predict`` looks at what each window leaves over, added up directly: a class scores
    ``min_w out_w`` when that is below ``(1 − T)·total``, else its total. So huge scores of an attacker that lie in a
    window never meet the others in a sum, and rounding cannot carry the attacker past the theorem.

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
        windows: bool (W, V), or ``Windows`` of boxes or runs, or ``ProductWindows``, which are much faster.
        threshold: T in [0, 1]; smaller masks more often.
        clip: c > 0, inf for none.
    """

    windows: Windows | ProductWindows | Bool[Tensor, "W V"]
    threshold: float = 0.0
    clip: float = math.inf

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], not {self.threshold}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}")
        if isinstance(self.windows, Tensor):
            object.__setattr__(self, "windows", Windows.from_masks(self.windows))

    @property
    def theorem(self) -> str:
        return f"L_y > U_k for every rival k and location (robust masking, T = {self.threshold:g}, clip {self.clip:g})"

    @property
    def _windows(self) -> Any:  # Windows or ProductWindows, whose locations are of their own kind
        assert not isinstance(self.windows, Tensor)
        return self.windows

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        self._check(evidence)
        return torch.cat([_Scored(self, part).label for part in self._parts(evidence)])

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        self._check(evidence)
        check_relation(evidence, sees, unsure, error)
        if error is None:
            error = torch.zeros(len(evidence), dtype=torch.float64, device=evidence.device)
        factored = None if unsure is not None and bool(unsure.any()) else self._places(sees)
        labels, margins, first = [], [], 0
        for part in self._parts(evidence, len(sees)):
            scored = _Scored(self, part)
            labels.append(scored.label)
            if factored is not None:
                margins.append(self._margin(scored, *factored, error[first : first + len(part)]))
            else:  # the attacker of each image owns other views
                assert unsure is not None
                margins += [
                    self._margin(_Scored(self, part[[b]]), *self._places(sees | unsure[first + b]), error[[first + b]])
                    for b in range(len(part))
                ]
            first += len(part)
        return Verdict(torch.cat(labels), torch.cat(margins))

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        """Soft masking: a mean of the sums that the windows leave over, mostly of the least; used as far as masking is likely."""
        scores = leaky(evidence, 0.0, self.clip)
        total = scores.sum(1)
        if self.threshold == 1:
            return lead_of(total)
        width = 0.02 * total.detach().amax(1)[:, None].clamp(min=1e-3)
        left = self._windows.outside(scores)  # (N, W, K)
        least = (torch.softmax(-left / width[:, None], 1) * left).sum(1)
        if self.threshold == 0:
            return lead_of(least)
        masked = torch.sigmoid(((1 - self.threshold) * total - least) / width)
        return lead_of(masked * least + (1 - masked) * total)

    def graph(self, views: int, classes: int) -> Graph:
        least_outside, keep = _least_outside(self._windows), 1 - self.threshold

        def answer(values: Shaped[Tensor, "B V K"], error: Tensor | None) -> Answers:
            scores = clipped(values, 0.0, self.clip)
            total = scores.sum(1)
            if self.threshold == 1:
                return (total.argmax(1),)
            least = least_outside(scores)
            return (torch.where(least < keep * total, least, total).argmax(1),)

        return answer

    def _places(self, sees: Bool[Tensor, "L V"]) -> tuple[Any, Any, Int64[Tensor, " L"]]:
        """The windows, the attacker's locations as windows of the same grid, and which of these each location is."""
        factors = self._windows.factor(sees)
        if factors is not None:
            return self._windows, *factors
        return (
            Windows.from_masks(self._windows.members),
            Windows.from_masks(sees),
            torch.arange(len(sees), device=sees.device),
        )

    def _check(self, evidence: Tensor) -> None:
        check_shape(evidence)
        if evidence.shape[1] != self._windows.number_of_views:
            raise ValueError(f"evidence has {evidence.shape[1]} views, the windows {self._windows.number_of_views}")

    def _parts(self, evidence: Tensor, locations: int = 1) -> tuple[Tensor, ...]:
        """Evidence of as many images as fit the working memory."""
        _, views, classes = evidence.shape
        number = len(self._windows)
        light = isinstance(self.windows, ProductWindows) and self.threshold == 0
        pairs = locations + number if light else locations * number
        each = 8 * (2 * classes * (views + number + locations) + 3 * pairs)
        return evidence.split(max(1, CHUNK_BYTES // each))

    def _margin(
        self,
        scored: "_Scored",
        windows: Any,
        places: Any,
        row: Int64[Tensor, " L"],
        error: Float64[Tensor, " b"],
    ) -> Float64[Tensor, "b L"]:
        keep = 1 - self.threshold
        own, views = scored.own, scored.own.shape[1]
        shared = windows.overlap_sums(places, torch.ones(1, views, dtype=torch.float64))[0]
        slack, off = 4 * views * EPSILON, views * error[:, None]
        lower = places.outside(own[..., None])[..., 0]  # V, (b, locations)
        if self.threshold == 0:  # any window may be masked
            lower = lower - windows.max_sum_outside(places, own).clamp(min=0)
        elif self.threshold < 1:
            held = (own @ windows.members.to(own).T)[:, None] - windows.overlap_sums(places, own)  # v(w)
            doubt = slack * own.sum(1) + 2 * off[:, 0]
            reach = torch.where(shared > 0, shared * self.clip, 0.0) * keep
            possible = held + reach >= (self.threshold * lower - doubt[:, None])[..., None]
            possible &= (shared > 0) | (held > -doubt[:, None, None])
            lower = lower - held.clamp_(min=0).mul_(possible).amax(2)
        upper = self._rivals(scored, windows, places, shared)
        rounding = slack * (2 * scored.total.amax(1)[:, None] + torch.where(upper.isfinite(), upper.abs(), 0))
        rounding += off * (1 + 1 / keep if keep > 0 else 2)
        return (lower - upper - rounding)[:, row]

    def _rivals(
        self, scored: "_Scored", windows: Any, places: Any, shared: Float64[Tensor, "P W"]
    ) -> Float64[Tensor, "b P"]:
        """The largest U_k of a rival at every location."""
        keep, size = 1 - self.threshold, places.members.sum(1).double()
        reach = torch.where(size > 0, size * self.clip, 0.0)
        covering = shared == size[:, None]  # windows that hold all of A
        # Where A is a window and none is larger, a window w saves at most |w∖A|·c ≤ |A∖w|·c, and costs the latter.
        largest = windows.members.sum(1)
        done = bool((covering & (largest <= size[:, None]) & (largest.max() <= size[:, None])).any(1).all())
        best = torch.full((len(scored.label), len(places)), -torch.inf, dtype=torch.float64)
        for block in scored.blocks():
            rivals = block.classes != scored.label[:, None]
            bound = None
            if not math.isinf(self.clip) or bool((size == 0).any()) or block.outside is None:
                bound = places.outside(block.scores) + reach[:, None]
            if block.outside is not None:
                covered = _least(block.outside, covering) / keep
                bound = covered if bound is None else torch.minimum(bound, covered)
            assert bound is not None
            bound = bound.masked_fill(~rivals[:, None], -torch.inf)
            if block.outside is None or math.isinf(self.clip) or done:
                best = torch.maximum(best, bound.amax(2))
            else:
                best = self._refined(best, bound, block.scores, windows, places)
            limit = block.rest[:, None] / keep if math.isinf(self.clip) and keep > 0 else block.rest[:, None] + reach
            if bool((limit <= best).all()):  # no class of the blocks to come reaches what was found
                break
        return best

    def _refined(
        self,
        best: Float64[Tensor, "b P"],
        bound: Float64[Tensor, "b P k"],
        scores: Float64[Tensor, "b V k"],
        windows: Any,
        places: Any,
    ) -> Float64[Tensor, "b P"]:
        """``best`` raised to the exact U_k, with windows that hold only a part of A too, for finite c.

        ``bound`` is at least U_k. Classes are refined in order of it, until no other can exceed what was found.
        """
        order = bound.amax(1).argsort(1, descending=True)
        best, left = best.clone(), torch.arange(len(bound))
        for step in range(bound.shape[2]):
            following = bound[left].gather(2, order[left, None, step:].expand(-1, bound.shape[1], -1))
            left = left[(following.amax(2) > best[left]).any(1)]
            if len(left) == 0:
                break
            chosen = order[left, step, None, None]
            limit = bound[left].gather(2, chosen.expand(-1, bound.shape[1], 1))[..., 0]
            rival = scores[left].gather(2, chosen.expand(-1, scores.shape[1], 1))[..., 0]
            least = windows.min_remaining_sum(places, rival, self.clip) / (1 - self.threshold)
            best[left] = torch.maximum(best[left], torch.minimum(limit, least))
        return best


@dataclass
class _Block:
    """Some classes of every image."""

    classes: Int64[Tensor, "b k"]
    scores: Float64[Tensor, "b V k"]
    """Clipped evidence."""
    outside: Float64[Tensor, "b W k"] | None
    """Scores that every window leaves over; None if nothing is ever masked."""
    rest: Float64[Tensor, " b"]
    """No class of a later block has more evidence in total; −inf after the last."""


class _Scored:
    """Labels of some images, from as few classes as decide them: a class scores at most its total."""

    def __init__(self, rule: RobustMask, evidence: Shaped[Tensor, "b V K"]):
        self.rule, self.evidence = rule, evidence
        classes = evidence.shape[2]
        self.total = _totals(evidence, rule.clip)
        check_numbers(self.total)
        everything = torch.arange(classes, device=evidence.device).expand(len(evidence), -1)
        self.order = everything if classes <= CLASSES else self.total.argsort(1, descending=True)
        self._known: list[_Block] = []
        score = torch.full_like(self.total, -torch.inf)
        for block in self.blocks():
            total = block.scores.sum(1)
            if block.outside is not None:
                least = block.outside.amin(1)
                total = torch.where(least < (1 - rule.threshold) * total, least, total)
            score.scatter_(1, block.classes, total)
            if bool((block.rest < score.amax(1)).all()):
                break
        self.label = score.argmax(1)
        chosen = self.label[:, None, None].expand(-1, evidence.shape[1], 1)
        self.own = clipped(evidence.gather(2, chosen), 0.0, rule.clip)[..., 0]

    def blocks(self) -> Iterator[_Block]:
        """Classes in blocks, those of largest total first; each is computed once."""
        for number, first in enumerate(range(0, self.order.shape[1], CLASSES)):
            if number == len(self._known):
                self._known.append(self._compute(first))
            yield self._known[number]

    def _compute(self, first: int) -> _Block:
        classes = self.order[:, first : first + CLASSES]
        evidence, after = self.evidence, first + CLASSES
        rest = torch.full_like(self.total[:, 0], -torch.inf)
        if evidence.shape[2] > CLASSES:
            evidence = evidence.gather(2, classes[:, None].expand(-1, evidence.shape[1], -1))
        if after < self.order.shape[1]:
            rest = self.total.gather(1, self.order[:, after, None])[:, 0] * (1 + 1e-3)
        scores = clipped(evidence, 0.0, self.rule.clip)
        outside = None if self.rule.threshold == 1 else self.rule._windows.outside(scores)
        return _Block(classes, scores, outside, rest)


def _totals(evidence: Shaped[Tensor, "b V K"], clip: float) -> Float64[Tensor, "b K"]:
    """Sums over the views of clipped evidence, to 1 in 1,000 (up to 10,000 views): they rank classes and bound them."""
    wide = evidence.dtype == torch.float64 or not evidence.is_floating_point() or evidence.element_size() < 4
    if wide or evidence.shape[1] > 10_000:
        return clipped(evidence, 0.0, clip).sum(1)
    totals = evidence.clamp(0.0, min(clip, 1e30)).sum(1).double()
    return totals if totals.numel() == 0 or totals.amax() < 1e30 else clipped(evidence, 0.0, clip).sum(1)


def _least(outside: Float64[Tensor, "b W K"], covering: Bool[Tensor, "P W"]) -> Float64[Tensor, "b P K"]:
    """min over the covering windows of each location; inf where there is none."""
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


def _least_outside(windows: Windows | ProductWindows) -> Callable[[Float64[Tensor, "B V K"]], Float64[Tensor, "B K"]]:
    """The least that a window leaves over, as one product. Of pairs it is the sum of each family's least."""
    if isinstance(windows, ProductWindows):
        first, second = _least_outside(windows.first), _least_outside(windows.second)
        split = windows.first.number_of_views
        return lambda scores: first(scores[:, :split]) + second(scores[:, split:])
    others = (~windows.members).double()
    return lambda scores: (others @ scores).amin(1)
