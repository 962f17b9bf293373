"""Confidence intervals of measured fractions."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction. ValueError for n < 1."""
    if n < 1:
        raise ValueError("an interval needs at least one picture")
    from scipy.stats import binomtest  # a second to import

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
