"""Two masks over each picture of a training: the search for the worst ones, from coarse to fine, and the memory of them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int64
from lightning.fabric import Fabric
from torch import Tensor

from certipatch.defenses.patchcleanser import PatchCleanser
from certipatch.errors import InputError
from certipatch.training.augment import Changes
from certipatch.views import MaskPairs, PixelSets
from certipatch.views.render import Fill, constant

ENCODINGS = ("picture", "fill", "null")


def apply_masks(
    encoding: str, images: Float[Tensor, "N C H W"], hidden: Bool[Tensor, "N H W"], fill: Fill = 0.5
) -> Float[Tensor, "N C2 H W"]:
    """Picture i under mask i, as the network reads it: filled, or NULL-encoded. InputError on another encoding."""
    if encoding not in ENCODINGS:
        raise InputError(f"masks lie over whole pictures, but this network reads {encoding}; train a plain classifier")
    if encoding == "null":
        return torch.cat([images, 1 - images], dim=1) * ~hidden[:, None]
    return torch.where(hidden[:, None], constant(images, fill), images)


def masks_of(defense: Any, image_size: tuple[int, int]) -> list[Bool[Tensor, "_ H W"]]:
    """The masks that a defense lays over pictures, True where they hide; if they have several sizes, the largest first."""
    if isinstance(defense, PatchCleanser):
        return [pairs.masks for pairs in defense.sizes(image_size)]
    views = defense.views_of(image_size)
    if isinstance(views, MaskPairs):
        return [views.masks]
    assert isinstance(views, PixelSets)
    return [~views.visible(image_size)[1:]]  # the first view shows everything


def assign_fine_masks(coarse: Bool[Tensor, "M H W"], fine: Bool[Tensor, "N H W"]) -> Int64[Tensor, "M c"]:
    """For each coarse mask the c = ⌈N/M⌉ fine ones that lie most within it; every fine one belongs to some coarse one.

    Shared pixels count, and if those are as many, nearness of the centres.
    """
    within = coarse.flatten(1).double() @ fine.flatten(1).double().T
    distance = torch.cdist(mask_centres(coarse), mask_centres(fine))
    score = within / fine.flatten(1).sum(1) - distance / (1e3 * (1 + distance.max()))
    children = -(-len(fine) // len(coarse))
    most = score.topk(children, 1).indices
    missing = torch.ones(len(fine), dtype=torch.bool)
    missing[most.flatten()] = False
    if not bool(missing.any()):
        return most
    adopted: list[list[int]] = [row.tolist() for row in most]
    for orphan in missing.nonzero()[:, 0].tolist():
        adopted[int(score[:, orphan].argmax())].append(orphan)
    longest = max(map(len, adopted))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in adopted])


def mask_centres(masks: Bool[Tensor, "M H W"]) -> Float[Tensor, "M 2"]:
    weight = masks.double()
    total = weight.sum((1, 2)).clamp(min=1)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in masks.shape[1:])
    return torch.stack([(weight.sum(2) @ rows) / total, (weight.sum(1) @ columns) / total], 1)


@final
class MaskHierarchy:
    """Mask sets from coarse to fine, and how a training draws two masks of the finest for each picture.

    Args:
        levels: bool (M, H, W) each; the last one is the defense's own.
        device: where masks are looked for, and what is found lies.
    """

    def __init__(self, levels: Sequence[Bool[Tensor, "M H W"]], device: torch.device | None = None):
        children = [assign_fine_masks(one, other) for one, other in itertools.pairwise(levels)]
        self.levels = [level.to(device) for level in levels]
        self.children = [table.to(device) for table in children]

    @property
    def evaluations(self) -> int:
        """Forward passes that the greedy choice from coarse to fine costs a picture."""
        return 2 * (len(self.levels[0]) + sum(table.shape[1] for table in self.children))

    def hidden(self, pairs: Int64[Tensor, "B 2"]) -> Bool[Tensor, "B H W"]:
        """The pixels that two masks hide together."""
        return self.levels[-1][pairs].any(1)

    def random(self, batch: int, draw: torch.Generator) -> Int64[Tensor, "B 2"]:
        """Two masks each, drawn on their own (now and then the same one)."""
        fine = self.levels[-1]
        return torch.randint(len(fine), (2, batch), generator=draw).T.to(fine.device)

    def worst(
        self,
        losses: Callable[[Int64[Tensor, " n"], Bool[Tensor, "n H W"]], Float[Tensor, " n"]],
        batch: int,
        step: int,
    ) -> Int64[Tensor, "B 2"]:
        """The mask of largest loss, and with it laid, the second mask of largest loss.

        With several levels the worst coarse mask is found first, then the worst of the finer ones within it.

        Args:
            losses: of pictures (n,) under masks (n, H, W).
            batch: B, the pictures.
            step: pairs of a picture and a mask that are looked at together.
        """
        hidden = torch.zeros_like(self.levels[0][:1]).repeat(batch, 1, 1)
        device, pair = hidden.device, []
        for _ in range(2):
            candidates = torch.arange(len(self.levels[0]), device=device).expand(batch, -1)
            worst = candidates[:, 0]
            for level, masks in enumerate(self.levels):
                picture = torch.arange(batch, device=device).repeat_interleave(candidates.shape[1])
                chosen = candidates.flatten()
                of_parts = [
                    losses(p, masks[c] | hidden[p])
                    for p, c in zip(picture.split(step), chosen.split(step), strict=True)
                ]
                best = torch.cat(of_parts).view(candidates.shape).argmax(1, keepdim=True)
                worst = candidates.gather(1, best)[:, 0]
                if level + 1 < len(self.levels):
                    candidates = self.children[level][worst]
            hidden = hidden | self.levels[-1][worst]
            pair.append(worst)
        return torch.stack(pair, dim=1)


@final
class MaskMemory:
    """For each picture of a training the two masks that it learns from when it comes up next.

    They are kept as the centres of masks in the picture as it is: shifts and mirroring move what a mask hides. Under
    augmentation the centre moves with the image, and the nearest mask is used.

    Args:
        pictures: n, how many there are.
        masks: bool (M, H, W).
    """

    def __init__(self, pictures: int, masks: Bool[Tensor, "M H W"]):
        self.of_masks = mask_centres(masks.cpu()).float()
        self.centres = torch.full((pictures, 2, 2), torch.nan)
        """Row and column for each picture and mask; not a number where nothing is known yet."""
        self.chosen = torch.empty(0, dtype=torch.int64)
        self.changes: Changes | None = None
        self.chunk = slice(None)

    def set_batch(self, chosen: Int64[Tensor, " B"], changes: Changes, chunk: slice = slice(None)) -> None:
        """Select the pictures, augmentation and process-local slice that the next ``pairs`` and ``update`` refer to."""
        self.chosen, self.changes, self.chunk = chosen.cpu(), changes, chunk

    def pairs(self, draw: torch.Generator) -> Int64[Tensor, "b 2"]:
        """The two masks of each picture of the share; random ones where nothing is known."""
        assert self.changes is not None
        centres = self.changes.shown(self.centres[self.chosen])
        nearest = torch.cdist(centres.nan_to_num(), self.of_masks).argmin(-1)
        drawn = torch.randint(len(self.of_masks), nearest.shape, generator=draw)
        return torch.where(centres[..., 0].isnan(), drawn, nearest)[self.chunk]

    def update(self, pairs: Int64[Tensor, "b 2"]) -> None:
        """Write the two masks of each picture of the share."""
        assert self.changes is not None
        points = torch.zeros(len(self.chosen), 2, 2)
        points[self.chunk] = self.of_masks[pairs.cpu()]
        self.centres[self.chosen[self.chunk]] = self.changes.source(points)[self.chunk]

    def synchronize(self, fabric: Fabric) -> None:
        """Take over what the other processes have written of their shares of the batch."""
        if fabric.world_size == 1:
            return
        own = torch.zeros(len(self.chosen), dtype=torch.bool)
        own[fabric.global_rank :: fabric.world_size] = True  # not a picture that was only taken along
        written = torch.where(own[:, None, None], self.centres[self.chosen], 0.0)
        met = fabric.all_reduce(written.to(fabric.device), reduce_op="sum")
        assert isinstance(met, Tensor)
        self.centres[self.chosen] = met.cpu()
