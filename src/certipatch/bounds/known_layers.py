"""The layers that bounds can pass, by their class; each made in the precision of the bounds, or refused by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.bounds import convolution, layers, pooling
from certipatch.bounds.layers import Op, Pair
from certipatch.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Precision:
    """Precision of bounds: computed in ``dtype``; ``eps`` > 0 rounds them outward."""

    dtype: torch.dtype
    eps: float

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


Make = Callable[[Precision], Op]


def refuse(name: str, why: str = "no bounds are known for it") -> NoReturn:
    """InputError that names a layer, method or function."""
    raise InputError(f"interval bounds: {name}: {why}")


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _linear(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.Linear)
    return layers.Linear(at.of(layer.weight), None if layer.bias is None else at.of(layer.bias), at.eps)


def _conv(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros":
        refuse(name, f"it pads with {layer.padding_mode}, not with zeros")
    if isinstance(layer.padding, str):
        left, right, top, bottom = 0, 0, 0, 0
        if layer.padding == "same":
            down, across = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
            left, right, top, bottom = across // 2, across - across // 2, down // 2, down - down // 2
        padding = (left, right, top, bottom)
    else:
        padding = (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])
    return convolution.Conv(
        at.of(layer.weight),
        None if layer.bias is None else at.of(layer.bias),
        _pair(layer.stride),
        padding,
        _pair(layer.dilation),
        layer.groups,
        at.eps,
    )


def _batch_norm(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.BatchNorm2d)
    if layer.training or layer.running_mean is None or layer.running_var is None:
        refuse(name, "it uses statistics of the whole batch; call model.eval()")
    scale = (at.of(layer.running_var) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * at.of(layer.weight)
    moved = at.of(layer.running_mean) * scale
    bias = torch.zeros_like(moved) if layer.bias is None else at.of(layer.bias)
    scale, shift, terms = (t[:, None, None] for t in (scale, bias - moved, bias.abs() + moved.abs()))
    return layers.Scale(scale, shift, at.eps, terms)


def _dropout(layer: nn.Module, name: str, at: Precision) -> Op:
    if layer.training and getattr(layer, "p", 0.0) > 0:
        refuse(name, "it is random in training mode; call model.eval()")
    return layers.Same()


def flatten(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.Flatten)
    if (layer.start_dim, layer.end_dim) not in ((1, -1), (1, 3)):
        refuse(name, f"it flattens from {layer.start_dim} to {layer.end_dim}, not all but the batch")
    return layers.Flatten()


def _max_pool(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.MaxPool2d)
    if layer.return_indices:
        refuse(name, "it returns indices")
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    return pooling.MaxPool(kernel, stride, _pair(layer.padding), _pair(layer.dilation), layer.ceil_mode)


def _avg_pool(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.AvgPool2d)
    sizes = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)
    if layer.divisor_override is not None and layer.divisor_override < 0:
        refuse(name, f"its divisor {layer.divisor_override} is negative")
    return pooling.AvgPool(*sizes, layer.ceil_mode, layer.count_include_pad, layer.divisor_override, at.eps)


def _adaptive(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.AdaptiveAvgPool2d)
    if layer.output_size not in (1, (1, 1)):
        refuse(name, f"it pools to {layer.output_size}, not to 1")
    return pooling.Mean(True, at.eps)


def monotone(function: Callable[[Tensor], Tensor], at: Precision, exact: bool = False, floor: float = 0.0) -> Op:
    """A library's function, trusted to err by at most 8 eps of 1 and of its value."""
    return layers.Monotone(function, 0.0 if exact else 8 * at.eps, floor)


def _leaky(slope: float, name: str, at: Precision) -> Op:
    if slope < 0:
        refuse(name, f"with the slope {slope:g} it is not monotone")
    return monotone(partial(F.leaky_relu, negative_slope=slope), at)


def _elu(alpha: float, name: str, at: Precision) -> Op:
    if alpha < 0:
        refuse(name, f"with alpha {alpha:g} it is not monotone")
    return monotone(partial(F.elu, alpha=alpha), at, floor=8 * at.eps * alpha)


def _softplus(beta: float, threshold: float, name: str, at: Precision) -> Op:
    if beta <= 0:
        refuse(name, f"with beta {beta:g} it is not monotone")
    gap = (
        math.log1p(math.exp(-threshold)) / beta if threshold > -30 else math.inf
    )  # it falls by so much at the threshold
    if not gap < math.inf:
        refuse(name, f"with the threshold {threshold:g} it is not monotone")
    return monotone(partial(F.softplus, beta=beta, threshold=threshold), at, floor=gap)


MODULES: dict[type, Callable[[Any, str, Precision], Op]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.Identity: lambda layer, name, at: layers.Same(),
    nn.Flatten: flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.ReLU: lambda layer, name, at: monotone(torch.relu, at, exact=True),
    nn.ReLU6: lambda layer, name, at: monotone(F.relu6, at, exact=True),
    nn.Tanh: lambda layer, name, at: monotone(torch.tanh, at),
    nn.Sigmoid: lambda layer, name, at: monotone(torch.sigmoid, at),
    nn.LeakyReLU: lambda layer, name, at: _leaky(layer.negative_slope, name, at),
    nn.ELU: lambda layer, name, at: _elu(layer.alpha, name, at),
    nn.Softplus: lambda layer, name, at: _softplus(layer.beta, layer.threshold, name, at),
}
