"""PatchGuard's analysis (Xiang et al. 2021, sections V-C and D) as functions of local evidence."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.rules import RobustMask

CAUSES = ("exact", "rival unmasked", "benign window", "overlapping window")


def masked_predictions(logits: Float[Tensor, "B V K"], grid: tuple[int, int], side: int) -> Int64[Tensor, "B W"]:
    """The class of largest sum when each box of ``side`` x ``side`` cells is left out; (B, 1) for side 0."""
    local = logits.double().transpose(1, 2).unflatten(2, grid)
    total = local.sum((2, 3))
    if side == 0:
        return total.argmax(1, keepdim=True)
    if side > min(grid):
        raise ValueError(f"a window of {side}x{side} cells does not fit {grid[0]}x{grid[1]} cells")
    inside = F.avg_pool2d(local, side, stride=1).flatten(2) * side**2
    return (total[:, :, None] - inside).argmax(1)


def clipped_predictions(logits: Float[Tensor, "B V K"], low: float, high: float) -> Int64[Tensor, " B"]:
    """The class of largest sum of logits clipped to [low, high]."""
    return logits.double().clamp(low, high).sum(1).argmax(1)


def windows_masked(scores: Float[Tensor, "B V K"], rule: RobustMask) -> Bool[Tensor, " B"]:
    """Return True if the predicted class loses a window on the clean image: a false positive of detection."""
    label = rule.predict(scores)
    own = scores.double().clamp(0, rule.clip).gather(2, label[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
    heaviest = (own @ members(rule).double().T).amax(1)
    if rule.threshold == 1:
        return torch.zeros_like(heaviest, dtype=torch.bool)
    return heaviest > rule.threshold * own.sum(1)


def failure_cause(
    scores: Float[Tensor, "B V K"],
    label: Int64[Tensor, " B"],
    sees: Bool[Tensor, "L V"],
    rule: RobustMask,
) -> Int64[Tensor, " B"]:
    """The weakest cause that changes a prediction: an index into ``CAUSES``, or −1 if no cause suffices.

    Each cause gives the attacker more than the one before, so that the first to suffice is well defined:

    exact: both classes lose just what the patch touches; what is left outside favours a rival.
    rival unmasked: the rival also keeps evidence of the patch that its own mask does not take.
    benign window: the true class also loses a window that the patch does not touch.
    overlapping window: the patch feeds a window that overlaps it until that one is masked.

    A literal reading of the theorem of ``rules.RobustMask``, in float64, one location after the other.
    """
    e = scores.double().clamp(0, rule.clip)
    batch, views, _ = e.shape
    threshold, keep, clip = rule.threshold, 1 - rule.threshold, rule.clip
    finite = 0.0 if clip == torch.inf else clip
    windows, slack = members(rule).double(), 4 * views * torch.finfo(torch.float64).eps * e.sum(1).amax(1)
    picture = torch.arange(batch)
    cause = torch.full((batch,), len(CAUSES))
    for row in sees:
        size, touched = row.sum(), windows @ row.double()
        outside = e * (~row)[:, None]
        total, own = outside.sum(1), outside[picture, :, label]
        rivals = total + (size * clip if size > 0 else 0)
        benign = overlapping = torch.zeros_like(own[:, 0])
        if threshold < 1:
            left = (1 - windows) @ outside + (size - touched)[:, None] * finite
            if clip == torch.inf:
                left[:, touched < size] = torch.inf
            rivals = torch.minimum(rivals, left.amin(1) / keep)
            held = own @ windows.T
            enough = held + keep * touched * finite >= threshold * own.sum(1, keepdim=True) - slack[:, None]
            if clip == torch.inf:
                enough |= touched > 0
            held = held * (enough & ((touched > 0) | (held > 0)))
            benign, overlapping = (held * (touched == 0)).amax(1), held.amax(1)
        value = own.sum(1)
        stages = ((value, total), (value, rivals), (value - benign, rivals), (value - overlapping, rivals))
        for stage, (mine, theirs) in enumerate(stages):
            lead = mine[:, None] - theirs
            lead[picture, label] = torch.inf
            cause = torch.where(lead.amin(1) <= slack, cause.clamp(max=stage), cause)
    return torch.where(cause == len(CAUSES), -1, cause)


def members(rule: RobustMask) -> Bool[Tensor, "W V"]:
    """The rule's windows, one row each."""
    assert not isinstance(rule.windows, Tensor)
    return rule.windows.members


def looks(layers: int, kernel: int = 3) -> Float[Tensor, " r"]:
    """The number of paths from each cell of the receptive field to an output cell of ``layers`` 1-D convolutions."""
    counts = torch.ones(1, dtype=torch.float64)
    for _ in range(layers):
        counts = F.conv1d(counts[None, None], torch.ones(1, 1, kernel, dtype=torch.float64), padding=kernel - 1)[0, 0]
    return counts


def attention(model: nn.Module, images: Iterable[Float[Tensor, "B C H W"]], cell: int) -> Float[Tensor, "H W"]:
    """Mean over images of |∂ (top local logit of ``cell``) / ∂ pixel|, summed over channels."""
    total, n = None, 0
    for batch in images:
        batch = batch.clone().requires_grad_(True)
        with torch.enable_grad():
            local = model(batch)[:, cell]
            (gradient,) = torch.autograd.grad(local.amax(1).sum(), batch)
        magnitude = gradient.abs().sum((0, 1))
        total = magnitude if total is None else total + magnitude
        n += len(batch)
    assert total is not None
    return total / n
