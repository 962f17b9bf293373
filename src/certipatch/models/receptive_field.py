"""Receptive fields of a network's last map, from its layers (Araujo, Norris & Sim 2019), never from a formula.

For every node of the traced network and every axis it keeps the size, stride and offset of its cells' receptive fields.
A layer that is not known by name is refused: it could let a cell see the whole image.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import fx, nn
from torch.nn import functional as F

from certipatch.errors import InputError
from certipatch.models.layers import Crop, Position, Resize
from certipatch.views import ReceptiveFields


@final
@dataclass(frozen=True)
class Axis:
    """Cell i of ``cells`` reads input pixels ``offset + i·stride … + size − 1`` of one axis."""

    cells: int
    size: int = 1
    stride: int = 1
    offset: int = 0


Field = tuple[Axis, Axis]  # rows, columns

POINTWISE_FUNCTIONS = {F.relu, torch.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, F.leaky_relu}
POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous"}
SUMS = {operator.add, operator.iadd, torch.add}


def receptive_fields(model: nn.Module, image_size: tuple[int, int]) -> ReceptiveFields:
    """Compute the pixels on which each cell of the map of local logits depends, for images of (H, W) pixels.

    Args:
        model: maps images (B, C, H, W) to a map (B, K, h, w), or has such a part ``local``. In eval mode: a batch
            norm in training mode lets every cell see every pixel.

    Errors: InputError that names the layer that is unknown or unfit, and where the map would be empty.
    """
    local = getattr(model, "local", None)
    network = local if isinstance(local, nn.Module) else model
    try:
        traced = _Tracer().trace(network)
    except Exception as error:
        raise InputError(f"the network cannot be traced: {' '.join(str(error).split())[:200]}") from None
    modules, fields = dict(network.named_modules()), {}
    answer, resized = None, None
    for node in traced.nodes:
        inputs = [fields[n] for n in node.all_input_nodes if n in fields]
        if node.op == "placeholder":
            fields[node] = tuple(Axis(side) for side in image_size)
        elif node.op == "output":
            answer = inputs[0]
        elif node.op == "call_module" and isinstance(layer := modules[node.target], Resize):
            if node.all_input_nodes[0].op != "placeholder":
                raise InputError(f"receptive fields: {node.target} resizes a feature map; only pictures can be resized")
            resized = (layer.side, layer.side)
            fields[node] = tuple(Axis(layer.side) for _ in image_size)
        elif node.op == "call_module":
            fields[node] = _layer(modules[node.target], node.target, inputs)
        elif (node.op == "call_function" and node.target in POINTWISE_FUNCTIONS and len(inputs) == 1) or (
            node.op == "call_method" and node.target in POINTWISE_METHODS
        ):
            fields[node] = inputs[0]
        elif node.op == "call_function" and node.target in SUMS and len(inputs) == 2:
            fields[node] = _union(*inputs)
        else:
            raise InputError(f"receptive fields: {node.op} {_name(node.target)} is not known; nothing can be claimed")
    assert answer is not None
    if min(axis.cells for axis in answer) < 1:
        raise InputError(f"the map is empty: pictures of {image_size[0]}x{image_size[1]} are too small for the network")
    size, stride, offset, cells = (
        (getattr(answer[0], key), getattr(answer[1], key)) for key in ("size", "stride", "offset", "cells")
    )
    return ReceptiveFields(size, stride, offset, cells, resized)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Crop | Position | Resize) or super().is_leaf_module(m, module_qualified_name)


def _name(target: object) -> str:
    return str(target if isinstance(target, str) else getattr(target, "__name__", target))


def _union(one: Field, two: Field) -> Field:
    result = []
    for a, b in zip(one, two, strict=True):
        if (a.cells, a.stride) != (b.cells, b.stride):
            raise InputError(
                f"receptive fields: a map of {a.cells} cells is added to one of {b.cells}; crop one of them"
            )
        offset = min(a.offset, b.offset)
        result.append(replace(a, offset=offset, size=max(a.offset + a.size, b.offset + b.size) - offset))
    return result[0], result[1]


def _layer(layer: nn.Module, name: str, inputs: list[Field]) -> Field:
    kind = type(layer)
    if kind not in LAYERS:
        raise InputError(f"receptive fields: layer {name} ({kind.__name__}) is not known; nothing can be claimed")
    if len(inputs) != 1:
        raise InputError(f"receptive fields: layer {name} ({kind.__name__}) reads {len(inputs)} maps")
    return LAYERS[kind](layer, name, inputs[0])


def _same(layer: nn.Module, name: str, field: Field) -> Field:
    return field


def _batch_norm(layer: nn.Module, name: str, field: Field) -> Field:
    if layer.training or not getattr(layer, "track_running_stats", True):
        raise InputError(f"receptive fields: batch norm {name} uses statistics of the whole batch; call model.eval()")
    return field


def _slide(layer: nn.Module, name: str, field: Field) -> Field:
    """Convolution and pooling: cell i reads cells i·stride − padding + j·dilation, j = 0 … kernel − 1."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise InputError(f"receptive fields: {name} pads with {layer.padding_mode}, which shows pixels from elsewhere")
    if isinstance(layer.padding, str):
        raise InputError(f"receptive fields: {name} has padding={layer.padding!r}; give it as numbers")
    result = []
    for number, axis in enumerate(field):
        kernel, stride, padding, dilation = (
            _of_axis(getattr(layer, key, 1), number) for key in ("kernel_size", "stride", "padding", "dilation")
        )
        reach, up = dilation * (kernel - 1), bool(getattr(layer, "ceil_mode", False))
        cells = (math.ceil if up else math.floor)((axis.cells + 2 * padding - reach - 1) / stride) + 1
        if up and (cells - 1) * stride >= axis.cells + padding:
            cells -= 1  # torch lets no window start in the padding behind
        result.append(
            Axis(
                max(cells, 0),
                axis.size + reach * axis.stride,
                axis.stride * stride,
                axis.offset - padding * axis.stride,
            )
        )
    return result[0], result[1]


def _crop(layer: nn.Module, name: str, field: Field) -> Field:
    assert isinstance(layer, Crop)
    rows, columns = (
        replace(axis, cells=axis.cells - 2 * layer.margin, offset=axis.offset + layer.margin * axis.stride)
        for axis in field
    )
    return rows, columns


def _of_axis(value: int | tuple[int, ...], axis: int) -> int:
    return value if isinstance(value, int) else value[axis if len(value) > 1 else 0]


LAYERS: dict[type, Callable[[nn.Module, str, Field], Field]] = {
    nn.Conv2d: _slide,
    nn.MaxPool2d: _slide,
    nn.AvgPool2d: _slide,
    nn.BatchNorm2d: _batch_norm,
    Crop: _crop,
    **dict.fromkeys(
        (Position, nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout), _same
    ),
}
