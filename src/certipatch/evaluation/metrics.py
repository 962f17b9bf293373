"""Metrics over all evaluated pictures, with confidence intervals."""

from jaxtyping import Bool
from scipy.stats import binomtest
from torch import Tensor


def accuracies(correct: Bool[Tensor, " N"], certified: Bool[Tensor, " N"]) -> tuple[float, float]:
    """(clean accuracy, certified accuracy) as fractions of all N pictures; certified ones must be correct too."""
    return correct.double().mean().item(), (correct & certified).double().mean().item()


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction. ValueError for n < 1."""
    if n < 1:
        raise ValueError("an interval needs at least one picture")
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
