"""A network as a list of layers that bounds can pass: traced with torch.fx, each known by name or refused by name."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from certipatch.bounds import layers
from certipatch.bounds.known_functions import FUNCTIONS, IN_PLACE, METHODS
from certipatch.bounds.known_layers import MODULES, Make, refuse
from certipatch.bounds.layers import Op
from certipatch.errors import InputError


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
        self.found.append(Step(name, tuple(self.values[n] for n in inputs), make_now))
        self.values[node] = len(self.found)

    def _check_alone(self, node: fx.Node, name: str) -> None:
        """What a layer overwrites, no other may read, under whatever name."""
        while True:
            source = node.all_input_nodes[0]
            if any(user is not node and not self._is_size(user) for user in source.users):
                refuse(name, "it overwrites a value that another layer reads too; set inplace=False")
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
        refuse(f"{name} of {value}")


def _attribute(model: nn.Module, parts: Sequence[str]) -> Tensor:
    found: Any = model
    for part in parts:
        found = getattr(found, part)
    return found


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
