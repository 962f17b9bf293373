"""The contract of a rule: evidence → label, and a theorem that bounds every attack on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.errors import InputError
from certipatch.rules.soft import lead_of

Answers = tuple[Tensor, ...]
"""The label (B,), and of a rule that detects the alarm (B,)."""
Graph = Callable[[Tensor, "Tensor | None"], Answers]
"""Evidence (B, V, K), and how far its scores may be off (B,) → answers."""

HUGE = 1e290  # stands for infinite evidence, so that sums of it stay finite


@final
@dataclass(frozen=True)
class Verdict:
    """A rule's answer: ``label`` (B,), and ``margin`` (B, L), positive only where no attack at l changes the label."""

    label: Int64[Tensor, " B"]
    margin: Float64[Tensor, "B L"]
    alarm: Bool[Tensor, " B"] | None = None
    """Images that raise an alarm as they are (detection only)."""

    @property
    def certified(self) -> Bool[Tensor, " B"]:
        """Images whose label no location can change."""
        return (self.margin > 0).all(1)


class Rule(ABC):
    """Evidence (B, V, K) → label (B,). On a tie the smaller class index wins, in predict and in certify."""

    @property
    @abstractmethod
    def theorem(self) -> str:
        """The condition under which ``certify`` gives a positive margin, in one line."""

    @abstractmethod
    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        """The label of each image."""

    @abstractmethod
    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        """The label of each image and its margin at every location.

        Args:
            evidence: what the network says about every view; any real or integer dtype.
            sees: ``sees[l, v]``: an attacker at l owns the evidence of view v.
            unsure: views whose evidence rounding may have changed: they belong to the attacker at every location.
            error: how far every score of an image may be off where it is served; margins shrink by what that can do.
                Rules that count votes have ``unsure`` for it and take none.

        Errors: ValueError on L = 0, V = 0, K < 2, NaN or shapes that do not fit each other.
        """

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        """Compute a differentiable lead of each class in soft evidence: the attack raises it.

        Without an own one: the lead of the mean over the views, which is the rule itself if the answer is the class of
        largest sum.
        """
        return lead_of(evidence.mean(1))

    def graph(self, views: int, classes: int) -> Graph:
        """``predict`` in operations that do not depend on the data, with windows and tables as constants, for ``export``.

        Sums are in float64 there too, so that another order of them changes nothing but ties of reals.

        Errors: InputError for a rule that has none.
        """
        raise InputError(f"export: the rule {type(self).__name__} has no graph")


def check_evidence(evidence: Tensor) -> None:
    """ValueError unless evidence is a real tensor (B, V ≥ 1, K ≥ 2) without NaN."""
    check_shape(evidence)
    if evidence.is_floating_point():
        check_numbers(evidence)


def check_numbers(values: Tensor) -> None:
    """ValueError where evidence, or a sum of it, is NaN."""
    if bool(torch.isnan(values).any()):
        raise ValueError("evidence contains NaN")


def check_shape(evidence: Tensor) -> None:
    """ValueError unless evidence is a real tensor (B, V ≥ 1, K ≥ 2)."""
    if evidence.ndim != 3:
        raise ValueError(f"evidence has the shape (B, V, K), not {tuple(evidence.shape)}")
    if evidence.shape[1] < 1 or evidence.shape[2] < 2:
        raise ValueError(
            f"evidence needs at least one view and two classes, not V={evidence.shape[1]} K={evidence.shape[2]}"
        )
    if evidence.is_complex():
        raise ValueError("evidence must be real, not complex")


def check_relation(
    evidence: Tensor, sees: Tensor, unsure: Tensor | None, error: Float64[Tensor, " B"] | None = None
) -> None:
    """ValueError unless ``sees`` is bool (L ≥ 1, V), ``unsure`` bool (B, V) and ``error`` (B,), not negative."""
    if sees.dtype != torch.bool or sees.ndim != 2 or sees.shape[1] != evidence.shape[1] or len(sees) < 1:
        raise ValueError(
            f"sees must be bool with the shape (L ≥ 1, V={evidence.shape[1]}), not {sees.dtype} {tuple(sees.shape)}"
        )
    if unsure is not None and (unsure.dtype != torch.bool or unsure.shape != evidence.shape[:2]):
        raise ValueError(
            f"unsure must be bool with the shape {tuple(evidence.shape[:2])}, not {unsure.dtype} {tuple(unsure.shape)}"
        )
    if error is not None and (error.shape != evidence.shape[:1] or not bool((error >= 0).all())):
        raise ValueError(f"error holds one number ≥ 0 for each of {len(evidence)} pictures, not {tuple(error.shape)}")


def clipped(evidence: Shaped[Tensor, "B V K"], lo: float, hi: float) -> Float64[Tensor, "B V K"]:
    """Evidence in float64, clipped to [lo, hi]; infinite scores become so large that sums of them stay finite."""
    return evidence.double().clamp(max(lo, -HUGE), min(hi, HUGE))


def outside_sums(scores: Float64[Tensor, "B V K"], sees: Bool[Tensor, "L V"]) -> Float64[Tensor, "B L K"]:
    """Sums over the views that each location leaves alone: never a total less the touched views, which would cancel."""
    shown = (~sees).double()
    with torch.autocast(scores.device.type, enabled=False):
        return shown @ scores


def certified_lead(sums: Float64[Tensor, "B L K"], label: Int64[Tensor, " B"]) -> Float64[Tensor, "B L"]:
    """Smallest difference between the label's sum and that of a rival."""
    chosen = label[:, None, None].expand(-1, sums.shape[1], 1)
    own = sums.gather(2, chosen)[..., 0]
    return own - sums.scatter(2, chosen, -torch.inf).amax(2)
