"""Votes of sampled views: the rule of randomized ablation (Levine & Feizi 2020, section 2.1; Cohen et al. 2019)."""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Verdict

MAX_SAMPLES = 10_000_000
ROUNDING = 1e-9  # of the bound and of the draws; subtracted from every margin


def lower_bound(successes: Int64[np.ndarray, "..."], samples: int, alpha: float) -> Float64[np.ndarray, "..."]:
    """One-sided Clopper–Pearson bound: the share p at which so many successes or more have a chance of α; 0 for none.

    A sample of a share p gives a bound above p with a chance of at most α.
    """
    from scipy.stats import beta  # a second to import

    return np.where(successes > 0, beta.ppf(alpha, np.maximum(successes, 1), samples - successes + 1), 0.0)


@final
@dataclass(frozen=True)
class ClopperPearson:
    """The class with most votes in a first sample, certified by a second one that is independent of it.

    Every random view votes for one class. Let p_k(x) be the share of *all* views of the family that vote for k, and
    the *smoothed classifier* g(x) the class of largest share (on a tie the smaller index). Let Δ be the chance that a
    random view shows a pixel of the location.

    **Theorem.** Let y be the class picked from the first sample, and p̲ the Clopper–Pearson lower bound, at level α, of
    p_y(x) from the second. With confidence 1 − α: if p̲ > ½ + Δ, then g(x′) = y for the image x itself and for every x′
    that differs from it at that location only.

    *Proof.* y does not depend on the second sample, so p̲ ≤ p_y(x) with a chance of at least 1 − α. Views that do not show
    the location vote on x′ as they do on x, so p_y(x′) ≥ p_y(x) − Δ > ½, and as no view votes twice, every other class
    has less than ½. One and the same event, p̲ ≤ p_y(x), carries all locations and all threats. (The last step is Levine
    & Feizi's; Δ is a property of the family, never of what was drawn.)

    **What is certified** is g, not the sample. ``predict`` answers with the picked class. On a certified image that is
    g's class, with the same confidence. On an attacked image g still says y, but possibly with a share just above ½,
    and a sampled answer there can miss it. The confidence is that of each certificate by itself, over the draw of its
    sample; it is lost for an image, or a seed, that was chosen because its sample came out well.

    ``predict`` never abstains; an image without a clear majority has no positive margin. The margin is p̲ − ½ − Δ, less
    1e-9 for rounding: a share of the views.

    Args:
        samples: n, views in the second sample.
        alpha: α in (0, 1).
    """

    samples: int
    alpha: float = 0.05

    def __post_init__(self):
        check_samples(self.samples, "samples")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is the chance of an error, in (0, 1), not {self.alpha}")

    @property
    def theorem(self) -> str:
        """The condition of a positive margin, in one line."""
        return (
            f"with confidence {1 - self.alpha:.15g}, Clopper–Pearson bound of the share of views for y > ½ + Δ "
            f"({self.samples:,} sampled views)"
        )

    def predict(self, counts: Shaped[Tensor, "B 2 K"]) -> Int64[Tensor, " B"]:
        """The class with most votes in the first sample; on a tie the smaller index."""
        return self._checked(counts)[:, 0].argmax(1)

    def bound(self, counts: Shaped[Tensor, "B 2 K"]) -> Float64[Tensor, " B"]:
        """p̲ of the picked class."""
        whole = self._checked(counts)
        successes = whole[:, 1].gather(1, whole[:, 0].argmax(1, keepdim=True))[:, 0]
        return torch.from_numpy(lower_bound(successes.cpu().numpy(), self.samples, self.alpha)).to(counts.device)

    def certify(self, counts: Shaped[Tensor, "B 2 K"], delta: Float64[Tensor, " L"]) -> Verdict:
        """Labels, and margins at L locations.

        Args:
            counts: votes for each class in the first and in the second sample. In the second, a vote that rounding
                could turn is left out: it counts as not for the class.
            delta: Δ of each location.

        Errors: ValueError on L = 0, K < 2, Δ outside [0, 1], counts that are not whole or more than the sample.
        """
        if delta.ndim != 1 or len(delta) < 1 or not bool(((delta >= 0) & (delta <= 1)).all()):
            raise ValueError(f"delta holds a chance in [0, 1] for each of L >= 1 locations, not {tuple(delta.shape)}")
        margin = self.bound(counts)[:, None] - 0.5 - delta.double().to(counts.device) - ROUNDING
        return Verdict(self.predict(counts), margin)

    def _checked(self, counts: Tensor) -> Int64[Tensor, "B 2 K"]:
        if counts.ndim != 3 or counts.shape[1] != 2 or counts.shape[2] < 2 or counts.is_complex():
            raise ValueError(f"counts have the shape (B, 2, K >= 2), not {tuple(counts.shape)}")
        whole = counts.long()
        if not torch.equal(whole.to(counts.dtype), counts) or bool((whole < 0).any()):
            raise ValueError("counts are whole numbers of votes")
        if bool((whole[:, 1].sum(1) > self.samples).any()):
            raise ValueError(
                f"a second sample of {self.samples} views cannot give {int(whole[:, 1].sum(1).max())} votes"
            )
        return whole


def check_samples(number: int, name: str) -> None:
    """ValueError unless ``number`` is a whole number from 1 to MAX_SAMPLES (counts stay exact in float32)."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_SAMPLES:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_SAMPLES:,}, not {number!r}")
