"""The functions and methods that bounds can pass, by the call of a traced network; each read into a layer, or refused."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from certipatch.bounds import layers, pooling
from certipatch.bounds.known_layers import MODULES, Make, Precision, flatten, monotone, refuse
from certipatch.bounds.layers import Op


class Reader(Protocol):
    """Goes through a traced network."""

    values: dict[fx.Node, int]
    """Numbers of the nodes that depend on the image."""
    sizes: set[fx.Node]
    """Nodes that only read shapes, or are constants."""

    def constant(self, value: Any, name: str) -> Callable[[], Tensor]:
        """A number, or a tensor that the network holds."""
        ...


Read = Callable[[Reader, fx.Node, str], Make]


def _only(names: dict[str, Any], defaults: dict[str, Any], node: fx.Node, name: str) -> dict[str, Any]:
    """Arguments of a function after the first, by name."""
    given = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "inplace"}
    given = {key: value for key, value in given.items() if key != "input"}
    if len(node.args) > len(names) + 1 or given.keys() - names.keys():
        refuse(name, "it is called with arguments that are not known")
    if any(isinstance(value, fx.Node) for value in given.values()):
        refuse(name, "its arguments are computed")
    return defaults | given


def _plain(function: Callable[[Tensor], Tensor], exact: bool = False) -> Read:
    def read(reader: Reader, node: fx.Node, name: str) -> Make:
        _only({"inplace": None}, {}, node, name)
        return lambda at: monotone(function, at, exact)

    return read


def _as_module(build: Callable[..., nn.Module], *names: str) -> Read:
    """A function that computes the same as a module with settings of the same names."""

    def read(reader: Reader, node: fx.Node, name: str) -> Make:
        settings = _only(dict.fromkeys((*names, "inplace")), {}, node, name)
        settings.pop("inplace", None)
        module = build(**settings)
        return partial(MODULES[type(module)], module, name)

    return read


def _functional_dropout(p: float = 0.5, training: bool = True) -> nn.Module:
    return nn.Dropout(p).train(training)


def _flattened(reader: Reader, node: fx.Node, name: str) -> Make:
    settings = _only({"start_dim": 0, "end_dim": -1}, {"start_dim": 0, "end_dim": -1}, node, name)
    module = nn.Flatten(**settings)
    return partial(flatten, module, name)


def _viewed(reader: Reader, node: fx.Node, name: str) -> Make:
    """``x.view(len(x), -1)``, however the length is asked for; -1 may be the other size, beside a number."""
    shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    first, last = shape if isinstance(shape, tuple | list) and len(shape) == 2 else (None, None)
    length = (isinstance(first, fx.Node) and first in reader.sizes) and (
        (first.op == "call_method" and first.args[1:] == (0,))
        or (first.target is operator.getitem and first.args[1] == 0)
    )
    number = last if isinstance(last, int) and last > 0 else None
    if not (length and (last == -1 or number)) and not (first == -1 and number):
        refuse(name, "only x.view(x.size(0), -1) is known, and x.view(-1, n)")
    return lambda at: layers.Flatten(number)


def _mean(reader: Reader, node: fx.Node, name: str) -> Make:
    settings = _only({"dim": None, "keepdim": None}, {"dim": None, "keepdim": False}, node, name)
    dim = settings["dim"]
    if not isinstance(dim, tuple | list) or sorted(d % 4 for d in dim) != [2, 3]:
        refuse(name, f"it is over the axes {dim}, not over rows and columns")
    return lambda at: pooling.Mean(bool(settings["keepdim"]), at.eps)


def _concatenate(reader: Reader, node: fx.Node, name: str) -> Make:
    maps = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim not in (1, -3) or not isinstance(maps, tuple | list) or len(set(maps)) < len(maps):
        refuse(name, f"along the axis {dim}, or of a map with itself")
    return lambda at: layers.Concatenate()


def _sum(reader: Reader, node: fx.Node, name: str) -> Make:
    if len(node.args) != 2 or node.kwargs:
        refuse(name, "it is called with arguments that are not known")
    maps = [x for x in node.args if isinstance(x, fx.Node) and x in reader.values]
    if not maps:
        refuse(name, "of constants alone; make the sum a buffer")
    if len(maps) == 2:
        if maps[0] is maps[1]:
            return lambda at: layers.Scale(_number(2.0, at), _number(0.0, at), at.eps)
        return lambda at: layers.Add(at.eps)
    value = reader.constant(node.args[1] if node.args[0] is maps[0] else node.args[0], name)
    return lambda at: layers.Scale(_number(1.0, at), _broad(value(), at, name), at.eps)


def _difference(reader: Reader, node: fx.Node, name: str) -> Make:
    maps = [x for x in node.args if isinstance(x, fx.Node) and x in reader.values]
    if len(node.args) != 2 or node.kwargs or len(maps) != 1:
        refuse(name, "only differences to a constant have bounds")
    if node.args[0] is maps[0]:
        value = reader.constant(node.args[1], name)
        return lambda at: layers.Scale(_number(1.0, at), -_broad(value(), at, name), at.eps)
    value = reader.constant(node.args[0], name)
    return lambda at: layers.Scale(_number(-1.0, at), _broad(value(), at, name), at.eps)


def _negative(reader: Reader, node: fx.Node, name: str) -> Make:
    _only({}, {}, node, name)
    return lambda at: layers.Scale(_number(-1.0, at), _number(0.0, at), at.eps)


def _product(reader: Reader, node: fx.Node, name: str) -> Make:
    maps = [x for x in node.args if isinstance(x, fx.Node) and x in reader.values]
    if len(node.args) != 2 or node.kwargs or len(maps) != 1:
        refuse(name, "only products with constants have bounds")
    value = reader.constant(node.args[1] if node.args[0] is maps[0] else node.args[0], name)
    return lambda at: layers.Scale(_broad(value(), at, name), _number(0.0, at), at.eps)


def _quotient(reader: Reader, node: fx.Node, name: str) -> Make:
    if len(node.args) != 2 or node.kwargs or node.args[0] not in reader.values or node.args[1] in reader.values:
        refuse(name, "only a quotient by a constant has bounds")
    value = reader.constant(node.args[1], name)

    def make(at: Precision) -> Op:
        by = _broad(value(), at, name)
        if not bool((by != 0).all()):
            refuse(name, "it divides by 0")
        return layers.Scale(1 / by, _number(0.0, at), 2 * at.eps)

    return make


def _number(value: float, at: Precision) -> Tensor:
    return torch.tensor(value, dtype=at.dtype)


def _broad(value: Tensor, at: Precision, name: str) -> Tensor:
    """A constant that is the same for all images and cells of a map: a number, or one for each channel."""
    if value.numel() == 1:
        return at.of(value).reshape(())
    if value.ndim not in (3, 4) or value.numel() != value.shape[-3]:
        refuse(name, f"a constant of the shape {tuple(value.shape)} is not the same for all pictures and cells")
    return at.of(value).reshape(-1, 1, 1)


IN_PLACE: set[Any] = {operator.iadd, operator.imul, operator.isub, operator.itruediv}
_POOL = ("kernel_size", "stride", "padding")
FUNCTIONS: dict[Any, Read] = {
    **dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_), _plain(torch.relu, exact=True)),
    F.relu6: _plain(F.relu6, exact=True),
    **dict.fromkeys((torch.tanh, F.tanh), _plain(torch.tanh)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid), _plain(torch.sigmoid)),
    F.dropout: _as_module(_functional_dropout, "p", "training"),
    F.leaky_relu: _as_module(nn.LeakyReLU, "negative_slope"),
    F.elu: _as_module(nn.ELU, "alpha"),
    F.softplus: _as_module(nn.Softplus, "beta", "threshold"),
    F.avg_pool2d: _as_module(nn.AvgPool2d, *_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    F.adaptive_avg_pool2d: _as_module(nn.AdaptiveAvgPool2d, "output_size"),
    F.max_pool2d: _as_module(nn.MaxPool2d, *_POOL, "dilation", "ceil_mode", "return_indices"),
    torch.flatten: _flattened,
    torch.mean: _mean,
    torch.cat: _concatenate,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _sum),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _difference),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _product),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _quotient),
    **dict.fromkeys((operator.neg, torch.neg), _negative),
}
METHODS: dict[Any, Read] = {
    **dict.fromkeys(("relu", "relu_"), _plain(torch.relu, exact=True)),
    "tanh": _plain(torch.tanh),
    "sigmoid": _plain(torch.sigmoid),
    "flatten": _flattened,
    **dict.fromkeys(("view", "reshape"), _viewed),
    "mean": _mean,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
    "contiguous": lambda reader, node, name: lambda at: layers.Same(),
}
