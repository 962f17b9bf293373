"""Random changes of the pictures of a batch: shifts, crops, mirror images, turns, larger and smaller, other colours, mixed."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from certipatch.training.recipe import Augment


@dataclass(frozen=True)
class Changes:
    """The changes of each image of a batch: (H, W) pixels are cut out of it, then mirrored or not, then turned.

    Args:
        size: (H, W) of what is shown.
        corners: where its upper left pixel lies in the picture; beyond its borders, where black comes in.
        mirrored: left to right.
        turned: the matrix that takes steps (rows, columns) from the middle of what is shown to those before it was turned
            and scaled; None where nothing is.
    """

    size: tuple[int, int]
    corners: Int64[Tensor, "B 2"]
    mirrored: Bool[Tensor, " B"]
    turned: Float[Tensor, "B 2 2"] | None = None

    def of(self, images: Tensor) -> Tensor:
        """Changed copies of uint8 pictures (B, C, H, W); of turned ones the values are floats, between those of pixels."""
        if self.turned is not None:
            return self._sampled(images)
        full = images.shape[2:]
        margin = int((-self.corners).amax().clamp(min=0))
        for side, length, last in zip(full, self.size, self.corners.amax(0).tolist(), strict=True):
            margin = max(margin, last + length - side)
        if margin:
            images = torch.nn.functional.pad(images, (margin,) * 4)
        if margin or self.size != tuple(full):
            images = _cut(images, self.corners.to(images.device) + margin, self.size)
        mirrored = self.mirrored.to(images.device)
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)

    def source(self, points: Float[Tensor, "B n 2"]) -> Float[Tensor, "B n 2"]:
        """Positions (row, column) in the original image of points of the changed one."""
        if self.turned is not None:
            points = self._middle + (points - self._middle) @ self.turned.mT
        return self._opposite(points) + self.corners[:, None]

    def shown(self, points: Float[Tensor, "B n 2"]) -> Float[Tensor, "B n 2"]:
        """Positions (row, column) in the changed image of points of the original one."""
        points = self._opposite(points - self.corners[:, None])
        if self.turned is not None:
            points = self._middle + (points - self._middle) @ torch.linalg.inv(self.turned).mT
        return points

    @property
    def _middle(self) -> Float[Tensor, " 2"]:
        return torch.tensor([(side - 1) / 2 for side in self.size])

    def _opposite(self, points: Tensor) -> Tensor:
        opposite = torch.stack([points[..., 0], self.size[1] - 1 - points[..., 1]], dim=-1)
        return torch.where(self.mirrored[:, None, None], opposite, points)

    def _sampled(self, images: Tensor) -> Tensor:
        """Bilinear; black beyond the borders."""
        pixels = torch.cartesian_prod(*(torch.arange(float(side)) for side in self.size))
        source = self.source(pixels.expand(len(images), -1, -1)).view(len(images), *self.size, 2)
        sides = torch.tensor(images.shape[:1:-1])
        grid = (2 * source.flip(-1) + 1) / sides - 1
        return F.grid_sample(images.float(), grid.to(images.device), align_corners=False)


def draw_changes(batch: int, image_size: tuple[int, int], augment: Augment, draw: torch.Generator) -> Changes:
    """Draw the changes of each of ``batch`` images of (H, W) pixels."""
    corners, size = torch.zeros(batch, 2, dtype=torch.int64), image_size
    if augment.max_shift:
        corners = torch.randint(0, 2 * augment.max_shift + 1, (batch, 2), generator=draw) - augment.max_shift
    if augment.crop is not None:
        inner = [torch.randint(0, side - augment.crop + 1, (batch,), generator=draw) for side in image_size]
        corners, size = corners + torch.stack(inner, dim=1), (augment.crop, augment.crop)
    mirrored = torch.rand(batch, generator=draw) < 0.5 if augment.flip else torch.zeros(batch, dtype=torch.bool)
    turned = _turns(batch, augment, draw) if augment.max_rotation or augment.max_scale else None
    return Changes(size, corners, mirrored, turned)


def recoloured(images: Float[Tensor, "B C H W"], most: float, draw: torch.Generator) -> Float[Tensor, "B C H W"]:
    """Pictures in [0, 1] of other brightness, contrast and saturation, each times a factor in [1 / (1 + most), 1 + most]."""
    factors = (1 + most) ** (2 * torch.rand(3, len(images), 1, 1, 1, generator=draw) - 1)
    brightness, contrast, saturation = factors.to(images.device)
    images = brightness * images
    for factor, axes in ((contrast, (1, 2, 3)), (saturation, (1,))):
        centre = images.mean(axes, keepdim=True)
        images = centre + factor * (images - centre)
    return images.clamp(0, 1)


def mixed(
    images: Float[Tensor, "B C H W"], targets: Float[Tensor, "B K"], most: float, draw: torch.Generator
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
    """Each picture with a share, at most ``most``, of another of the batch, and targets likewise (Zhang et al., ICLR 2018)."""
    share = most * torch.rand(len(images), 1, generator=draw).to(images.device)
    other = torch.randperm(len(images), generator=draw).to(images.device)
    return images.lerp(images[other], share[:, :, None, None]), targets.lerp(targets[other], share)


def _turns(batch: int, augment: Augment, draw: torch.Generator) -> Float[Tensor, "B 2 2"]:
    """Angles are drawn evenly, factors of the two axes evenly in their logarithm."""
    uniform = 2 * torch.rand(batch, 3, generator=draw) - 1
    angle, factors = math.radians(augment.max_rotation) * uniform[:, 0], (1 + augment.max_scale) ** uniform[:, 1:]
    rows = [torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)]
    return torch.stack(rows, 1) * factors[:, None]


def _cut(images: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """A part of (H, W) pixels of each picture, with its upper left pixel at ``corners`` (B, 2)."""
    rows, columns = (
        corners[:, axis, None] + torch.arange(length, device=images.device) for axis, length in enumerate(size)
    )
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
