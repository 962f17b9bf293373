"""Bounds against an attacker of any k pixels (Chiang et al. 2020, section 4.3).

The first linear layer or convolution z = Wx + b gains at most the k largest of what single pixels can add, all channels of
a pixel together: Σ_c max_δ W_c δ_c with x + δ in the box of attainable values, [0, 1] before any normalization. So

    Wx + b − top-k_p Σ_c max_δ(−W δ)  ≤  z  ≤  Wx + b + top-k_p Σ_c max_δ(W δ);

each end is attained. The layers behind it get ordinary bounds. The paper's equation 19 is for one channel, and lets
every pixel move by 1 up and down, |W|; that is weaker, and is not used.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.bounds.convolution import Conv
from certipatch.bounds.interval import Interval, widened
from certipatch.bounds.layers import Flatten, Linear, Op, Pointwise, Same
from certipatch.bounds.propagate import Passage, passage, rivals_of

MEMORY = 2**28  # bytes of the gains of single pixels that are held at once
CANDIDATES = 64  # pixels that are looked at first


def sparse_margins(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    pixels: int,
    *,
    dtype: torch.dtype | None = None,
    outward: bool = False,
    strength: float = 1.0,
    slack: Float[Tensor, " B"] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "B R"]:
    """Lower bounds of z_y − z_k under any ``pixels`` pixels, for all R = K − 1 rivals k ≠ y in their order.

    Arguments as in ``patch.patch_margins``. ``memory``: bytes held at once. Differentiable in the parameters and images.
    """
    passed = passage(model, (images.shape[1], images.shape[2], images.shape[3]), dtype, outward)
    return sparse_passed(passed, images, label, pixels, strength, slack, memory)


def sparse_passed(
    passed: Passage,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    pixels: int,
    strength: float = 1.0,
    slack: Float[Tensor, " B"] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "B R"]:
    """``sparse_margins`` of a network that has been read already."""
    images = images.to(passed.dtype)
    first = passed.ops[next((i for i, op in enumerate(passed.ops) if isinstance(op, Linear | Conv)), -1)]
    numbers = first.weight.numel() if isinstance(first, Linear | Conv) else 1
    if isinstance(first, Conv):  # one product per output cell, at most one for each pixel where the stride is 1
        numbers *= images.shape[2] * images.shape[3]
    step = max(1, memory // (4 * numbers * images.element_size()))
    parts = []
    for first in range(0, len(images), step):
        here = slice(first, first + step)
        off = None if slack is None else slack[here]
        parts.append(_margins(passed, images[here], label[here], pixels, strength, off))
    return torch.cat(parts)


def _margins(
    passed: Passage, images: Tensor, label: Tensor, pixels: int, strength: float, slack: Tensor | None
) -> Float[Tensor, "B R"]:
    """``clean`` holds the values that are still pixel by pixel, beside ``boxes``, the box of all that each can be."""
    shrunk = (1 - strength) * images
    clean: dict[int, Interval] = {0: Interval(images, images)}
    boxes, rivals = [Interval(shrunk, shrunk + strength)], rivals_of(label, passed.classes)
    for number, (op, inputs) in enumerate(zip(passed.ops, passed.inputs, strict=True), 1):
        if len(inputs) == 1 and inputs[0] in clean:
            before, box = clean[inputs[0]], boxes[inputs[0]]
            if isinstance(op, Pointwise | Same | Flatten):
                clean[number] = op.whole(before)
            elif passed.head is not None and op is passed.head:
                margins = _of_linear_network(passed.head, before, box, images.shape[1], pixels, label, rivals)
                if slack is None:
                    return margins
                whole = Interval(torch.minimum(before.lower, box.lower), torch.maximum(before.upper, box.upper))
                return passed.less_rounding(margins[:, None], whole.map(lambda x: x[:, None]), slack)[:, 0]
            elif isinstance(op, Conv) or (isinstance(op, Linear) and op.reads_all(before)):
                boxes.append(first_layer(op, before, box, images.shape[1], pixels))
                continue
        boxes.append(op.whole(*(boxes[i] for i in inputs)))  # of the box: weaker, and true for any layer
    return passed.margins(boxes[passed.before_head].map(lambda x: x[:, None]), label, rivals, slack)[:, 0]


def _of_linear_network(
    head: Linear, clean: Interval, box: Interval, channels: int, pixels: int, label: Tensor, rivals: Tensor
) -> Float[Tensor, "B R"]:
    """Margins of a network whose only layer is the head: those of (e_y − e_k)W, label by label."""
    margins = clean.lower.new_zeros(rivals.shape)
    for y in label.unique():
        chosen = (label == y).nonzero().flatten()
        others = rivals[chosen[0]]
        bias = None if head.bias is None else head.bias[y] - head.bias[others]
        layer = Linear(head.weight[y] - head.weight[others], bias, head.eps)
        own, free = (x.map(lambda x: x[chosen]) for x in (clean, box))  # noqa: B023
        margins = margins.index_put((chosen,), first_layer(layer, own, free, channels, pixels).lower)
    return margins


def first_layer(op: Op, clean: Interval, box: Interval, channels: int, pixels: int) -> Interval:
    """Bounds of a linear layer or convolution behind pixels, of which ``pixels`` may leave ``clean`` within ``box``."""
    assert isinstance(op, Linear | Conv)
    answer = op.whole(clean)
    up, down = box.upper - clean.lower, clean.upper - box.lower
    guard = 2 * op.guard
    sides = (up, down), (down, up)
    if isinstance(op, Linear):
        weight = op.weight.unflatten(1, (channels, -1))
        rises, falls = (x.reshape(len(x), channels, -1) for x in (up, down))
        rise = _most_of_linear(weight, rises, falls, pixels)
        fall = _most_of_linear(weight, falls, rises, pixels)
    else:
        gains = (_taps(op, *side) for side in sides)
        rise, fall = (
            (gain.topk(pixels, -1).values if pixels < gain.shape[-1] else gain).sum(-1).reshape(answer.shape)
            for gain in gains
        )
    return widened(answer.lower - fall, answer.upper + rise, guard * (rise + fall) if guard else 0.0)


def _most_of_linear(
    weight: Float[Tensor, "m C P"], plus: Float[Tensor, "B C P"], minus: Float[Tensor, "B C P"], pixels: int
) -> Float[Tensor, "B m"]:
    """Bound the gain of each output by ``pixels`` pixels, which may rise by ``plus`` and fall by ``minus``.

    The best pixels are found without gradients; the sum over them has the gradient of the sum over all.
    """
    outputs, channels, cells = weight.shape
    with torch.no_grad():
        best = _best_pixels(weight, plus, minus, min(pixels, cells))
    own = (best + cells * torch.arange(outputs, device=best.device)[:, None]).flatten()
    seen = (best + cells * torch.arange(len(plus), device=best.device)[:, None, None]).flatten()
    chosen = weight.transpose(0, 1).reshape(channels, -1).index_select(1, own)
    rise, fall = (x.transpose(0, 1).reshape(channels, -1).index_select(1, seen) for x in (plus, minus))
    gain = (chosen.clamp(min=0) * rise - chosen.clamp(max=0) * fall).sum(0)
    return gain.view(best.shape).sum(-1)


def _best_pixels(weight: Tensor, plus: Tensor, minus: Tensor, pixels: int) -> Int[Tensor, "B m k"]:
    """The pixels of largest gain for each image and output.

    No pixel gains more than it would if each of its channels could rise, and fall, by the most that any image lets
    it. The pixels of largest such gain are tried first; all others only where one of those could be among the best.
    """
    cells, tried = weight.shape[2], max(CANDIDATES, 8 * pixels)
    if cells <= tried:
        return _gains(weight[None], plus[:, None], minus[:, None]).topk(pixels, -1).indices
    limit, some = _gains(weight, plus.amax(0), minus.amax(0)).topk(tried + 1, -1)
    limit, some = limit[:, -1], some[:, :-1]
    part = weight.gather(2, some[:, None].expand(-1, weight.shape[1], -1))
    gains = _gains(part[None], *(x[:, :, some].transpose(1, 2) for x in (plus, minus)))
    largest, place = gains.topk(pixels, -1)
    best = some.expand(len(plus), -1, -1).gather(2, place)
    picture, output = (largest[..., -1] < limit).nonzero().T
    if len(picture):
        again = _gains(weight[output], plus[picture], minus[picture])
        best[picture, output] = again.topk(pixels, -1).indices
    return best


def _gains(weight: Float[Tensor, "*n C P"], plus: Float[Tensor, "*n C P"], minus: Float[Tensor, "*n C P"]) -> Tensor:
    return (weight.clamp(min=0) * plus - weight.clamp(max=0) * minus).sum(-2)


def _taps(op: Conv, plus: Tensor, minus: Tensor) -> Float[Tensor, "B Oij hw"]:
    """Compute the gain of each output of a convolution by each pixel under the kernel, (B, O·h·w, taps)."""

    def columns(x: Tensor) -> Tensor:
        shown = F.unfold(F.pad(x, op.padding), op.weight.shape[2:], op.dilation, 0, op.stride)
        return shown.view(len(x), op.groups, x.shape[1] // op.groups, -1, shown.shape[-1])  # (B, G, C/G, taps, cells)

    weight = op.weight.flatten(2).unflatten(0, (op.groups, -1))  # (G, O/G, C/G, taps)
    gain = torch.einsum("goct,bgctn->bgont", weight.clamp(min=0), columns(plus))
    gain = gain - torch.einsum("goct,bgctn->bgont", weight.clamp(max=0), columns(minus))
    return gain.flatten(1, 3)
