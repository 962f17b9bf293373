"""A network as a list of layers that bounds can pass: traced with torch.fx, each known by name or refused by name."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from certipatch.bounds import convolution, layers, pooling
from certipatch.bounds.layers import Op, Pair
from certipatch.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Precision:
    """How bounds are computed: in ``dtype``; ``eps`` > 0 rounds them outward."""

    dtype: torch.dtype
    eps: float

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


Make = Callable[[Precision], Op]


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One layer: its name in the network, the numbers of the values that it reads (0 is the picture), how it is made."""

    name: str
    inputs: tuple[int, ...]
    make: Make


def trace(model: nn.Module) -> tuple[Step, ...]:
    """The layers of a network that maps pictures (B, C, H, W) to logits (B, K), in order; step i gives value i + 1.

    Errors: InputError that names the layer or function for which no bounds are known.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise InputError(f"the network cannot be traced: {' '.join(str(error).split())[:200]}") from None
    return _Reader(model, graph).steps()


class _Reader:
    """Goes through a traced graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.model, self.graph, self.modules = model, graph, dict(model.named_modules())
        self.values: dict[fx.Node, int] = {}
        self.sizes: set[fx.Node] = set()
        self.found: list[Step] = []

    def steps(self) -> tuple[Step, ...]:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.values:
                    raise InputError("interval bounds: the network reads more than pictures")
                self.values[node] = 0
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node) or self.values.get(node.args[0]) != len(self.found):
                    raise InputError("interval bounds: the network's answer is not that of its last layer")
            elif node.op == "get_attr" or self._is_size(node):
                self.sizes.add(node)
            else:
                self._add(node)
        if not self.found:
            raise InputError("interval bounds: the network has no layers")
        return tuple(self.found)

    def _is_size(self, node: fx.Node) -> bool:
        """Whether a node only asks for shapes."""
        asks = (node.op == "call_method" and node.target in ("size", "dim")) or (
            node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")
        )
        takes = node.op == "call_function" and node.target is operator.getitem and node.args[0] in self.sizes
        return asks or takes

    def _add(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self.values]
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            name, kind = f"layer {node.target} ({type(module).__name__})", type(module)
            if kind not in MODULES or node.kwargs or len(node.args) != 1:
                _refuse(name)
            make, in_place = partial(MODULES[kind], module, name), bool(getattr(module, "inplace", False))
            make_now: Make = make
        else:
            name = f"{'method' if node.op == 'call_method' else 'function'} {_name(node.target)}"
            table = METHODS if node.op == "call_method" else FUNCTIONS
            if node.target not in table:
                _refuse(name)
            make_now = table[node.target](self, node, name)
            in_place = _name(node.target).endswith("_") or node.target in IN_PLACE or node.kwargs.get("inplace") is True
        if in_place:
            self._check_alone(node, name)
        self.found.append(Step(name, tuple(self.values[n] for n in inputs), make_now))
        self.values[node] = len(self.found)

    def _check_alone(self, node: fx.Node, name: str) -> None:
        """What a layer overwrites, no other may read, under whatever name."""
        while True:
            source = node.all_input_nodes[0]
            if any(user is not node and not self._is_size(user) for user in source.users):
                _refuse(name, "it overwrites a value that another layer reads too; set inplace=False")
            if source.op == "call_module":
                passes = isinstance(self.modules[str(source.target)], ALIASES)
            else:
                passes = _name(source.target) in ("flatten", "view", "reshape", "contiguous", "dropout")
            if not passes:
                return
            node = source

    def constant(self, value: Any, name: str) -> Callable[[], Tensor]:
        """A number, or a tensor that the network holds."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return lambda: torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            parts = str(value.target).split(".")
            return lambda: _attribute(self.model, parts)
        _refuse(f"{name} of {value}")


def _attribute(model: nn.Module, parts: Sequence[str]) -> Tensor:
    found: Any = model
    for part in parts:
        found = getattr(found, part)
    return found


ALIASES = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)  # their answer may be what they read, not a copy


def _refuse(name: str, why: str = "no bounds are known for it") -> NoReturn:
    raise InputError(f"interval bounds: {name}: {why}")


def _name(target: object) -> str:
    return str(target if isinstance(target, str) else getattr(target, "__name__", target))


# Layers ----------------------------------------------------------------------------------------------------------


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _linear(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.Linear)
    return layers.Linear(at.of(layer.weight), None if layer.bias is None else at.of(layer.bias), at.eps)


def _conv(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros":
        _refuse(name, f"it pads with {layer.padding_mode}, not with zeros")
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
        _refuse(name, "it uses statistics of the whole batch; call model.eval()")
    scale = (at.of(layer.running_var) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * at.of(layer.weight)
    moved = at.of(layer.running_mean) * scale
    bias = torch.zeros_like(moved) if layer.bias is None else at.of(layer.bias)
    scale, shift, terms = (t[:, None, None] for t in (scale, bias - moved, bias.abs() + moved.abs()))
    return layers.Scale(scale, shift, at.eps, terms)


def _dropout(layer: nn.Module, name: str, at: Precision) -> Op:
    if layer.training and getattr(layer, "p", 0.0) > 0:
        _refuse(name, "it is random in training mode; call model.eval()")
    return layers.Same()


def _flatten(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.Flatten)
    if (layer.start_dim, layer.end_dim) not in ((1, -1), (1, 3)):
        _refuse(name, f"it flattens from {layer.start_dim} to {layer.end_dim}, not all but the batch")
    return layers.Flatten()


def _max_pool(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.MaxPool2d)
    if layer.return_indices:
        _refuse(name, "it returns indices")
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    return pooling.MaxPool(kernel, stride, _pair(layer.padding), _pair(layer.dilation), layer.ceil_mode)


def _avg_pool(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.AvgPool2d)
    sizes = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)
    if layer.divisor_override is not None and layer.divisor_override < 0:
        _refuse(name, f"its divisor {layer.divisor_override} is negative")
    return pooling.AvgPool(*sizes, layer.ceil_mode, layer.count_include_pad, layer.divisor_override, at.eps)


def _adaptive(layer: nn.Module, name: str, at: Precision) -> Op:
    assert isinstance(layer, nn.AdaptiveAvgPool2d)
    if layer.output_size not in (1, (1, 1)):
        _refuse(name, f"it pools to {layer.output_size}, not to 1")
    return pooling.Mean(True, at.eps)


def _monotone(function: Callable[[Tensor], Tensor], at: Precision, exact: bool = False, floor: float = 0.0) -> Op:
    """A library's function, trusted to err by at most 8 eps of 1 and of its value."""
    return layers.Monotone(function, 0.0 if exact else 8 * at.eps, floor)


