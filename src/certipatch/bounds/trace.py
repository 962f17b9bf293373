"""A network as a list of layers that bounds can pass: traced with torch.fx, each known by name or refused by name."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from certipatch.bounds import layers
from certipatch.bounds.known_functions import FUNCTIONS, IN_PLACE, METHODS
from certipatch.bounds.known_layers import MODULES, Make, refuse
from certipatch.bounds.layers import Op
from certipatch.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One layer: its name in the network, the numbers of the values that it reads (0 is the image), how it is made."""

    name: str
    inputs: tuple[int, ...]
    make: Make


def trace(model: nn.Module) -> tuple[Step, ...]:
    """The layers of a network that maps images (B, C, H, W) to logits (B, K), in order; step i gives value i + 1.

    Errors: InputError that names the layer or function for which no bounds are known.
    """
    check_calls(model)
    with _without_new_constants(model) as constants:
        try:
            graph = _Tracer().trace(model)
        except Exception as error:
            raise InputError(f"the network cannot be traced: {' '.join(str(error).split())[:200]}") from None
    return _Reader(model, graph, constants).steps()


def check_calls(model: nn.Module) -> None:
    """InputError if calling a layer does more than its class says: torch.fx would not see it.

    Pruning, and weight and spectral norm as hooks, only make a layer's weight anew from others; they do so here.
    """
    for name, module in model.named_modules():
        before, layer = list(module._forward_pre_hooks.values()), f"layer {name or 'network'} ({type(module).__name__})"
        if all(isinstance(hook, RECOMPUTING) for hook in before) and not module._forward_hooks:
            for hook in before:
                hook(module, ())
        else:
            refuse(layer, "it has a hook, which bounds do not see; remove it, or make it a layer")
        called = type(module).__call__ is nn.Module.__call__ or isinstance(module, fx.GraphModule)
        if "forward" in vars(module) or not called:
            refuse(layer, "its forward was replaced, which bounds do not see; write a class of its own")


@contextmanager
def _without_new_constants(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Takes from the network the tensors that tracing puts there, and gives them by name."""
    before, constants = set(vars(model)), dict[str, Tensor]()
    yield constants
    for name in set(vars(model)) - before:
        if name.startswith("_tensor_constant"):
            constants[name] = vars(model).pop(name)


class _Proxy(fx.Proxy):
    """The stand-in for a value in a traced network. torch.fx takes ``x += y`` for ``x + y``, which overwrites nothing."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Reader:
    """Goes through a traced graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]):
        self.model, self.graph, self.modules = model, graph, dict(model.named_modules())
        self.constants = constants
        self.values: dict[fx.Node, int] = {}
        self.sizes: set[fx.Node] = set()
        self.layers: list[Step] = []

    def steps(self) -> tuple[Step, ...]:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.values:
                    raise InputError("interval bounds: the network reads more than pictures")
                self.values[node] = 0
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node) or self.values.get(node.args[0]) != len(self.layers):
                    raise InputError("interval bounds: the network's answer is not that of its last layer")
            elif node.op == "get_attr" or self._is_size(node):
                self.sizes.add(node)
            else:
                self._add(node)
        if not self.layers:
            raise InputError("interval bounds: the network has no layers")
        return tuple(self.layers)

    def _is_size(self, node: fx.Node) -> bool:
        """Test if a node only reads shapes."""
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
                refuse(name)
            make, in_place = partial(MODULES[kind], module, name), bool(getattr(module, "inplace", False))
            make_now: Make = make
        else:
            name = f"{'method' if node.op == 'call_method' else 'function'} {_name(node.target)}"
            table = METHODS if node.op == "call_method" else FUNCTIONS
            if node.target not in table:
                refuse(name)
            make_now = table[node.target](self, node, name)
            in_place = _name(node.target).endswith("_") or node.target in IN_PLACE or node.kwargs.get("inplace") is True
        if in_place:
            self._check_alone(node, name)
        self.layers.append(Step(name, tuple(self.values[n] for n in inputs), make_now))
        self.values[node] = len(self.layers)

    def _check_alone(self, node: fx.Node, name: str) -> None:
        """Refuse a layer that overwrites a value which another layer reads, under any name."""
        while node.op != "placeholder":
            source = node.args[0] if node.args else node.kwargs.get("input")
            if not isinstance(source, fx.Node) or source not in self.values:
                refuse(name, "it overwrites a constant")
            if any(user is not node and not self._is_size(user) for user in source.users):
                refuse(name, "it overwrites a value that another layer reads too; set inplace=False")
            if source.op == "placeholder":
                return
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
            if value.target in self.constants:
                return partial(self.constants.__getitem__, str(value.target))
            parts = str(value.target).split(".")
            return lambda: _attribute(self.model, parts)
        refuse(f"{name} of {value}")


def _attribute(model: nn.Module, parts: Sequence[str]) -> Tensor:
    value: Any = model
    for part in parts:
        value = getattr(value, part)
    return value


RECOMPUTING = (BasePruningMethod, WeightNorm, SpectralNorm)
ALIASES = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)  # their answer may be what they read, not a copy


def _name(target: object) -> str:
    return str(target if isinstance(target, str) else getattr(target, "__name__", target))


def flatten_into_linear(ops: list[Op], inputs: Sequence[tuple[int, ...]], shapes: Sequence[torch.Size]) -> list[Op]:
    """Let every linear layer but the last behind a flattening read the map itself: ``shapes`` are those of all values."""
    users = [sum(read.count(value) for read in inputs) for value in range(len(shapes))]
    for number, op in enumerate(ops[:-1]):  # the last one is merged with the margins
        if not isinstance(op, layers.Linear):
            continue
        value = inputs[number][0]
        while value and isinstance(ops[value - 1], layers.Same) and users[value] == 1:
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
