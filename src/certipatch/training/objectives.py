"""Training objectives on the evidence of views: pure functions of logits, labels and the relation ``sees``."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Float[Tensor, "B V K"], target: Int64[Tensor, " B"]) -> Float[Tensor, ""]:
    """Mean cross entropy of all views, as in ablated training (Levine & Feizi 2020, section 2.2.1)."""
    return F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(logits.shape[1]))


def soft_votes(logits: Float[Tensor, "B V K"], threshold: float | None, width: float) -> Float[Tensor, "B V K"]:
    """A smooth stand-in for votes: sigmoid((softmax − θ) / width), or the softmax itself for top-class votes."""
    confidence = torch.softmax(logits, dim=-1)
    return confidence if threshold is None else torch.sigmoid((confidence - threshold) / width)


def worst_vote_margin(
    votes: Float[Tensor, "B V K"], target: Int64[Tensor, " B"], sees: Bool[Tensor, "L V"]
) -> Float[Tensor, "B L K"]:
    """The theorem's margin, n_y(out) − n_k(out) − |A|, for every location and rival; +inf at k = y.

    With true votes this is what ``rules.Vote`` certifies; with soft votes its gradient says which views to improve.
    """
    outside = (~sees).to(votes.dtype)
    batch, views, classes = votes.shape
    counts = (outside @ votes.permute(1, 0, 2).reshape(views, -1)).view(len(sees), batch, classes).transpose(0, 1)
    own = counts.gather(2, target[:, None, None].expand(-1, len(sees), 1))
    lead = own - counts - sees.sum(1).to(votes.dtype)[None, :, None]
    return lead.masked_fill(F.one_hot(target, classes).bool()[:, None], torch.inf)


def vote_margin_loss(
    logits: Float[Tensor, "B V K"],
    target: Int64[Tensor, " B"],
    sees: Bool[Tensor, "L V"],
    threshold: float | None,
    width: float = 0.1,
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """Raise the certificate itself: softplus of the smooth maximum over locations and rivals of minus the vote margin.

    Args:
        width: of the soft votes, in confidence; smaller is nearer to true votes.
        temperature: of the smooth maximum, in votes; smaller looks at the worst location only.

    Certipatch's own; the idea of training through the worst location is Metzen & Yatsura 2021 (BagCert).
    """
    margin = worst_vote_margin(soft_votes(logits, threshold, width), target, sees)
    return F.softplus(torch.logsumexp(-margin.flatten(1) / temperature, dim=1)).mean()


def without_heaviest_window(
    logits: Float[Tensor, "B V K"], target: Int64[Tensor, " B"], windows: Bool[Tensor, "W V"]
) -> Float[Tensor, "B K"]:
    """Mean logits over the views outside the window in which the true class has most positive evidence."""
    own = logits.gather(2, target[:, None, None].expand(-1, logits.shape[1], 1))[..., 0].clamp(min=0)
    heaviest = (own @ windows.to(own.dtype).T).argmax(1)
    shown = (~windows)[heaviest].to(logits.dtype)
    return (logits * shown[..., None]).sum(1) / shown.sum(1, keepdim=True).clamp(min=1)


def worst_mask_margin(
    scores: Float[Tensor, "B V K"],
    target: Int64[Tensor, " B"],
    sees: Bool[Tensor, "L V"],
    windows: Bool[Tensor, "W V"],
) -> Float[Tensor, "B L K"]:
    """The margin of ``rules.RobustMask`` at T = 0, if windows hold all of A, as a share of the views: L_y − t_k.

    Scores are ≥ 0. +inf at k = y.
    """
    outside = (~sees).to(scores.dtype)
    sums = outside @ scores
    index = target[:, None, None]
    own = scores.gather(2, index.expand(-1, scores.shape[1], 1))[..., 0]
    held = (own[:, None] * outside) @ windows.to(scores.dtype).T
    lower = sums.gather(2, index.expand(-1, len(sees), 1))[..., 0] - held.amax(2)
    lead = (lower[..., None] - sums) / scores.shape[1]
    return lead.masked_fill(F.one_hot(target, scores.shape[2]).bool()[:, None], torch.inf)


def mask_margin_loss(
    scores: Float[Tensor, "B V K"],
    target: Int64[Tensor, " B"],
    families: Sequence[tuple[Bool[Tensor, "_ _"], Bool[Tensor, "_ _"]]],
    temperature: float,
    scale: float,
) -> Float[Tensor, ""]:
    """Softplus of minus the smallest mask margin, smooth over locations and rivals, as a share of the views.

    Args:
        scores: evidence ≥ 0.
        families: ``sees`` (L, v) and windows (W, v) of each family of views, which follow each other along V. A place
            of one family goes with every place of another (columns and rows do under a square patch), so that a margin
            is the sum of one from each, and its smooth minimum is found per family.
        temperature: of the smooth minimum.
        scale: steepness of the loss of a margin.
    """
    parts = scores.split([sees.shape[1] for sees, _ in families], dim=1)
    total = torch.zeros_like(scores[:, 0])
    own = F.one_hot(target, scores.shape[2]).bool()
    for part, (sees, windows) in zip(parts, families, strict=True):
        margin = worst_mask_margin(part, target, sees, windows).masked_fill(own[:, None], 0.0)
        total = total + torch.logsumexp(-margin / (temperature * len(families)), dim=1)
    worst = -temperature * torch.logsumexp(total.masked_fill(own, -torch.inf), dim=1)
    return F.softplus(-scale * worst).mean()