def _leaky(slope: float, name: str, at: Precision) -> Op:
    if slope < 0:
        _refuse(name, f"with the slope {slope:g} it is not monotone")
    return _monotone(partial(F.leaky_relu, negative_slope=slope), at)


def _elu(alpha: float, name: str, at: Precision) -> Op:
    if alpha < 0:
        _refuse(name, f"with alpha {alpha:g} it is not monotone")
    return _monotone(partial(F.elu, alpha=alpha), at, floor=8 * at.eps * alpha)


def _softplus(beta: float, threshold: float, name: str, at: Precision) -> Op:
    if beta <= 0:
        _refuse(name, f"with beta {beta:g} it is not monotone")
    gap = (
        math.log1p(math.exp(-threshold)) / beta if threshold > -30 else math.inf
    )  # it falls by so much at the threshold
    if not gap < math.inf:
        _refuse(name, f"with the threshold {threshold:g} it is not monotone")
    return _monotone(partial(F.softplus, beta=beta, threshold=threshold), at, floor=gap)


MODULES: dict[type, Callable[[Any, str, Precision], Op]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.Identity: lambda layer, name, at: layers.Same(),
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.ReLU: lambda layer, name, at: _monotone(torch.relu, at, exact=True),
    nn.ReLU6: lambda layer, name, at: _monotone(F.relu6, at, exact=True),
    nn.Tanh: lambda layer, name, at: _monotone(torch.tanh, at),
    nn.Sigmoid: lambda layer, name, at: _monotone(torch.sigmoid, at),
    nn.LeakyReLU: lambda layer, name, at: _leaky(layer.negative_slope, name, at),
    nn.ELU: lambda layer, name, at: _elu(layer.alpha, name, at),
    nn.Softplus: lambda layer, name, at: _softplus(layer.beta, layer.threshold, name, at),
}

