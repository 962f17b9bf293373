"""The layers of somebody's own network behind its preprocessing: colours in another order, mean and std of a channel."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from certipatch.bounds import layers
from certipatch.bounds.known_layers import Make, Precision
from certipatch.bounds.layers import Linear, Op
from certipatch.bounds.trace import Step, check_calls, trace
from certipatch.errors import InputError
from certipatch.models.adapters.adapted import Adapted


def steps_of(model: nn.Module, picture: tuple[int, int, int]) -> tuple[Step, ...]:
    """``trace.trace``, and the steps before and behind the network if ``model`` is an adapter.

    Errors: InputError if its preprocessing resizes images of ``picture`` (C, H, W), or changes their channels.
    """
    if not isinstance(model, Adapted):
        return trace(model)
    preprocessing, name = model.preprocessing, f"interval bounds: {model.name}"
    if picture[0] != preprocessing.channels:
        raise InputError(f"{name} reads {preprocessing.channels} channels; the pictures have {picture[0]}")
    if preprocessing.size is not None and preprocessing.size != picture[1:]:
        have, want = ("x".join(map(str, size)) for size in (picture[1:], preprocessing.size))
        raise InputError(
            f"{name} resizes pictures of {have} to {want}, which has no bounds: give it pictures of {want}"
        )
    check_calls(model)
    device = next((p.device for p in model.parameters()), None)
    scale, shift = (
        torch.tensor(x, dtype=torch.float64, device=device).expand(preprocessing.channels)
        for x in (preprocessing.std, preprocessing.mean)
    )
    make = _preprocessed(preprocessing.scale / scale, -shift / scale, preprocessing.order == "BGR")
    first = [Step("preprocessing", (i,), each) for i, each in enumerate(make)]
    moved = [replace(step, inputs=tuple(i + len(first) for i in step.inputs)) for step in trace(model.network)]
    if model.kept is not None:
        moved[-1] = replace(moved[-1], make=_rows_of(moved[-1], model.kept, name))
    return (*first, *moved)


def _preprocessed(scale: Tensor, shift: Tensor, swapped: bool) -> list[Make]:
    def affine(at: Precision) -> Op:
        factor, term = (at.of(x)[:, None, None] for x in (scale, shift))
        return layers.Scale(factor, term, 4 * at.eps)

    swap: list[Make] = [lambda at: layers.Reversed()] if swapped else []
    return [*swap, affine]


def _rows_of(last: Step, kept: Tensor, name: str) -> Make:
    """The last layer with the logits of some classes only."""

    def make(at: Precision) -> Op:
        op = last.make(at)
        if not isinstance(op, Linear):
            raise InputError(f"{name} answers with some of its classes, and does not end in a linear layer")
        rows = kept.to(op.weight.device)
        return Linear(op.weight[rows], None if op.bias is None else op.bias[rows], op.eps)

    return make
