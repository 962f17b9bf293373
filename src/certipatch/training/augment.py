"""Random changes of the pictures of a batch: shifts, crops, mirror images."""

import torch
from torch import Tensor

from certipatch.training.recipe import Augment


def augmented(images: Tensor, asked: Augment, draw: torch.Generator) -> Tensor:
    """Shifted, cropped and mirrored copies of uint8 pictures (B, C, H, W)."""
    height, width = images.shape[2:]
    if asked.shift:
        moves = torch.randint(0, 2 * asked.shift + 1, (len(images), 2), generator=draw).to(images.device)
        images = _cut(torch.nn.functional.pad(images, (asked.shift,) * 4), moves, (height, width))
    if asked.crop is not None:
        corners = [torch.randint(0, side - asked.crop + 1, (len(images),), generator=draw) for side in (height, width)]
        images = _cut(images, torch.stack(corners, dim=1).to(images.device), (asked.crop, asked.crop))
    if asked.flip:
        mirrored = (torch.rand(len(images), generator=draw) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _cut(images: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """A part of (H, W) pixels of each picture, with its upper left pixel at ``corners`` (B, 2)."""
    rows, columns = (
        corners[:, axis, None] + torch.arange(length, device=images.device) for axis, length in enumerate(size)
    )
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
