"""The last layers of networks that answer together, as one layer behind all of them.

The mean of two networks' logits is W₁x₁/2 + W₂x₂/2 + (b₁ + b₂)/2, one linear layer on (x₁, x₂). As such it is merged
with the margins, which is tighter than the difference of two bounds of sums.
"""

from collections.abc import Sequence

import torch

from certipatch.bounds.layers import Add, Concatenate, Flatten, Linear, Op, Pointwise, Same, Scale

MOST = 64  # linear layers that are joined

Inputs = tuple[tuple[int, ...], ...]


def joined_heads(
    ops: Sequence[Op], inputs: Inputs, shapes: Sequence[torch.Size]
) -> tuple[list[Op], Inputs, tuple[torch.Size, ...]]:
    """The same network, its last layer linear where its logits are a weighted sum of linear layers' answers.

    Args:
        ops: its layers; the answer of the last are the logits.
        inputs: which values each reads; 0 is the image, and layer i gives value i + 1.
        shapes: of all values, for one image.

    Layers that read the pixels themselves stay as they are: against sparse attackers each has its own bounds.
    """
    same = list(ops), inputs, tuple(shapes)
    if isinstance(ops[-1], Linear):
        return same
    parts, pixels = _parts(ops, inputs, len(ops)), _pixelwise(ops, inputs)
    if (
        parts is None
        or len({len(layer.weight) for layer, _ in parts}) > 1
        or any(value in pixels for _, value in parts)
    ):
        return same
    heads, read = [layer for layer, _ in parts], tuple(value for _, value in parts)
    ops, inputs = [*ops, Concatenate(), _side_by_side(heads)], (*inputs, read, (len(ops) + 1,))
    width = sum(layer.weight.shape[1] for layer in heads)
    return _needed(ops, inputs, (*shapes, torch.Size((1, width)), shapes[-1]))


def _pixelwise(ops: Sequence[Op], inputs: Inputs) -> set[int]:
    """Values of which each number depends on one pixel."""
    pixelwise = {0}
    for value, (op, read) in enumerate(zip(ops, inputs, strict=True), 1):
        if isinstance(op, Pointwise | Same | Flatten) and read[0] in pixelwise:
            pixelwise.add(value)
    return pixelwise


def _parts(ops: Sequence[Op], inputs: Inputs, value: int) -> list[tuple[Linear, int]] | None:
    """Linear layers, and the vectors that they read, whose answers add up to a value; None if it is no such sum."""
    if value == 0:
        return None
    op, read = ops[value - 1], inputs[value - 1]
    if isinstance(op, Linear):
        return [(op, read[0])]
    if not isinstance(op, Same | Add | Scale) or (isinstance(op, Scale) and op.scale.numel() + op.shift.numel() > 2):
        return None
    linear_parts: list[tuple[Linear, int]] = []
    for one in read:
        parts = _parts(ops, inputs, one)
        if parts is None or len(linear_parts) + len(parts) > MOST:
            return None
        linear_parts += parts
    if isinstance(op, Scale):
        linear_parts = [
            (_scaled(layer, op, first=number == 0), one) for number, (layer, one) in enumerate(linear_parts)
        ]
    return linear_parts


def _scaled(layer: Linear, by: Scale, first: bool) -> Linear:
    """scale·(Wx + b), and + shift for the first of a sum. Twice its ``eps`` pays for the products and the factor."""
    bias = torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias
    shift = by.shift if first else torch.zeros_like(by.shift)
    size = layer.bias_size * by.scale.abs() + shift.abs()
    return Linear(layer.weight * by.scale, bias * by.scale + shift, 2 * layer.eps, None, size)


def _side_by_side(heads: Sequence[Linear]) -> Linear:
    """Σ (W_i x_i + b_i) of the x_i in a row, of which there are no fewer numbers than layers: enough for its rounding."""
    bias = sum((layer.bias for layer in heads if layer.bias is not None), torch.zeros_like(heads[0].weight[:, 0]))
    size = sum((layer.bias_size for layer in heads), torch.zeros_like(bias))
    return Linear(torch.cat([layer.weight for layer in heads], 1), bias, max(layer.eps for layer in heads), None, size)


def _needed(
    ops: Sequence[Op], inputs: Inputs, shapes: Sequence[torch.Size]
) -> tuple[list[Op], Inputs, tuple[torch.Size, ...]]:
    """The network without the layers that its answer does not depend on."""
    kept = {len(ops)}
    for value in range(len(ops), 0, -1):
        if value in kept:
            kept.update(inputs[value - 1])
    order = sorted(kept | {0})
    number = {value: i for i, value in enumerate(order)}
    layers = order[1:]
    return (
        [ops[value - 1] for value in layers],
        tuple(tuple(number[read] for read in inputs[value - 1]) for value in layers),
        tuple(shapes[value] for value in order),
    )
