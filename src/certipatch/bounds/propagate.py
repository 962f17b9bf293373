"""Bounds of a whole network: every image of a box in, an interval for every logit out, or margins between them."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.bounds.adapted import steps_of
from certipatch.bounds.heads import joined_heads
from certipatch.bounds.interval import Interval
from certipatch.bounds.known_layers import Precision
from certipatch.bounds.layers import Linear, Op, Pointwise, merged
from certipatch.bounds.trace import Step, flatten_into_linear
from certipatch.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Passage:
    """The layers of a network with weights in one precision, ready to pass intervals. Value 0 is the image."""

    ops: tuple[Op, ...]
    inputs: tuple[tuple[int, ...], ...]
    classes: int
    dtype: torch.dtype
    numbers: int
    """Activations of one image, in all values together, and weights of its margins."""

    def values(self, pictures: Interval, until: int | None = None) -> list[Interval]:
        """The image's interval and that of every layer's answer, up to the layer ``until``."""
        intervals = [pictures]
        for op, inputs in list(zip(self.ops, self.inputs, strict=True))[:until]:
            intervals.append(op.whole(*(intervals[i] for i in inputs)))
        return intervals

    @property
    def head(self) -> Linear | None:
        """The last layer, where it is linear and reads a vector: it is merged with the margins."""
        last = self.ops[-1]
        return last if isinstance(last, Linear) and last.shape_of_map is None else None

    @property
    def before_head(self) -> int:
        """The value that the head reads, or the logits where there is none."""
        return self.inputs[-1][0] if self.head is not None else len(self.ops)

    def margins(
        self,
        last: Interval,
        label: Int[Tensor, " B"],
        rivals: Int[Tensor, "B R"],
        slack: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L R"]:
        """Lower bounds of z_y − z_k from value ``before_head`` (B, L, n); of logits where there is no head.

        ``slack``: see ``less_rounding``.
        """
        if slack is not None:
            return self.less_rounding(self.margins(last, label, rivals), last, slack)
        if self.head is not None:
            return merged(self.head, last, label, rivals)
        places = last.shape[1]
        own = last.lower.gather(2, label[:, None, None].expand(-1, places, 1))
        other = last.upper.gather(2, rivals[:, None].expand(-1, places, -1))
        return own - other - (2 * torch.finfo(self.dtype).eps * (own.abs() + other.abs()) if self._guarded else 0.0)

    def less_rounding(
        self, margins: Float[Tensor, "B L R"], last: Interval, slack: Float[Tensor, " B"]
    ) -> Float[Tensor, "B L R"]:
        """Margins where each of the two logits may be off by ``slack``·(1 + ``size``)."""
        return margins - 2 * (slack[:, None] * (1 + self.size(last)))[..., None]

    def size(self, last: Interval) -> Float[Tensor, "B L"]:
        """The largest Σ_j |w_kj x_j| + |b_k| of a logit over a box (B, L, n): the scale of its rounding.

        A logit, or a difference of two, may be small where large numbers cancel.
        """
        reach = torch.maximum(last.lower.abs(), last.upper.abs())
        if self.head is None:
            return reach.amax(2)
        return F.linear(reach, self.head.magnitude, self.head.bias_size).amax(2)

    @property
    def _guarded(self) -> bool:
        return any(getattr(op, "eps", 0.0) > 0 for op in self.ops)


@final
@dataclass(frozen=True, eq=False)
class Layout:
    """A network that has been read once, from which passages with its weights as they are now are made."""

    steps: tuple[Step, ...]
    shapes: tuple[torch.Size, ...]
    """Shapes of all values, for one image."""
    dtype: torch.dtype
    """The type of the parameters."""

    def passage(self, dtype: torch.dtype | None = None, outward: bool = False) -> Passage:
        """See ``passage``."""
        at = Precision(dtype or self.dtype, torch.finfo(dtype or self.dtype).eps if outward else 0.0)
        ops, inputs = [step.make(at) for step in self.steps], tuple(step.inputs for step in self.steps)
        ops, inputs, shapes = joined_heads(ops, inputs, self.shapes)
        last = ops[-1]
        numbers = sum(map(math.prod, shapes)) + (last.weight.numel() if isinstance(last, Linear) else 0)
        ops = flatten_into_linear(ops, inputs, shapes)
        return Passage(tuple(ops), inputs, shapes[-1][1], at.dtype, numbers)


@torch.no_grad()
def layout(model: nn.Module, picture: tuple[int, int, int]) -> Layout:
    """Read ``model``, for images of ``picture`` (C, H, W). Errors as those of ``passage``."""
    first = next(model.parameters(), torch.zeros(()))
    steps = steps_of(model, picture)
    zeros = torch.zeros(1, *picture, dtype=first.dtype, device=first.device)
    shapes, values = [zeros.shape], [Interval(zeros, zeros)]
    at = Precision(first.dtype, 0.0)
    for step in steps:
        try:
            values.append(step.make(at).whole(*(values[i] for i in step.inputs)))
        except (RuntimeError, IndexError) as error:
            size = "x".join(map(str, picture))
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"interval bounds: {step.name} cannot read pictures of {size}: {reason}") from None
        shapes.append(values[-1].shape)
        if len({len(shapes[i]) for i in step.inputs}) > 1:
            raise InputError(f"interval bounds: {step.name} joins maps and vectors")
        if isinstance(step.make(at), Pointwise) and shapes[-1] != shapes[step.inputs[0]]:
            before, after = ("x".join(map(str, shape[1:])) for shape in (shapes[step.inputs[0]], shapes[-1]))
            raise InputError(f"interval bounds: {step.name} makes maps of {after} from {before}; its constant must not")
    if len(shapes[-1]) != 2 or shapes[-1][1] < 2:
        raise InputError(f"interval bounds: the network gives {tuple(shapes[-1])} where logits (B, K ≥ 2) are needed")
    return Layout(steps, tuple(shapes), first.dtype)


def passage(
    model: nn.Module, picture: tuple[int, int, int], dtype: torch.dtype | None = None, outward: bool = False
) -> Passage:
    """The layers of ``model``, for images of ``picture`` (C, H, W).

    Args:
        model: maps images (B, C, H, W) to logits (B, K) by layers of ``known_layers`` and ``known_functions``.
        dtype: of the bounds; float64 for certificates; None for that of the parameters. Gradients reach them.
        outward: round intervals outward, so that they hold for the real numbers that the weights denote.

    Errors: InputError that names a layer without bounds, a layer in training mode that is random or sees the whole
    batch, or what is no vector of logits.
    """
    return layout(model, picture).passage(dtype, outward)


def rivals_of(label: Int[Tensor, " B"], classes: int) -> Int[Tensor, "B R"]:
    """All other classes of each label, in their order: R = K − 1."""
    others = torch.arange(classes - 1, device=label.device).expand(len(label), -1)
    return others + (others >= label[:, None])


def logit_bounds(model: nn.Module, pictures: Interval, outward: bool = False) -> Interval:
    """Bounds (B, K) of the logits of every image of a box (B, C, H, W), in the precision of the box."""
    _, channels, height, width = pictures.shape
    return passage(model, (channels, height, width), pictures.lower.dtype, outward).values(pictures)[-1]


def margin_bounds(
    model: nn.Module, pictures: Interval, label: Int[Tensor, " B"], outward: bool = False
) -> Float[Tensor, "B R"]:
    """Lower bounds of z_y − z_k over a box of images, for all rivals k ≠ y in their order."""
    _, channels, height, width = pictures.shape
    passed = passage(model, (channels, height, width), pictures.lower.dtype, outward)
    last = passed.values(pictures)[passed.before_head]
    return passed.margins(last.map(lambda x: x[:, None]), label, rivals_of(label, passed.classes))[:, 0]
