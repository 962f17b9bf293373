"""Sums of clipped evidence: clipped BagNet (Zhang et al. 2020), and BagCert's counts (Metzen & Yatsura 2021)."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import (
    Graph,
    Rule,
    Verdict,
    certified_lead,
    check_evidence,
    check_relation,
    clipped,
    outside_sums,
)
from certipatch.rules.soft import lead_of, leaky

EPSILON = torch.finfo(torch.float64).eps


@final
@dataclass(frozen=True)
class ClippedSum(Rule):
    """The class of largest sum of evidence, every score clipped to [lo, hi] first.

    **Theorem.** Let A be the views that an attacker at l owns. The label stays y for every attack at l when, for every
    rival k,

        Σ_out e_y + |A|·lo  >  Σ_out e_k + |A|·hi.

    *Proof.* Whatever the attacker writes, every score lies in [lo, hi] after clipping: y keeps at least the left
    side, k gets at most the right one. Both are attained at once, so only a tie (which the smaller index wins) is lost.

    The margin is the smallest difference over all rivals, less the rounding of the float64 sums behind it. With an
    infinite bound no location with |A| > 0 is certified.

    Args:
        lo: smallest score, −inf for none.
        hi: largest score, inf for none.
    """

    lo: float
    hi: float

    def __post_init__(self):
        if not self.lo < self.hi:
            raise ValueError(f"lo must lie below hi, not lo={self.lo}, hi={self.hi}")

    @property
    def theorem(self) -> str:
        return f"Σ_out e_y + |A|·({self.lo:g}) > Σ_out e_k + |A|·{self.hi:g} for every rival k and location"

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        check_evidence(evidence)
        return clipped(evidence, self.lo, self.hi).sum(1).argmax(1)

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        check_evidence(evidence)
        check_relation(evidence, sees, unsure, error)
        scores = clipped(evidence, self.lo, self.hi)
        label = scores.sum(1).argmax(1)
        if unsure is not None:
            scores = scores.masked_fill(unsure[..., None], 0.0)
        outside = outside_sums(scores, sees)
        owned = sees.sum(1).double()[None]
        if unsure is not None:
            owned = owned + unsure.double() @ (~sees).double().T
        lost = torch.where(owned > 0, owned * (self.hi - self.lo), 0.0)
        views = evidence.shape[1]
        largest = max((abs(bound) for bound in (self.lo, self.hi) if math.isfinite(bound)), default=0.0)
        mass = scores.abs().sum(1).amax(1)[:, None] + owned * largest
        rounding = 4 * views * EPSILON * mass
        if error is not None:
            rounding = rounding + 2 * views * error[:, None]
        return Verdict(label, certified_lead(outside, label) - lost - rounding)

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        return lead_of(leaky(evidence, self.lo, self.hi).sum(1))

    def graph(self, views: int, classes: int) -> Graph:
        return lambda values, _: (clipped(values, self.lo, self.hi).sum(1).argmax(1),)
