"""Two runs over the same images: the difference of two accuracies, with an interval and a test for paired data.

Of n images, b are right in the second run only and c in the first only. The difference is (b − c)/n; the images on
which both agree do not determine its sign. Two overlapping unpaired intervals are no test of the difference.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@final
@dataclass(frozen=True)
class Paired:
    """Counts of images on which both, only the second, only the first, or neither of two runs succeeded."""

    both: int
    second_only: int
    first_only: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.second_only + self.first_only + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the second run minus that of the first, as a fraction."""
        return (self.second_only - self.first_only) / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        """Tango's 95 % interval of the difference."""
        return tango(self.second_only, self.first_only, self.n)

    @property
    def p_value(self) -> float:
        """The p-value of McNemar's exact test."""
        return mcnemar(self.second_only, self.first_only)


def paired(first: Bool[np.ndarray, " N"], second: Bool[np.ndarray, " N"]) -> Paired:
    """The counts of two runs over the same N images in the same order. ValueError for N = 0."""
    if not len(first):
        raise ValueError("a paired comparison needs at least one picture")
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    return Paired(both, int((second & ~first).sum()), int((first & ~second).sum()), neither)


def mcnemar(b: int, c: int) -> float:
    """Two-sided p-value of McNemar's exact test: under equal accuracies b is binomial(b + c, ½). 1 for b = c = 0.

    Source: McNemar, Psychometrika 12 (1947), with the binomial distribution in place of χ².
    """
    from scipy.stats import binom  # a second to import

    return min(1.0, 2 * float(binom.cdf(min(b, c), b + c, 0.5)))


def tango(b: int, c: int, n: int, z: float = Z) -> tuple[float, float]:
    """Tango's score interval of the difference δ = (b − c)/n of two paired fractions: every δ with |T(δ)| ≤ z.

    T(δ) = (b − c − nδ) / √(n·(2q + δ − δ²)), with q the maximum-likelihood estimate of the chance of an image of kind
    c when that of kind b is q + δ. At δ = 0, T² is McNemar's statistic (b − c)²/(b + c). The interval stays within
    [−1, 1], never has width 0 (b = c = 0 gives ±z²/(n + z²)), and keeps its coverage at small counts.

    Source: Tango, Statistics in Medicine 17 (1998) 891–908; recommended, with others, by Fagerland, Lydersen & Laake,
    Statistics in Medicine 33 (2014) 2850–2875.

    Errors: ValueError unless 0 ≤ b, c and 1 ≤ n, b + c ≤ n.
    """
    if min(b, c) < 0 or n < 1 or b + c > n:
        raise ValueError(f"of n = {n} pairs, b = {b} and c = {c} cannot be")
    return -_upper(c, b, n, z), _upper(b, c, n, z)


def _upper(b: int, c: int, n: int, z: float) -> float:
    """The largest δ with T(δ) ≥ −z: T falls from the estimate to 1, so that bisection finds the crossing."""
    inside, outside = (b - c) / n, 1.0
    for _ in range(60):
        delta = (inside + outside) / 2
        if n * delta - (b - c) <= z * math.sqrt(max(0.0, n * (2 * _restricted(b, c, n, delta) + delta - delta**2))):
            inside = delta
        else:
            outside = delta
    return outside


def _restricted(b: int, c: int, n: int, delta: float) -> float:
    """q, the root of 2n·q² + B·q − cδ(1 − δ) = 0 in [max(0, −δ), (1 − δ)/2], with B = (2n − b + c)δ − b − c."""
    linear = (2 * n - b + c) * delta - b - c
    return (math.sqrt(max(0.0, linear**2 + 8 * n * c * delta * (1 - delta))) - linear) / (4 * n)