# Functions and methods -------------------------------------------------------------------------------------------

Read = Callable[[_Reader, fx.Node, str], Make]


def _only(names: dict[str, Any], defaults: dict[str, Any], node: fx.Node, name: str) -> dict[str, Any]:
    """Arguments of a function after the first, by name."""
    given = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "inplace"}
    given = {key: value for key, value in given.items() if key != "input"}
    if len(node.args) > len(names) + 1 or given.keys() - names.keys():
        _refuse(name, "it is called with arguments that are not known")
    if any(isinstance(value, fx.Node) for value in given.values()):
        _refuse(name, "its arguments are computed")
    return defaults | given


def _plain(function: Callable[[Tensor], Tensor], exact: bool = False) -> Read:
    def read(reader: _Reader, node: fx.Node, name: str) -> Make:
        _only({"inplace": None}, {}, node, name)
        return lambda at: _monotone(function, at, exact)

    return read


def _as_module(build: Callable[..., nn.Module], *names: str) -> Read:
    """A function that does what a module does, whose settings have the same names."""

    def read(reader: _Reader, node: fx.Node, name: str) -> Make:
        settings = _only(dict.fromkeys((*names, "inplace")), {}, node, name)
        settings.pop("inplace", None)
        module = build(**settings)
        return partial(MODULES[type(module)], module, name)

    return read


def _functional_dropout(p: float = 0.5, training: bool = True) -> nn.Module:
    return nn.Dropout(p).train(training)


def _flattened(reader: _Reader, node: fx.Node, name: str) -> Make:
    settings = _only({"start_dim": 0, "end_dim": -1}, {"start_dim": 0, "end_dim": -1}, node, name)
    module = nn.Flatten(**settings)
    return partial(_flatten, module, name)


def _viewed(reader: _Reader, node: fx.Node, name: str) -> Make:
    """``x.view(len(x), -1)``, however the length is asked for."""
    shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    first = shape[0] if isinstance(shape, tuple | list) and len(shape) == 2 and shape[1] == -1 else None
    asked = first if isinstance(first, fx.Node) and first in reader.sizes else None
    if asked is None or not (
        (asked.op == "call_method" and asked.args[1:] == (0,))
        or (asked.target is operator.getitem and asked.args[1] == 0)
    ):
        _refuse(name, "only x.view(x.size(0), -1) is known")
    return lambda at: layers.Flatten()


def _mean(reader: _Reader, node: fx.Node, name: str) -> Make:
    settings = _only({"dim": None, "keepdim": None}, {"dim": None, "keepdim": False}, node, name)
    dim = settings["dim"]
    if not isinstance(dim, tuple | list) or sorted(d % 4 for d in dim) != [2, 3]:
        _refuse(name, f"it is over the axes {dim}, not over rows and columns")
    return lambda at: pooling.Mean(bool(settings["keepdim"]), at.eps)


def _concatenate(reader: _Reader, node: fx.Node, name: str) -> Make:
    maps = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim not in (1, -3) or not isinstance(maps, tuple | list) or len(set(maps)) < len(maps):
        _refuse(name, f"along the axis {dim}, or of a map with itself")
    return lambda at: layers.Concatenate()


