"""Adaptive losses: for every defense a differentiable *lead* of each class, which an attack raises.

``leads(defense, images)`` is (N, K): how far class k is from being the answer (of a detector: the answer without an
alarm); above 0 where it is, as far as the soft version of the defense knows. What is a step in the defense is soft here
(votes, masks, medians, ranks), and what is flat keeps a small slope (LEAK), so that no gradient dies: backward pass
differentiable approximation, Athalye, Carlini & Wagner 2018. Whether an attack succeeded is never decided here: the
defense itself answers.

A new defense with views needs nothing if its rule is known; a new rule needs one function, registered for
``rule_leads``: evidence (N, V, K) → leads (N, K).
"""

import math
from collections.abc import Callable
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from certipatch import evidence as ev
from certipatch.defenses.bagcert import BagCert
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.clipped_bagnet import ClippedBagNet
from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
from certipatch.defenses.digital_watermarking import DigitalWatermarking
from certipatch.defenses.empirical import EmpiricalDefense
from certipatch.defenses.masked import MaskedClassifier
from certipatch.defenses.patchcleanser import PatchCleanser
from certipatch.defenses.patchcure import PatchCURE
from certipatch.defenses.patchguard import PatchGuard
from certipatch.defenses.randomized_ablation import RandomizedAblation
from certipatch.errors import InputError
from certipatch.models.shared_front import SharedFront
from certipatch.rules import ClippedSum, DoubleMask, MaskedDetection, MinorityReports, RobustMask, Rule, Vote
from certipatch.rules.double_mask import number_of_masks
from certipatch.rules.order_statistics import OrderStatistic
from certipatch.views import PixelSets, Views
from certipatch.views.masks import pair_table
from certipatch.views.random import OneOf
from certipatch.views.render import render

LEAK = 0.02  # slope of what is flat in the defense
SOFTNESS = 1.0  # logits over which a vote turns
SAMPLED = 32  # random views behind one gradient of a sampled defense
EXACT = ev.Tolerance(0.0, 0.0)


