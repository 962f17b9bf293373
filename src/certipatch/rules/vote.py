"""Voting: the rule of (de)randomized smoothing (Levine & Feizi 2020, equations 3 to 6)."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from certipatch.rules.base import Graph, Rule, Verdict, check_evidence, check_relation
from certipatch.rules.soft import lead_of

CHUNK_BYTES = 256 * 2**20  # working memory of one step


@final
@dataclass(frozen=True)
class Vote(Rule):
    """The class with most votes; a view votes for no class, one, or several.

    **Theorem (per location).** Let A be the views that an attacker at l owns (those that see l, and the unsure ones),
    and n(out) the votes of the other views. The label stays y for every attack at l when, for every rival k,

        n_y(out) − n_k(out) − |A|  ≥  [y > k].

    *Proof.* An attacked view changes n_y − n_k by −1 at worst: no vote for y, one for k. So n_y − n_k ≥ n_y(out) −
    n_k(out) − |A| after the attack, and y wins at a difference of 0 against larger indices, of 1 against smaller ones.
    The attack that makes every view in A vote for k alone attains it, so the condition is exact.

    **Theorem (paper, Thm 1 and 2).** n_y − n_k − 2·max_l |A_l| ≥ [y > k]. Never stronger: the votes of A may already
    be against y, and a location at the border may touch fewer views than the worst one. Unsure views count as attacked
    once more.

    Both margins are ``min_k (left − [y > k]) + 1``: a whole number, positive exactly where the condition holds.

    Departs from the paper: location by location instead of one worst |A|; |A| is counted with ``sees``.
    """

    margin: Literal["location", "paper"] = "location"

    @property
    def theorem(self) -> str:
        if self.margin == "paper":
            return "n_y − n_k − 2·max|A| ≥ [y > k] for every rival k (Levine & Feizi 2020, Theorems 1 and 2)"
        return "n_y(out) − n_k(out) − |A| ≥ [y > k] for every rival k and location (exact)"

    def __post_init__(self):
        if self.margin not in ("location", "paper"):
            raise ValueError(f"margin must be 'location' or 'paper', not {self.margin!r}")

    def predict(self, evidence: Shaped[Tensor, "B V K"]) -> Int64[Tensor, " B"]:
        """The class with most votes; without any vote class 0. ValueError on votes that are not 0 or 1."""
        return _checked_votes(evidence).sum(1, dtype=torch.int64).argmax(1)

    def certify(
        self,
        evidence: Shaped[Tensor, "B V K"],
        sees: Bool[Tensor, "L V"],
        unsure: Bool[Tensor, "B V"] | None = None,
        error: Float64[Tensor, " B"] | None = None,
    ) -> Verdict:
        votes = _checked_votes(evidence)
        check_relation(votes, sees, unsure)
        if error is not None:
            raise ValueError("votes are whole numbers without error; pass the views that may turn as unsure")
        label = votes.sum(1, dtype=torch.int64).argmax(1)
        touched = sees.sum(1)[:, None]  # |A|, (L, 1) or (L, B)
        if unsure is not None:
            votes = votes * ~unsure[..., None]
        if self.margin == "paper":
            lost = 2 * touched.amax() + (0 if unsure is None else unsure.sum(1))
            lead = _smallest_lead(votes.sum(1, dtype=torch.int64).T[None], label)[0] - lost
            return Verdict(label, (lead + 1).double()[:, None].repeat(1, len(sees)))
        if unsure is not None:
            touched = touched + _count(~sees, unsure[..., None])[:, 0].long()
        step = max(1, CHUNK_BYTES // (8 * len(sees) * votes.shape[2]))
        leads = [
            _smallest_lead(_count(~sees, votes[i : i + step]), label[i : i + step])
            for i in range(0, max(1, len(votes)), step)
        ]
        return Verdict(label, (torch.cat(leads, 1) - touched + 1).T.double())

    def leads(self, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
        return lead_of(evidence.sum(1))

    def graph(self, views: int, classes: int) -> Graph:
        return lambda values, _: (values.double().sum(1).argmax(1),)


def _checked_votes(evidence: Tensor) -> Tensor:
    check_evidence(evidence)
    if evidence.dtype == torch.bool:
        return evidence.to(torch.uint8)
    votes = evidence.to(torch.uint8)
    if bool((votes > 1).any()) or not torch.equal(votes.to(evidence.dtype), evidence):
        wrong = evidence[(evidence != 0) & (evidence != 1)].flatten()[0].item()
        raise ValueError(f"votes are 0 or 1, not {wrong}; compare the scores with a threshold first")
    return votes


def _count(shown: Bool[Tensor, "L V"], votes: Shaped[Tensor, "B V K"]) -> Float[Tensor, "L K B"]:
    """Votes of the views in each row of ``shown``. Whole numbers, exact in float32 below 2²⁴ views."""
    batch, views, classes = votes.shape
    if views >= 2**24:
        raise ValueError(f"{views} views cannot be counted exactly; use fewer than {2**24}")
    flat = votes.permute(1, 2, 0).float().reshape(views, classes * batch)
    with torch.autocast(votes.device.type, enabled=False):  # which would round counts to eight bits
        return (shown.float() @ flat).view(len(shown), classes, batch)


def _smallest_lead(counts: Shaped[Tensor, "L K B"], label: Int64[Tensor, " B"]) -> Int64[Tensor, "L B"]:
    """min over rivals k of n_y − n_k − [y > k], exact for whole numbers."""
    own = counts.gather(1, label.expand(len(counts), 1, -1))[:, 0]
    classes = torch.arange(counts.shape[1], device=counts.device)[:, None]
    rivals = counts + (classes < label).to(counts.dtype)  # ties that a rival wins
    return (own - rivals.masked_fill(classes == label, -1).amax(1)).long()