def _sum(reader: _Reader, node: fx.Node, name: str) -> Make:
    if len(node.args) != 2 or node.kwargs:
        _refuse(name, "it is called with arguments that are not known")
    maps = [x for x in node.args if isinstance(x, fx.Node) and x in reader.values]
    if len(maps) == 2:
        if maps[0] is maps[1]:
            return lambda at: layers.Scale(_number(2.0, at), _number(0.0, at), at.eps)
        return lambda at: layers.Add(at.eps)
    value = reader.constant(node.args[1] if node.args[0] is maps[0] else node.args[0], name)
    return lambda at: layers.Scale(_number(1.0, at), _broad(value(), at, name), at.eps)


def _difference(reader: _Reader, node: fx.Node, name: str) -> Make:
    if len(node.args) != 2 or node.kwargs or node.args[0] not in reader.values or node.args[1] in reader.values:
        _refuse(name, "only a constant can be taken away")
    value = reader.constant(node.args[1], name)
    return lambda at: layers.Scale(_number(1.0, at), -_broad(value(), at, name), at.eps)


def _product(reader: _Reader, node: fx.Node, name: str) -> Make:
    maps = [x for x in node.args if isinstance(x, fx.Node) and x in reader.values]
    if len(node.args) != 2 or node.kwargs or len(maps) != 1:
        _refuse(name, "only products with constants have bounds")
    value = reader.constant(node.args[1] if node.args[0] is maps[0] else node.args[0], name)
    return lambda at: layers.Scale(_broad(value(), at, name), _number(0.0, at), at.eps)


def _quotient(reader: _Reader, node: fx.Node, name: str) -> Make:
    if len(node.args) != 2 or node.kwargs or node.args[0] not in reader.values or node.args[1] in reader.values:
        _refuse(name, "only a quotient by a constant has bounds")
    value = reader.constant(node.args[1], name)

    def make(at: Precision) -> Op:
        by = _broad(value(), at, name)
        if not bool((by != 0).all()):
            _refuse(name, "it divides by 0")
        return layers.Scale(1 / by, _number(0.0, at), 2 * at.eps)

    return make


def _number(value: float, at: Precision) -> Tensor:
    return torch.tensor(value, dtype=at.dtype)


def _broad(value: Tensor, at: Precision, name: str) -> Tensor:
    """A constant that is the same for all pictures and cells of a map: a number, or one for each channel."""
    if value.numel() == 1:
        return at.of(value).reshape(())
    if value.ndim not in (3, 4) or value.numel() != value.shape[-3]:
        _refuse(name, f"a constant of the shape {tuple(value.shape)} is not the same for all pictures and cells")
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
}
METHODS: dict[Any, Read] = {
    **dict.fromkeys(("relu", "relu_"), _plain(torch.relu, exact=True)),
    "tanh": _plain(torch.tanh),
    "sigmoid": _plain(torch.sigmoid),
    "flatten": _flattened,
    **dict.fromkeys(("view", "reshape"), _viewed),
    "mean": _mean,
    "contiguous": lambda reader, node, name: lambda at: layers.Same(),
}


def flatten_into_linear(ops: list[Op], inputs: Sequence[tuple[int, ...]], shapes: Sequence[torch.Size]) -> list[Op]:
    """Let every linear layer but the last behind a flattening read the map itself: ``shapes`` are those of all values."""
    users = [sum(read.count(value) for read in inputs) for value in range(len(shapes))]
    for number, op in enumerate(ops[:-1]):  # the last one is merged with the margins
        if not isinstance(op, layers.Linear):
            continue
        value = inputs[number][0]
        while value and isinstance(ops[value - 1], layers.Same):
            value = inputs[value - 1][0]
        if (
            value
            and isinstance(ops[value - 1], layers.Flatten)
            and users[value] == 1
            and len(shapes[inputs[value - 1][0]]) == 4
        ):
            _, channels, height, width = shapes[inputs[value - 1][0]]
            ops[value - 1] = layers.Same()
            ops[number] = layers.Linear(op.weight, op.bias, op.eps, (channels, height, width))
    return ops
