"""Bounds for every location of a patch: inside it [0, 1], outside it the pixel itself (Chiang et al. 2020, section 4.2).

A patch moves only a window of each map, the cone of what it can reach; outside it activations are clean. Those are
computed once per image. Then, location by location and for all images at once, only the window goes through the layers:
as a change of the clean map where a layer is linear, pasted into it where a layer is not. A linear layer behind a
flattening reads the window alone. The result is that of the whole computation, but for rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from certipatch.bounds.interval import Interval, Window
from certipatch.bounds.layers import State, spread
from certipatch.bounds.propagate import Passage, passage, rivals_of
from certipatch.errors import InputError
from certipatch.threats import PatchThreat
from certipatch.views import PixelSets
from certipatch.views.incidence import MAX_BYTES, Incidence, sees

MEMORY = 2**29  # bytes of clean maps that are held at once
TOGETHER = 16  # locations whose margins are taken at once


@final
@dataclass(frozen=True, eq=False)
class Regions:
    """The pixels of every location of a threat, as boxes and masks."""

    image_size: tuple[int, int]
    boxes: list[tuple[int, int, int, int]]
    """(top, left, height, width) of the smallest box around each location."""
    shapes: list[Bool[Tensor, "h w"] | None]
    """Pixels of the box that the patch covers; None for all."""
    sees: Incidence
    """The positions of the locations, for ``Certificate``."""

    def __len__(self) -> int:
        return len(self.boxes)

    def pixels(self, location: int) -> Bool[Tensor, "H W"]:
        """The pixels of one location."""
        top, left, height, width = self.boxes[location]
        painted = torch.zeros(self.image_size, dtype=torch.bool)
        shape = self.shapes[location]
        painted[top : top + height, left : left + width] = True if shape is None else shape
        return painted


def regions(threat: PatchThreat, image_size: tuple[int, int]) -> Regions:
    """All locations of a threat with any number of patches. InputError if it does not fit, or has too many."""
    if threat.count == 1:
        relation = sees(torch.ones(1, *image_size, dtype=torch.bool), threat, image_size)
        places = relation.locations
        masks = [torch.tensor(mask) for mask in places.masks]
        kept = [None if bool(mask.all()) else mask for mask in masks]
        boxes = [places.box(i) for i in range(len(places))]
        return Regions(image_size, boxes, [kept[number] for number in places.shape.tolist()], relation)
    pixels = image_size[0] * image_size[1]
    if pixels * pixels > MAX_BYTES:
        raise InputError(f"{threat} on {image_size[0]}x{image_size[1]} pixels: several patches need smaller pictures")
    relation = sees(PixelSets(torch.eye(pixels, dtype=torch.bool).view(pixels, *image_size)), threat, image_size)
    boxes, shapes = [], []
    for choice in relation.choices:
        shown = torch.stack([relation.locations.pixels(int(place)) for place in choice]).any(0)
        rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
        top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
        boxes.append((top, left, bottom - top, right - left))
        shapes.append(shown[top:bottom, left:right])
    return Regions(image_size, boxes, shapes, relation)


def attacked(
    images: Float[Tensor, "B C H W"], locations: Regions, index: Int[Tensor, "B n"], strength: float = 1.0
) -> Interval:
    """Boxes (B·n, C, H, W) of all images with a patch at locations ``index`` of each: for whole passes.

    ``strength`` t widens them from the clean image (0) to [0, 1] (1): [(1 − t)x, (1 − t)x + t] under the patch.
    """
    inside = torch.stack([torch.stack([locations.pixels(int(place)) for place in row]) for row in index]).to(
        images.device
    )
    return box_of(images[:, None], inside[:, :, None], strength).map(lambda x: x.flatten(0, 1))


def box_of(images: Tensor, inside: Tensor, strength: float) -> Interval:
    shrunk = (1 - strength) * images
    return Interval(torch.where(inside, shrunk, images), torch.where(inside, shrunk + strength, images))


def patch_margins(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    locations: Regions,
    *,
    dtype: torch.dtype | None = None,
    outward: bool = False,
    strength: float = 1.0,
    index: Sequence[int] | None = None,
    slack: Float[Tensor, " B"] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "B L R"]:
    """Lower bounds of z_y − z_k wherever the patch is, for all R = K − 1 rivals k ≠ y in their order.

    Args:
        model: see ``propagate.passage``, as are ``dtype`` and ``outward``.
        images: in [0, 1].
        label: y of each image.
        locations: the locations, from ``regions``.
        strength: see ``attacked``.
        index: the locations that are wanted; None for all.
        slack: see ``Passage.margins``.
        memory: bytes of clean maps held at once; it sets how many images go together.

    Differentiable in the parameters and the images.
    """
    passed = passage(model, _picture(images), dtype, outward)
    places = range(len(locations)) if index is None else index
    parts, first = [], 0
    for images_part, label_part in _parts(passed, images.to(passed.dtype), label, memory):
        own = None if slack is None else slack[first : first + len(images_part)]
        first += len(images_part)
        rivals = rivals_of(label_part, passed.classes)
        clean = passed.values(Interval(images_part, images_part))
        parts.append(
            torch.cat(
                [
                    passed.margins(stacked(passed, clean, locations, some, strength), label_part, rivals, own)
                    for some in groups(places)
                ],
                1,
            )
        )
    return torch.cat(parts)


@torch.no_grad()
def patch_verdict(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    locations: Regions,
    above: Float[Tensor, " B"],
    *,
    dtype: torch.dtype | None = None,
    outward: bool = False,
    slack: Float[Tensor, " B"] | None = None,
    memory: int = MEMORY,
) -> Bool[Tensor, " B"]:
    """Test if every margin of each image exceeds ``above``; no location of an image is computed behind one that fails.

    Locations far apart are computed first. The other arguments are those of ``patch_margins``.
    """
    passed = passage(model, _picture(images), dtype, outward)
    result = torch.ones(len(images), dtype=torch.bool, device=images.device)
    order, first = _scattered(locations), 0
    for images_part, _ in _parts(passed, images.to(passed.dtype), label, memory):
        left = torch.arange(first, first + len(images_part), device=images.device)
        first += len(images_part)
        clean = passed.values(Interval(images_part, images_part))
        for some in groups(order):
            rivals = rivals_of(label[left], passed.classes)
            own = None if slack is None else slack[left]
            margin = passed.margins(stacked(passed, clean, locations, some, 1.0), label[left], rivals, own)
            stays = (margin > above[left, None, None]).flatten(1).all(1)
            if not bool(stays.all()):
                result[left[~stays]] = False
                left = left[stays]
                if len(left) == 0:
                    break
                clean = _selected(clean, stays)
    return result


def _picture(images: Tensor) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]


def _parts(passed: Passage, images: Tensor, label: Tensor, memory: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images whose clean maps fit ``memory`` together."""
    step = max(1, memory // (4 * passed.numbers * images.element_size()))
    return zip(images.split(step), label.split(step), strict=True)


def groups(places: Sequence[int]) -> Iterator[Sequence[int]]:
    return (places[first : first + TOGETHER] for first in range(0, len(places), TOGETHER))


def _selected(clean: list[Interval], stays: Tensor) -> list[Interval]:
    kept: dict[int, Tensor] = {}  # layers that do nothing share their tensors

    def select(x: Tensor) -> Tensor:
        if id(x) not in kept:
            kept[id(x)] = x[stays]
        return kept[id(x)]

    return [x.map(select) for x in clean]


def _scattered(locations: Regions) -> list[int]:
    """All locations, those on a coarse grid first."""
    steps = (8, 4, 2, 1)
    rank = [
        next(i for i, step in enumerate(steps) if top % step == 0 == left % step) for top, left, *_ in locations.boxes
    ]
    return sorted(range(len(locations)), key=rank.__getitem__)


def stacked(
    passed: Passage, clean: list[Interval], locations: Regions, places: Sequence[int], strength: float
) -> Interval:
    """Value ``before_head`` (B, len(places), n)."""
    parts = [_through(passed, clean, locations.boxes[place], locations.shapes[place], strength) for place in places]
    return Interval(torch.stack([x.lower for x in parts], 1), torch.stack([x.upper for x in parts], 1))


def _through(
    passed: Passage,
    clean: list[Interval],
    box: tuple[int, int, int, int],
    shape: Bool[Tensor, "h w"] | None,
    strength: float,
) -> Interval:
    """Bounds of value ``before_head`` for all images, with the patch at one location."""
    top, left, height, width = box
    pixels = clean[0].lower[:, :, top : top + height, left : left + width]
    inside = torch.ones(height, width, dtype=torch.bool) if shape is None else shape
    states: list[State] = [Window(top, left, box_of(pixels, inside.to(pixels.device), strength))]
    for number, (op, inputs) in enumerate(zip(passed.ops, passed.inputs, strict=True), 1):
        if number > passed.before_head:
            break
        read, before = [states[i] for i in inputs], [clean[i] for i in inputs]
        states.append(None if all(x is None for x in read) else op.window(read, before, clean[number]))
    last = states[passed.before_head]
    return clean[passed.before_head] if last is None else spread(last, clean[passed.before_head])
