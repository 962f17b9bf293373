"""A certified defense of your own in one file: Borda voting over column and row bands.

python examples/own_defense.py

A package registers it with one line in its pyproject.toml; then it is a defense of every command:

    [project.entry-points."certipatch.defenses"]
    borda = "own_defense:Borda"

certipatch evaluate --defense borda --model fashion-columns --data fashion-sample --patch 3 --set ranks=3 --out runs/borda
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

import certipatch as cp
from certipatch import evidence as ev
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.settings import DefenseSettings
from certipatch.rules.base import Rule, Verdict, check_evidence, check_relation


@final
@dataclass(frozen=True)
class BordaCount(Rule):
    """The class with most points; every view gives each class 0 to R points.

    **Theorem.** Let A be the views that an attacker at l owns, with the unsure ones, and s the points of the others. The
    label stays y for every attack at l if s_y − s_k − R·|A| ≥ [y > k] for every rival k. *Proof.* A view in A gives y at
    least 0 points and k at most R. So the lead of y over k is at least the left side, and on a tie the smaller index wins.

    Args:
        ranks: R; the points of the best class. R = 1 is ``rules.Vote`` for the top class.
    """

    ranks: int

    @property
    def theorem(self) -> str:
        return f"s_y − s_k − {self.ranks}·|A| ≥ [y > k] for the points s outside of A, every rival k and location"

    def predict(self, evidence: Tensor) -> Tensor:
        check_evidence(evidence)
        return evidence.long().sum(1).argmax(1)

    def certify(
        self, evidence: Tensor, sees: Tensor, unsure: Tensor | None = None, error: Tensor | None = None
    ) -> Verdict:
        check_evidence(evidence)
        check_relation(evidence, sees, unsure, error)
        label = self.predict(evidence)
        owned = sees[None] if unsure is None else sees[None] | unsure[:, None]  # (B or 1, L, V)
        outside = (~owned).double() @ evidence.double()  # (B, L, K); whole numbers are exact
        chosen = label[:, None, None].expand(-1, len(sees), 1)
        tie = torch.arange(evidence.shape[2], device=label.device) < label[:, None]  # rivals that win a tie
        rivals = (outside + tie[:, None]).scatter(2, chosen, -1).amax(2)
        lead = outside.gather(2, chosen)[..., 0] - rivals - self.ranks * owned.sum(2)
        return Verdict(label, lead + 1)


class BordaSettings(DefenseSettings):
    """Number of ranks that get points: R for the best class of a view, R − 1 for the next, and so on."""

    ranks: int = Field(default=2, ge=1, le=1000)


@final
class Borda(ViewDefense):
    """Every band ranks the classes and gives points to the best ones: a second choice counts too.

    Args:
        model: a network that reads bands or blocks, or gives local logits.
        views: the bands or blocks; None for a network of local logits.
        ranks: R, the points of the best class of a view.
        batch_size: images or rendered views per forward pass.
    """

    name: ClassVar[str] = "borda"
    settings_class = BordaSettings

    def __init__(
        self,
        model: nn.Module,
        views: cp.views.Views | None = None,
        ranks: int = BordaSettings().ranks,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        self.options = BordaSettings.checked(ranks=ranks)
        self._rule = BordaCount(ranks)
        self.theorem = self._rule.theorem

    def rule(self, image_size: tuple[int, int]) -> BordaCount:
        return self._rule

    def values(self, logits: Tensor, tolerance: ev.Tolerance) -> tuple[Tensor, Tensor, None]:
        """Points (B, V, K), and the views in which rounding could change the order of the classes that get any."""
        scores, order = ev.scores(logits).sort(dim=2, descending=True, stable=True)
        points = (self._rule.ranks - order.argsort(2)).clamp(min=0)
        gaps = (scores[..., :-1] - scores[..., 1:])[..., : self._rule.ranks]
        unsure = gaps <= 2 * tolerance.of(scores[..., :-1])[..., : self._rule.ranks]
        return points, unsure.any(2), None


def main() -> None:
    trained, threat = cp.load("fashion-columns"), cp.PatchThreat(3)
    assert isinstance(trained, ViewDefense)
    defense = Borda(trained.model, trained.views)
    certificate = defense.certify(cp.data.load("fashion-sample").images(range(8)), threat)
    print("answers  ", certificate.label.tolist())
    print("certified", certificate.certified.tolist(), "where", defense.theorem)


if __name__ == "__main__":
    main()
