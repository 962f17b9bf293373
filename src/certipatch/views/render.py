"""Rendering of views for a network: pure functions from images to network inputs.

Every one of them writes hidden pixels over with a constant, or never copies them: what a network gets depends on the
visible pixels alone. The caller's images are never changed.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certipatch.errors import InputError
from certipatch.views.bands import Bands, Rows
from certipatch.views.base import Views
from certipatch.views.blocks import Blocks
from certipatch.views.cross import Cross

Fill = float | tuple[float, ...]
"""The paint of hidden pixels: one value, or one per channel."""


def image_size(images: Tensor) -> tuple[int, int]:
    """(H, W) of images (B, C, H, W)."""
    return images.shape[2], images.shape[3]


def null(images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "v H W"]) -> Float[Tensor, "B v C2 H W"]:
    """Visible pixels as ``[x, 1 − x]``, hidden ones as zeros in all 2C channels, a value that no pixel has.

    Levine & Feizi 2020, section 2.2.1.
    """
    both = torch.cat([images, 1 - images], dim=1)
    return torch.where(visible[None, :, None], both[:, None], torch.zeros((), dtype=images.dtype, device=images.device))


def fill(
    images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "v H W"], value: Fill = 0.5
) -> Float[Tensor, "B v C H W"]:
    """Hidden pixels replaced by one constant, or one per channel, for networks that know nothing of ablation."""
    return torch.where(visible[None, :, None], images[:, None], constant(images, value))


def constant(images: Float[Tensor, "B C H W"], value: Fill) -> Float[Tensor, "..."]:
    """The value of hidden pixels, as a tensor that broadcasts over images. InputError unless one per channel."""
    if isinstance(value, tuple) and len(value) not in (1, images.shape[1]):
        raise InputError(f"a fill has one value, or one for each of {images.shape[1]} channels, not {len(value)}")
    return torch.tensor(value, dtype=images.dtype, device=images.device).view(-1, 1, 1)


def crop(
    images: Float[Tensor, "B C H W"], views: Bands | Blocks | Cross, index: Int[Tensor, " v"]
) -> Float[Tensor, "B v C1 h w"]:
    """The visible pixels alone, and their position in [0, 1) as further channels.

    A column band gives H x s pixels, a row band the same image turned (W x s), each with one channel of position;
    a block gives s x s pixels with two. A cross gives its columns and rows with one more channel: 0 for columns, 1 for
    rows.
    """
    if isinstance(views, Cross):
        return _crop_cross(images, views, index)
    rows, columns, position = _crops(images, views, index)
    if rows is None:
        turned = images.transpose(2, 3) if isinstance(views, Rows) else images
        pixels = turned[:, :, :, columns].permute(0, 3, 1, 2, 4)
    else:
        pixels = images[:, :, rows[:, :, None], columns[:, None, :]].permute(0, 2, 1, 3, 4)
    channels = position[None, :, :, None, None].expand(len(images), -1, -1, *pixels.shape[3:])
    return torch.cat([pixels, channels], dim=2)


def _crops(
    images: Float[Tensor, "B C H W"], views: Bands | Blocks, index: Int[Tensor, " v"]
) -> tuple[Int[Tensor, "v s"] | None, Int[Tensor, "v s"], Float[Tensor, "v p"]]:
    """Rows of each block, or None; columns (of a row band: rows) of each block or band; their positions in [0, 1)."""
    if views.count != 1:
        raise InputError(f"a crop shows one band or block, not {views.count}; use the null encoding")
    size, device = image_size(images), images.device
    reach = torch.arange(views.width, device=device)
    index = index.to(device)
    if isinstance(views, Bands):
        length = size[0] if isinstance(views, Rows) else size[1]
        starts = torch.tensor(views.starts(size), device=device)[index]
        return None, (starts[:, None] + reach) % length, (starts / length)[:, None].to(images.dtype)
    tops, lefts = (torch.tensor(places, device=device) for places in views.starts(size))
    top, left = tops[index // len(lefts)], lefts[index % len(lefts)]
    position = torch.stack([top / size[0], left / size[1]], 1).to(images.dtype)
    return (top[:, None] + reach) % size[0], (left[:, None] + reach) % size[1], position


def crop_each(
    images: Float[Tensor, "n C H W"], views: Bands | Blocks | Cross, index: Int[Tensor, " n"]
) -> Float[Tensor, "n C1 h w"]:
    """View ``index[i]`` of image i, as ``crop`` gives it."""
    if isinstance(views, Cross):
        first = views.parts[0].number(image_size(images))
        turned = (index >= first).to(images.device)
        shape = (len(images), images.shape[1] + 2, images.shape[2], views.width)
        cropped = torch.empty(shape, dtype=images.dtype, device=images.device)
        for part, chosen, flag in ((views.parts[0], ~turned, 0), (views.parts[1], turned, 1)):
            cropped[chosen, :-1] = crop_each(images[chosen], part, index.to(images.device)[chosen] - flag * first)
            cropped[chosen, -1] = flag
        return cropped
    rows, columns, position = _crops(images, views, index)
    each = torch.arange(len(images), device=images.device)
    if rows is None:
        turned = images.transpose(2, 3) if isinstance(views, Rows) else images
        pixels = turned[each[:, None], :, :, columns].permute(0, 2, 3, 1)
    else:
        pixels = images[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.cat([pixels, position[:, :, None, None].expand(-1, -1, *pixels.shape[2:])], dim=1)


def _crop_cross(
    images: Float[Tensor, "B C H W"], views: Cross, index: Int[Tensor, " v"]
) -> Float[Tensor, "B v C2 s w"]:
    height, width = images.shape[2:]
    if height != width:
        raise InputError(f"a cross can be cropped from square pictures alone, not {height}x{width}; use strip networks")
    columns, rows = views.parts
    first = columns.number((height, width))
    turned = index >= first
    shape = (len(images), len(index), images.shape[1] + 2, height, views.width)
    cropped = torch.empty(shape, dtype=images.dtype, device=images.device)
    for part, chosen, flag in ((columns, ~turned, 0.0), (rows, turned, 1.0)):
        cropped[:, chosen, :-1] = crop(images, part, index[chosen] - int(flag) * first)
        cropped[:, chosen, -1] = flag
    return cropped


def render(
    encoding: str, images: Float[Tensor, "B C H W"], views: Views, index: Int[Tensor, " v"], value: Fill = 0.5
) -> Float[Tensor, "B v ..."]:
    """Views ``index`` of every image in one of the encodings ``null``, ``fill``, ``crop``. ValueError on another.

    ``value`` is what ``fill`` paints hidden pixels with.
    """
    if encoding == "crop":
        if not isinstance(views, Bands | Blocks | Cross):
            raise InputError("only bands and blocks can be cropped; use the null encoding")
        return crop(images, views, index)
    if encoding not in ("null", "fill"):
        raise InputError(f"unknown encoding {encoding!r}; use null, fill or crop")
    visible = views.visible(image_size(images), index).to(images.device)
    return null(images, visible) if encoding == "null" else fill(images, visible, value)


def render_each(
    encoding: str, images: Float[Tensor, "n C H W"], views: Views, index: Int[Tensor, " n"], value: Fill = 0.5
) -> Float[Tensor, "n ..."]:
    """View ``index[i]`` of image i, as ``render`` gives it. ValueError on another encoding."""
    if encoding == "crop":
        if not isinstance(views, Bands | Blocks | Cross):
            raise InputError("only bands and blocks can be cropped; use the null encoding")
        return crop_each(images, views, index)
    if encoding not in ("null", "fill"):
        raise InputError(f"unknown encoding {encoding!r}; use null, fill or crop")
    visible = views.visible(image_size(images), index).to(images.device)[:, None]
    if encoding == "null":  # hidden pixels are selected away: a product would keep the sign of −0.0
        return torch.where(visible, torch.cat([images, 1 - images], dim=1), images.new_zeros(()))
    return torch.where(visible, images, constant(images, value))
