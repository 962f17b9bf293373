"""Soft versions of the values that rules count, for attacks that follow a gradient.

What is a step in a defense is soft here, and what is flat keeps a small slope, so that no gradient vanishes: backward pass
differentiable approximation, Athalye, Carlini & Wagner 2018. A soft version never decides whether an attack succeeded.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.02  # slope of what is flat in the defense
SOFTNESS = 1.0  # logits over which a vote turns


def lead_of(scores: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Each class's score less the largest of the others."""
    top = scores.topk(2, dim=1)
    first = torch.arange(scores.shape[1], device=scores.device) == top.indices[:, :1]
    return scores - torch.where(first, top.values[:, 1:], top.values[:, :1])


def leads_of_each(scores: Float[Tensor, "N V K"]) -> Float[Tensor, "N V K"]:
    """``lead_of`` in every view."""
    return lead_of(scores.flatten(0, 1)).view(scores.shape)


def soft_votes(logits: Float[Tensor, "N V K"], threshold: float | None) -> Float[Tensor, "N V K"]:
    """Votes between 0 and 1: ½ where the confidence is at the threshold, or the class level with the best other one."""
    logits = logits.float()
    if threshold is None:
        beyond = leads_of_each(logits)
    else:  # log-odds of the confidence, which do not saturate as it does
        others = logits.unsqueeze(-2).masked_fill(
            torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device), -torch.inf
        )
        limit = max(threshold, 1e-6)
        beyond = logits - others.logsumexp(-1) - math.log(limit / (1 - limit))
    return torch.sigmoid(beyond / SOFTNESS) + LEAK * torch.tanh(beyond / 20)


def leaky(values: Tensor, low: float, high: float) -> Tensor:
    """Values clipped to [low, high], with a small slope beyond."""
    kept = values.clamp(low, high)
    return kept + LEAK * (values - kept)
