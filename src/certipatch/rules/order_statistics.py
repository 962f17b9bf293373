"""Median and trimmed mean over the views: robust aggregations that PatchGuard (Xiang et al. 2021) leaves open."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Graph, Rule, Verdict, check_evidence, check_relation, clipped
from certipatch.rules.soft import lead_of, leaky

EPSILON = torch.finfo(torch.float64).eps
CHUNK_BYTES = 128 * 2**20  # working memory of one step


class OrderStatistic(Rule):
    """The class whose views have the largest mean score once ``trim`` views at each end are left out.

    **Theorem.** Of V scores of a class, a = |A| are the attacker's, within [lo, hi]. The j-th smallest of all V then
    lies between the (j − a)-th and the j-th smallest of the others (lo and hi where that rank does not exist), and
    both ends are attained: all of A at lo, or all at hi. So the mean over the kept ranks lies between the means of
    these bounds, which one attack attains at all ranks together. The label stays y for every attack when the lower
    mean of y exceeds the upper mean of every rival.

    The margin is the smallest difference, less rounding.
    """

    lo: float
    hi: float

    @abstractmethod
    def trimmed(self, views: int) -> int:
        """Views left out at each end. ValueError where none is left."""

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        trim = self.trimmed(evidence.shape[1])
        ranked = clipped(evidence, self.lo, self.hi).sort(1).values
        return ranked[:, trim : evidence.shape[1] - trim].mean(1).argmax(1)

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        label = self.predict(evidence)
        check_relation(evidence, sees, unsure, error)
        batch, views, classes = evidence.shape
        trim = self.trimmed(views)
        ranked, order = clipped(evidence, self.lo, self.hi).sort(1)
        step = max(1, CHUNK_BYTES // (32 * views * classes))
        margin = torch.empty((batch, len(sees)), dtype=torch.float64, device=evidence.device)
        for b in range(batch):
            owned = sees if unsure is None else sees | unsure[b]
            for first in range(0, len(sees), step):
                outside = ~owned[first : first + step][:, order[b]]  # (l, V, K) in the order of the scores
                lower, upper = self._means(ranked[b], outside, trim)
                chosen = label[b].expand(len(outside), 1)
                lead = lower.gather(1, chosen)[:, 0] - upper.scatter(1, chosen, -torch.inf).amax(1)
                margin[b, first : first + step] = lead
        mass = ranked.abs().amax((1, 2))[:, None]
        rounding = 4 * views * EPSILON * mass
        return Verdict(label, margin - rounding - (0 if error is None else 2 * error[:, None]))

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        """Soft median and trimmed mean: ranks beside the kept ones count a little."""
        views = evidence.shape[1]
        trim = self.trimmed(views)
        rank = torch.arange(views, device=evidence.device, dtype=evidence.dtype)
        beyond = (trim - rank).clamp(min=0) + (rank - (views - trim - 1)).clamp(min=0)
        weight = torch.exp(-((beyond / max(1.0, 0.05 * views)) ** 2))
        ranked = leaky(evidence, self.lo, self.hi).sort(1).values
        return lead_of((ranked * (weight / weight.sum())[None, :, None]).sum(1))

    def graph(self, views: int, classes: int) -> Graph:
        kept = slice(self.trimmed(views), views - self.trimmed(views))
        return lambda values, _: (clipped(values, self.lo, self.hi).sort(1).values[:, kept].mean(1).argmax(1),)

    def _means(
        self, ranked: Float64[Tensor, "V K"], outside: Bool[Tensor, "l V K"], trim: int
    ) -> tuple[Float64[Tensor, "l K"], Float64[Tensor, "l K"]]:
        """Least and largest mean over the kept ranks trim + 1 … V − trim."""
        views = len(ranked)
        kept = views - 2 * trim
        rank = outside.cumsum(1, dtype=torch.int32)  # among the views outside, from 1
        free = views - rank[:, -1:, :]  # a
        low = outside & (rank > trim - free) & (rank <= views - trim - free)
        high = outside & (rank > trim) & (rank <= views - trim)
        ends = []
        for chosen, end in ((low, max(self.lo, -torch.inf)), (high, self.hi)):
            missing = kept - chosen.sum(1)
            rest = torch.where(missing > 0, missing * end, 0.0)
            ends.append((torch.where(chosen, ranked, 0.0).sum(1) + rest) / kept)
        return ends[0], ends[1]


@final
@dataclass(frozen=True)
class Median(OrderStatistic):
    """The class of largest median score over the views; of an even number of views the mean of the middle two.

    Args:
        lo: smallest possible score, −inf for none; scores are clipped there.
        hi: largest possible score, inf for none.
    """

    lo: float = -torch.inf
    hi: float = torch.inf

    def __post_init__(self):
        _check_bounds(self.lo, self.hi)

    @property
    def theorem(self) -> str:
        return "least median of y > largest median of every rival k, with |A| scores free (exact)"

    def trimmed(self, views: int) -> int:
        return (views - 1) // 2


@final
@dataclass(frozen=True)
class TrimmedMean(OrderStatistic):
    """The class of largest mean score over the views without its ``trim`` smallest and ``trim`` largest scores.

    Args:
        trim: views left out at each end; 2·trim < V.
        lo: smallest possible score, −inf for none; scores are clipped there.
        hi: largest possible score, inf for none.
    """

    trim: int
    lo: float = -torch.inf
    hi: float = torch.inf

    def __post_init__(self):
        _check_bounds(self.lo, self.hi)
        if isinstance(self.trim, bool) or not isinstance(self.trim, int) or self.trim < 0:
            raise ValueError(f"trim is a whole number of views ≥ 0, not {self.trim!r}")

    @property
    def theorem(self) -> str:
        return f"least mean of y > largest mean of every rival k without {self.trim} scores at each end (exact)"

    def trimmed(self, views: int) -> int:
        if 2 * self.trim >= views:
            raise ValueError(f"trim {self.trim} at each end leaves none of {views} views; use trim < {views / 2:g}")
        return self.trim


def _check_bounds(lo: float, hi: float) -> None:
    if not lo < hi:
        raise ValueError(f"lo must lie below hi, not lo={lo}, hi={hi}")