def lead_of(scores: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Each class's score less the largest of the others."""
    top = scores.topk(2, dim=1)
    first = torch.arange(scores.shape[1], device=scores.device) == top.indices[:, :1]
    return scores - torch.where(first, top.values[:, 1:], top.values[:, :1])


@singledispatch
def leads(defense: object, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
    """Differentiable leads of all classes; ``generator`` draws what the defense draws. For a network: of its logits."""
    return bare_leads(defense, images, generator)


def bare_leads(defense: object, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
    """Leads of a defense's network alone: what a plain attack looks at, which knows nothing of the defense.

    With views: the mean of their logits. Behind masks: of the picture without any.
    """
    whole = isinstance(getattr(defense, "model", None), MaskedClassifier | SharedFront)
    if isinstance(defense, ViewDefense) and not whole:
        size = (images.shape[2], images.shape[3])
        return lead_of(view_logits(defense.model, defense.views_of(size), images).mean(1))
    network: Callable[[Tensor], Tensor] | None = getattr(defense, "unmasked", getattr(defense, "model", None))
    if network is None:
        raise InputError(f"there is no loss to attack {type(defense).__name__} with; register one for losses.leads")
    if getattr(network, "encoding", "picture") == "null":
        images = torch.cat([images, 1 - images], 1)
    return lead_of(network(images).float())


@leads.register
def _(defense: ViewDefense, images: Tensor, generator: Generator) -> Tensor:
    size = (images.shape[2], images.shape[3])
    return logit_leads(defense, view_logits(defense.model, defense.views_of(size), images), size)


def logit_leads(defense: ViewDefense, logits: Float[Tensor, "N V K"], size: tuple[int, int]) -> Float[Tensor, "N K"]:
    """Leads under a defense's rule, from the logits of all views of pictures of ``size`` (H, W)."""
    return rule_leads(defense.rule(size), soft_values(defense, logits))


@leads.register
def _(defense: RandomizedAblation, images: Tensor, generator: Generator) -> Tensor:
    """Expectation over transformations: soft votes of some random views, others at each step."""
    size = (images.shape[2], images.shape[3])
    family = defense.family(size)
    if isinstance(family, OneOf):
        index = None
        if getattr(defense.model, "encoding", "null") != "all-views":
            index = family.choose(size, SAMPLED, generator)
        logits = view_logits(defense.model, family.views, images, index)
    else:
        logits = view_logits(defense.model, PixelSets(family.draw(size, SAMPLED, generator)), images)
    return lead_of(soft_votes(logits, None).mean(1))


@leads.register
def _(defense: PatchCleanser, images: Tensor, generator: Generator) -> Tensor:
    """Through double masking: every mask alone, and with one second mask, drawn anew at each step; the largest masks. And
    the whole picture, where that decides."""
    pairs = defense.sizes((images.shape[2], images.shape[3]))[0]
    unmasked = None
    if defense.fallback == "unmasked":
        every = PixelSets(torch.ones_like(pairs.masks[:1]))
        unmasked = lead_of(view_logits(defense.unmasked, every, images)[:, 0].float())
    return masked_leads(defense.model, pairs, images, generator, unmasked)


@leads.register
def _(defense: PatchCURE, images: Tensor, generator: Generator) -> Tensor:
    """Through double masking on features; the front is passed once, forth and back."""
    back, pairs = defense.behind_front((images.shape[2], images.shape[3]))
    return masked_leads(back, pairs, defense.front.features(images), generator)


def masked_leads(
    model: nn.Module,
    pairs: Views,
    maps: Float[Tensor, "N C H W"],
    generator: Generator,
    unmasked: Float[Tensor, "N K"] | None = None,
) -> Float[Tensor, "N K"]:
    """Leads under double masking of pictures, or of the maps that a network reads; ``unmasked``: in the unmasked one."""
    number = number_of_masks(pairs.number((maps.shape[2], maps.shape[3])))
    table, every = pair_table(number), torch.arange(number)
    second = (every + torch.randint(1, max(2, number), (number,), generator=generator)) % number
    index = torch.cat([table[every, every], table[every, second]])
    logits = view_logits(model, pairs, maps, index).float()
    alone, paired = lead_of(logits.flatten(0, 1)).view(logits.shape).split(number, 1)
    return twice_masked(alone, paired, unmasked)


@leads.register
def _(defense: EmpiricalDefense, images: Tensor, generator: Generator) -> Tensor:
    """Through the cleaning itself."""
    return lead_of(defense.model(defense.cleaned(images)).float())


@leads.register
def _(defense: DigitalWatermarking, images: Tensor, generator: Generator) -> Tensor:
    """BPDA: the network sees the masked picture, the gradient comes back as if nothing had been masked."""
    return lead_of(defense.model(images + (defense.cleaned(images) - images).detach()).float())


def view_logits(
    model: nn.Module, views: Views, images: Float[Tensor, "N C H W"], index: Tensor | None = None
) -> Float[Tensor, "N v K"]:
    """The network's logits for views of every picture, as ``evidence.logits``, with gradients.

    Views beyond one forward pass of ``evidence.PIXELS`` pixels are computed again on the way back, to save memory.
    """
    encoding = getattr(model, "encoding", "null")
    if encoding == "all-views":
        every = model(images).to(images.dtype)
        return every if index is None else every[:, index]
    index = torch.arange(views.number((images.shape[2], images.shape[3]))) if index is None else index
    step = max(1, ev.PIXELS // images[:, 0].numel())

    def answers(pictures: Tensor, chosen: Tensor) -> Tensor:
        shown = render(encoding, pictures, views, chosen, getattr(model, "fill", 0.5))
        return model(shown.flatten(0, 1)).to(images.dtype).unflatten(0, shown.shape[:2])

    if len(index) <= step or not images.requires_grad:
        return torch.cat([answers(images, chosen) for chosen in index.split(step)], 1)
    parts = [checkpoint(answers, images, chosen, use_reentrant=False) for chosen in index.split(step)]
    return torch.cat([part for part in parts if isinstance(part, Tensor)], 1)


def soft_values(defense: ViewDefense, logits: Float[Tensor, "N V K"]) -> Float[Tensor, "N V K"]:
    """A defense's evidence with a gradient: soft where it votes, never quite flat where it saturates."""
    if isinstance(defense, DerandomizedSmoothing | BagCert):
        return soft_votes(logits, defense.threshold)
    if isinstance(defense, PatchGuard) and defense.kind == "prediction":
        return soft_votes(logits, None)
    values = defense.values(logits, EXACT)[0]
    if isinstance(defense, ClippedBagNet):
        values = values + LEAK * (defense.scale * logits - defense.shift)
    return values


def soft_votes(logits: Float[Tensor, "N V K"], threshold: float | None) -> Float[Tensor, "N V K"]:
    """Votes between 0 and 1: ½ where the confidence is at the threshold, or the class level with the best other one."""
    logits = logits.float()
    if threshold is None:
        beyond = lead_of(logits.flatten(0, 1)).view_as(logits)
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


@singledispatch
def rule_leads(rule: Rule, evidence: Float[Tensor, "N V K"]) -> Float[Tensor, "N K"]:
    """Leads of the classes under a rule, from soft evidence; under an unknown rule, of the mean over the views."""
    return lead_of(evidence.mean(1))


@rule_leads.register
def _(rule: Vote, evidence: Tensor) -> Tensor:
    return lead_of(evidence.sum(1))


@rule_leads.register
def _(rule: ClippedSum, evidence: Tensor) -> Tensor:
    """Clipped sums."""
    return lead_of(leaky(evidence, rule.lo, rule.hi).sum(1))


@rule_leads.register
def _(rule: RobustMask, evidence: Tensor) -> Tensor:
    """Soft masking: a mean of what the windows leave over, mostly of the least; used as far as masking is likely."""
    scores = leaky(evidence, 0.0, rule.clip)
    total = scores.sum(1)
    if rule.threshold == 1:
        return lead_of(total)
    width = 0.02 * total.detach().amax(1)[:, None].clamp(min=1e-3)
    left = rule._windows.outside(scores)  # (N, W, K)
    least = (torch.softmax(-left / width[:, None], 1) * left).sum(1)
    if rule.threshold == 0:
        return lead_of(least)
    masked = torch.sigmoid(((1 - rule.threshold) * total - least) / width)
    return lead_of(masked * least + (1 - masked) * total)


@rule_leads.register
def _(rule: OrderStatistic, evidence: Tensor) -> Tensor:
    """Soft median and trimmed mean: ranks beside the kept ones count a little."""
    views = evidence.shape[1]
    trim = rule.trimmed(views)
    rank = torch.arange(views, device=evidence.device, dtype=evidence.dtype)
    beyond = (trim - rank).clamp(min=0) + (rank - (views - trim - 1)).clamp(min=0)
    weight = torch.exp(-((beyond / max(1.0, 0.05 * views)) ** 2))
    ranked = leaky(evidence, rule.lo, rule.hi).sort(1).values
    return lead_of((ranked * (weight / weight.sum())[None, :, None]).sum(1))


@rule_leads.register
def _(rule: MaskedDetection, evidence: Tensor) -> Tensor:
    """The answer without an alarm, under every window."""
    windows = rule._windows
    kept = (~windows.members).sum(1).to(evidence.device)
    means = (windows.outside(evidence) / kept.clamp(min=1)[:, None])[:, kept > 0]
    slope = LEAK * (lead_of(evidence.mean(1)) + lead_of(means.flatten(0, 1)).view(means.shape).amin(1))
    return unseen(evidence.mean(1).softmax(1), means.softmax(2), rule.threshold) + slope.clamp(max=0)


@rule_leads.register
def _(rule: MinorityReports, evidence: Tensor) -> Tensor:
    """The answer to the whole picture without an alarm, under every mask."""
    slope = LEAK * lead_of((evidence[:, 0] + 1e-30).log())  # scores saturate, their logarithms do not
    return unseen(evidence[:, 0], evidence[:, 1:], rule.threshold) + slope.clamp(max=0)


def unseen(whole: Float[Tensor, "N K"], masked: Float[Tensor, "N W K"], threshold: float) -> Float[Tensor, "N K"]:
    """Leads as an answer that no masked one contradicts: under every mask class k leads, or nothing else scores above τ.

    The hardest masks of each class count, the weakest links of the attack.
    """
    ahead = lead_of(masked.flatten(0, 1)).view(masked.shape)
    others = masked - ahead
    hardest = torch.maximum(ahead, threshold - others).topk(min(3, masked.shape[1]), 1, largest=False).values
    return torch.minimum(lead_of(whole), hardest.mean(1))


@rule_leads.register
def _(rule: DoubleMask, evidence: Tensor) -> Tensor:
    """Double masking, from the full table of pairs."""
    said = lead_of(evidence.flatten(0, 1)).view(evidence.shape)
    ahead = said[:, rule.table(evidence)]
    alone = ahead.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    return twice_masked(alone, ahead.amax(2), said[:, -1] if rule.unmasked else None)


def twice_masked(
    alone: Float[Tensor, "N M K"], paired: Float[Tensor, "N M K"], unmasked: Float[Tensor, "N K"] | None = None
) -> Float[Tensor, "N K"]:
    """Leads under double masking: k has the majority of masks, or the whole picture, and no mask that disagrees passes.

    alone: k's lead under each mask. paired: its largest lead under that mask and a second one; above 0 a disagreer that
    says something else fails. The masks that are hardest to turn count, the weakest links of the attack.
    """
    hardest = torch.maximum(alone, paired).topk(min(3, alone.shape[1]), 1, largest=False).values.mean(1)
    otherwise = alone.median(1).values if unmasked is None else unmasked
    return torch.minimum(otherwise, hardest) + LEAK * alone.mean(1)
