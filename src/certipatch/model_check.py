"""The model check: refuse a network whose views leak or depend on their neighbours; measure the rounding of the others.

A certificate rests on one assumption: a view's evidence depends on its visible pixels alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.evidence import Tolerance, logits, precision_of
from certipatch.inference import call_network, rows_per_pass
from certipatch.models.ensemble import Ensemble
from certipatch.views import Views
from certipatch.views.render import image_size, render_each

# By parameter type: the largest change of a logit, relative to 1 + the largest, that counts as rounding; the least
# tolerance of a score.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
PROBED_VIEWS = 8
RENDERED_VIEWS = 64
TILES_PER_AXIS, FEW_TILES = (4, 8, 16), 64
COUPLED = "a view's answer depends on the other pictures in the batch"


@torch.inference_mode()
def check_model(
    model: nn.Module,
    views: Views,
    images: Float[Tensor, "B C H W"],
    batch_size: int | None = None,
    seed: int = 0,
    raw: bool = False,
) -> Tolerance:
    """Refuse a model whose views leak or depend on their neighbours; measure the rounding of the others.

    The model and each network that it may ask (``networks_of``) are checked as networks of their own, with up to two of
    ``images`` and a random picture:

    * the same view twice;
    * up to eight views alone, among others, and beside black, white and random images, in passes of 1, 2, 5, 9 rows and
      of as many as serving takes;
    * hidden pixels set to 0, 1, −0.0 and random values. Rendered views must keep their bits. A network that answers for
      all views itself gets images of which one tile is changed; the tiles cover the image, and every view that does
      not see the tile must answer as before.

    Twice the largest change of a logit bounds the change of a score: the tolerance, never less than a share of the largest
    logit. (Logits, since a score that is saturated on the probes hides rounding that shows on other images.)

    Args:
        model: in eval mode, as it is served.
        views: its views.
        images: images like those that will be served.
        batch_size: as for ``evidence.logits``.
        seed: of the random images.
        raw: the logits themselves are the scores.

    Errors: InputError that says which network changed a logit by more than rounding can, and on what.
    """
    lipschitz = getattr(model, "lipschitz", 1.0)
    if raw and lipschitz != 1:
        raise InputError(
            "model refused: a cascade's confidences are bounded, not their logarithms; choose other evidence"
        )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        rounding = [_Check(part, views, images, batch_size, seed, raw).run() for part in networks_of(model)]
    finally:  # a BatchNorm in training mode has moved its statistics
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    change, largest = (max(values) for values in zip(*rounding, strict=True))
    floor = FLOORS.get(precision_of(model, images), 1e-6)
    if raw:
        return Tolerance(atol=max(4 * change, floor), rtol=floor)
    # |Δ softmax| ≤ max |Δ logit| / 2; a score hides how large its logits are, and with them their rounding
    return Tolerance(atol=lipschitz * max(2 * change, floor * max(1.0, largest)), rtol=floor)


@final
class Member(nn.Module):
    """A network inside another one, shown what that one is shown."""

    def __init__(self, network: nn.Module, shown_to: nn.Module):
        super().__init__()
        self.network, self.training = network, network.training
        self.encoding, self.fill = getattr(shown_to, "encoding", "null"), getattr(shown_to, "fill", 0.5)

    def forward(self, rows: Float[Tensor, "N ..."]) -> Tensor:
        return self.network(rows)


def networks_of(model: nn.Module) -> list[nn.Module]:
    """The model itself, and every network that it may ask: members of ensembles and cascades, at any depth."""
    inside = getattr(model, "served", model)
    return [model, *(Member(part, model) for part in _members(inside))]


def _members(network: nn.Module) -> Iterator[nn.Module]:
    for part in network.parts if isinstance(network, Ensemble) else ():
        yield part
        yield from _members(part)


def hidden_tiles(shown: Bool[Tensor, "V H W"]) -> Bool[Tensor, "T H W"]:
    """Tiles that together cover the pixels that views hide, each hidden from at least one view.

    The pixels that the same views show, where these are few boxes, as for bands. Else a grid of 4 x 4 boxes, or a finer one
    while some view hides pixels but no whole box; and all hidden pixels of some views, up to their borders.
    """
    tiles = grid_tiles([_runs_alike(shown, axis) for axis in (1, 2)])
    hides = ~shown.flatten(1).all(1)
    if len(tiles) <= FEW_TILES:
        return tiles[_hidden(shown, tiles).any(0)]
    hidden = _hidden(shown, tiles)
    for number in TILES_PER_AXIS:
        tiles = grid_tiles([torch.arange(n) * min(n, number) // n for n in shown.shape[1:]])
        hidden = _hidden(shown, tiles)
        if bool(hidden.any(1)[hides].all()):
            break
    views = torch.cat([(hides & ~hidden.any(1)).nonzero()[:, 0], hides.nonzero()[:, 0]])
    some = torch.linspace(0, len(views) - 1, min(len(views), PROBED_VIEWS)).round().long().unique()
    return torch.cat([tiles[hidden.any(0)], ~shown[views[some]]])


def grid_tiles(labels: list[Int64[Tensor, " n"]]) -> Bool[Tensor, "T H W"]:
    """One tile for every pair of a label of rows and a label of columns."""
    rows, columns = labels
    box = rows[:, None] * (int(columns.max()) + 1) + columns
    return box == box.unique()[:, None, None]


def _runs_alike(shown: Bool[Tensor, "V H W"], axis: int) -> Int64[Tensor, " n"]:
    """Numbers of the runs of rows (axis 1) or columns (axis 2) that are shown alike by every view."""
    lines = shown.movedim(axis, 0).flatten(1)
    return torch.cat([torch.zeros(1, dtype=torch.int64), (lines[1:] != lines[:-1]).any(1).long().cumsum(0)])


def _hidden(shown: Bool[Tensor, "V H W"], tiles: Bool[Tensor, "T H W"]) -> Bool[Tensor, "V T"]:
    return shown.flatten(1).float() @ tiles.flatten(1).float().T < 0.5


@dataclass
class _Check:
    """One network's check. ``run`` gives the largest change of a logit, and the largest logit."""

    network: nn.Module
    views: Views
    images: Float[Tensor, "B C H W"]
    batch_size: int | None
    seed: int
    raw: bool

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.size = image_size(self.images)
        self.encoding, self.fill = getattr(self.network, "encoding", "null"), getattr(self.network, "fill", 0.5)
        self.all_views = self.encoding == "all-views"
        self.number = self.views.number(self.size)
        self.limit = LIMITS.get(precision_of(self.network, self.images), 1e-4)
        training = any(module.training for module in self.network.modules())
        self.training = "; it is in training mode, call model.eval()" if training else ""
        self.change = 0.0

    def run(self) -> tuple[float, float]:
        pictures = torch.cat([self.images[:2], self.random_like(self.images[:1])])
        probed = PROBED_VIEWS if self.all_views else PROBED_VIEWS // 2  # rendered views cost a pass each
        index = torch.linspace(0, self.number - 1, min(self.number, probed)).round().long().unique()
        rows = self.render(pictures, index)
        alone = torch.cat([self.answer(row[None]) for row in rows])
        if alone.shape[-1] < 2:
            raise InputError(f"model refused: it knows {alone.shape[-1]} class; a certificate needs at least two")
        if not bool(torch.isfinite(alone).all()):
            raise InputError("model refused: its answers are not finite")
        self.compare(
            torch.cat([self.answer(row[None]) for row in rows]), alone, "the same view twice gives two answers"
        )
        self.compare(self.served(pictures, index), alone, COUPLED)
        extreme = torch.cat(
            [torch.zeros_like(pictures[:1]), torch.ones_like(pictures[:1]), self.random_like(pictures[:1])]
        )
        beside = self.render(extreme, index)
        for number in sorted({2, 5, 9, rows_per_pass(self.network, rows[:1], self.batch_size)}):
            some = beside.repeat(-(-number // len(beside)), *[1] * (beside.ndim - 1))[: number - 1]
            self.compare(self.answer(torch.cat([some, rows[:1]]))[-1:], alone[:1], COUPLED)
            self.compare(self.answer(torch.cat([rows[:1], some]))[:1], alone[:1], COUPLED)
        if self.all_views:
            self.check_tiles(pictures)
        else:
            self.check_rendering(pictures)
        return self.change, alone.abs().max().item()

    def random_like(self, pictures: Tensor) -> Tensor:
        return torch.rand(pictures.shape, generator=self.generator).to(pictures)

    def render(self, pictures: Float[Tensor, "n C H W"], index: Tensor) -> Float[Tensor, "N ..."]:
        """Give the network's inputs: the images, or these views of each image, as serving renders them."""
        if self.all_views:
            return pictures
        picture, view = torch.arange(len(pictures)).repeat_interleave(len(index)), index.repeat(len(pictures))
        return render_each(self.encoding, pictures[picture], self.views, view, self.fill)

    def answer(self, rows: Float[Tensor, "N ..."]) -> Tensor:
        """Logits of one pass; softmax sees differences only, and an offset of all classes could hide a leak."""
        return self.centred(call_network(self.network, rows.clone()))

    def centred(self, answer: Tensor) -> Tensor:
        answer = answer.double()
        return answer if self.raw else answer - answer.mean(-1, keepdim=True)

    def served(self, pictures: Tensor, index: Tensor) -> Tensor:
        """Logits as serving computes them, in the order of ``render``."""
        given = logits(self.network, self.views, pictures, None if self.all_views else index, self.batch_size)
        return self.centred(given if self.all_views else given.flatten(0, 1))

    def compare(self, changed: Tensor, reference: Tensor, reason: str) -> None:
        off = (changed - reference).abs().max().item()
        relative = off / (1 + reference.abs().max().item())
        if not relative <= self.limit:
            raise InputError(
                f"model refused: {reason}{self.training}; an answer changed by {relative:.2g} (limit {self.limit:g})"
            )
        self.change = max(self.change, off)

    def fills(self, pictures: Tensor) -> list[Tensor]:
        zero = torch.zeros_like(pictures)
        return [zero, torch.ones_like(pictures), self.random_like(pictures), -zero]

    def check_tiles(self, pictures: Tensor) -> None:
        shown = self.views.visible(self.size)
        plain = self.answer(pictures[-1:].repeat(4, 1, 1, 1))
        for tile in hidden_tiles(shown):
            blind = ~(shown & tile).flatten(1).any(1)
            fills = self.fills(pictures[-1:])
            changed = torch.cat([torch.where(tile.to(pictures.device), fill, pictures[-1:]) for fill in fills])
            view = int(blind.nonzero()[0])
            leak = f"view {view} leaks: its answer depends on hidden pixels"
            blind = blind.to(pictures.device)
            self.compare(self.answer(changed)[:, blind], plain[:, blind], leak)

    def check_rendering(self, pictures: Tensor) -> None:
        index = torch.linspace(0, self.number - 1, min(self.number, RENDERED_VIEWS)).round().long().unique()
        step = max(1, RENDERED_VIEWS * 2**10 // (self.size[0] * self.size[1]))
        for view in index.split(step):
            each = pictures[-1:].expand(len(view), -1, -1, -1)
            shown = self.views.visible(self.size, view).to(pictures.device)[:, None]
            plain = render_each(self.encoding, each, self.views, view, self.fill)
            for fill in self.fills(each):
                row = render_each(self.encoding, torch.where(shown, each, fill), self.views, view, self.fill)
                if not same_bits(row, plain):
                    raise InputError(
                        f"model refused: view {int(view[0])} leaks: its rendering depends on hidden pixels"
                    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Test if two tensors are equal, including the signs of their zeros."""
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))
