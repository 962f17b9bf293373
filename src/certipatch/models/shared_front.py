"""Networks in two parts: a front of small receptive fields, and a light back end that bears hidden features.

What a cell of the front's map says depends on the pixels of its receptive field alone, so the map is computed once per
image, and a mask is laid over the map: every cell that sees a masked pixel is hidden from the back end (Xiang et al.,
PatchCURE, USENIX Security 2024).
"""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.bagnet import BagNet, Depths
from certipatch.models.layers import Position
from certipatch.models.passes import run_in_passes
from certipatch.models.receptive_field import receptive_fields
from certipatch.models.settings import Depth, NetworkSettings, Pixels, Widths
from certipatch.models.vit import ROWS, Block, EmbedDim, check_tokens, cut, groups, null_encoded, visible_pixels
from certipatch.views import RandomViews, ReceptiveFields, Views


class SharedBagNetSettings(NetworkSettings):
    """BagNet-like front of small receptive fields, and a light convolutional back end."""

    shared_front: ClassVar[bool] = True
    name: Literal["shared-bagnet"] = "shared-bagnet"
    receptive_field: Pixels = 6
    """Side in pixels of the front's: 6, 10, 9, 17 or 33."""
    widths: Widths | None = None
    """Channels of the front, its features and the back end; those of the receptive field's layout if absent."""
    depths: Depths = (3, 4, 6, 3)
    """Blocks of each stage of a BagNet."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return SharedBagNet(channels, classes, image_size, **self.sizes())


class SharedViTSettings(NetworkSettings):
    """Vision transformer whose first blocks attend within windows, and whose others skip hidden windows."""

    shared_front: ClassVar[bool] = True
    name: Literal["shared-vit"] = "shared-vit"
    patch_size: Pixels = 2
    """Side of a token in pixels."""
    window_size: Pixels = 2
    """Side in tokens of the windows that the front attends within."""
    embed_dim: EmbedDim = 128
    front_depth: Depth = 4
    """Blocks of the front."""
    depth: Depth = 2
    """Blocks of the back end."""
    num_heads: Depth = 4
    """Heads of each attention."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return SharedViT(channels, classes, image_size, **self.sizes())


class SharedFront(nn.Module):
    """A front and a back end. Subclasses say what both compute, and which pixels a cell of the front sees.

    ``forward`` maps NULL-encoded views (N, 2C, H, W), or whole images (N, C, H, W), to logits (N, K): the front, then the
    back end with every cell hidden that sees a hidden pixel. So it serves every defense of whole or NULL-encoded images,
    at the price of a front per view; ``PatchCURE`` computes the front once.
    """

    encoding = "null"

    def __init__(self, in_channels: int, image_size: tuple[int, int], fields: ReceptiveFields):
        super().__init__()
        self.in_channels, self.image_size, self.fields = in_channels, image_size, fields
        for axis, name in enumerate(("_rows", "_columns")):  # (h, H), (w, W): pixels that a row or column of cells sees
            self.register_buffer(name, fields._axis(axis, image_size[axis]).float(), persistent=False)

    @abstractmethod
    def front(self, views: Float[Tensor, "N C2 H W"]) -> Float[Tensor, "N D h w"]:
        """Features of NULL-encoded images."""

    @abstractmethod
    def back(self, features: Float[Tensor, "n D1 h w"]) -> Float[Tensor, "n K"]:
        """Logits of features, of which the last channel says 1 where a cell is shown, and all say 0 where it is hidden."""

    def features(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D1 h w"]:
        """Compute the input of the back end for whole images or NULL-encoded views when no cell is hidden."""
        computed = self.front(null_encoded(images, self.in_channels, self.image_size))
        return torch.cat([computed, torch.ones_like(computed[:, :1])], dim=1)

    def shown_cells(self, visible: Bool[Tensor, "N H W"]) -> Bool[Tensor, "N h w"]:
        """Cells that see no hidden pixel."""
        rows, columns = self.get_buffer("_rows"), self.get_buffer("_columns")
        with torch.autocast(visible.device.type, enabled=False):  # which would round counts
            hidden = rows @ (~visible).to(rows.dtype) @ columns.T
        return hidden < 0.5

    def seen_pixels(self, cells: Bool[Tensor, "N h w"]) -> Bool[Tensor, "N H W"]:
        """Pixels that some of the cells see."""
        rows, columns = self.get_buffer("_rows"), self.get_buffer("_columns")
        return (rows.T @ cells.to(rows) @ columns) > 0.5

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        views = null_encoded(views, self.in_channels, self.image_size)
        shown = self.shown_cells(visible_pixels(views))
        return self.back(torch.where(shown[:, None], self.features(views), 0.0))


class SharedBagNet(SharedFront):
    """BagNet-like front of small receptive fields, light convolutional back end; hidden features cost little.

    Args:
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) in pixels.
        receptive_field: of the front in pixels: 6 or 10 at a stride of 2, for small images; 9, 17 or 33 at a stride
            of 8, a BagNet's.
        widths: channels of the front's two or three stages, of its features, and of the two stages of the back end; of a
            BagNet the planes of its four stages, of its features, and of the back end.
        depths: blocks of each stage of a BagNet.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        receptive_field: int = 6,
        widths: tuple[int, ...] | None = None,
        depths: tuple[int, ...] = (3, 4, 6, 3),
    ):
        if receptive_field in (6, 10):
            widths = widths or (64, 128, 64, 96, 128)
            front = _small_front(2 * in_channels, image_size, receptive_field, _checked(widths, 5)[:3])
        elif receptive_field in BagNet.KERNELS:
            widths = widths or (64, 128, 256, 512, 128, 128, 256)
            front = BagNet(2 * in_channels, _checked(widths, 7)[4], receptive_field, widths[:4], depths).local
        else:
            raise InputError(
                f"the receptive field of a shared front is 6, 10, 9, 17 or 33 pixels, not {receptive_field}"
            )
        super().__init__(in_channels, image_size, receptive_fields(front.eval(), image_size))
        self.local = front.train()
        (features, first, second), layers = widths[-3:], []
        for inputs, outputs in ((features + 1, first), (first, second)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
        self.rest = nn.Sequential(*layers)
        self.head = nn.Linear(second, num_classes)

    def front(self, views: Float[Tensor, "N C2 H W"]) -> Float[Tensor, "N D h w"]:
        return self.local(views)

    def back(self, features: Float[Tensor, "n D1 h w"]) -> Float[Tensor, "n K"]:
        return self.head(torch.amax(self.rest(features), dim=(2, 3)))


class SharedViT(SharedFront):
    """Vision transformer whose first blocks attend within windows; its back end skips the tokens of hidden windows.

    Args:
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) in pixels, multiples of patch_size · window_size.
        patch_size: side of a token in pixels.
        window_size: side of a window in tokens; a cell of the front is a window, and sees its pixels.
        embed_dim: channels of a token, a multiple of ``num_heads``.
        front_depth: blocks within windows.
        depth: blocks of the back end.
        num_heads: of each attention.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        patch_size: int = 2,
        window_size: int = 2,
        embed_dim: int = 128,
        front_depth: int = 4,
        depth: int = 2,
        num_heads: int = 4,
    ):
        side = patch_size * window_size
        if any(pixels % side for pixels in image_size):
            raise InputError(
                f"windows of {side} pixels do not fill {image_size[0]}x{image_size[1]}; use another patch_size"
            )
        if embed_dim % num_heads:
            raise InputError(f"{num_heads} heads cannot share {embed_dim} channels; use a multiple")
        check_tokens(image_size, patch_size)
        grid = (image_size[0] // side, image_size[1] // side)
        super().__init__(in_channels, image_size, ReceptiveFields((side, side), (side, side), (0, 0), grid))
        self.patch_size, self.window_size, self.skip_hidden = patch_size, window_size, True
        self.embed = nn.Linear(2 * in_channels * patch_size**2, embed_dim)
        self.position = nn.Parameter(torch.zeros(grid[0] * grid[1], window_size**2, embed_dim))
        self.first = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.local = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(front_depth))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(embed_dim, eps=1e-6), nn.Linear(embed_dim, num_classes)
        for tensor in (self.first, self.position):
            nn.init.trunc_normal_(tensor, std=0.02)

    def front(self, views: Float[Tensor, "N C2 H W"]) -> Float[Tensor, "N D h w"]:
        side = self.patch_size * self.window_size
        windows = cut(views, side).flatten(0, 1).unflatten(1, (views.shape[1], side, side))
        tokens = self.embed(cut(windows, self.patch_size)).unflatten(0, (-1, len(self.position))) + self.position
        tokens = tokens.flatten(0, 1)
        for block in self.local:
            tokens = block(tokens)
        return tokens.flatten(1).unflatten(0, (-1, len(self.position))).mT.unflatten(2, self.fields.grid)

    def back(self, features: Float[Tensor, "n D1 h w"]) -> Float[Tensor, "n K"]:
        cells = features.flatten(2).mT
        shown, tokens = cells[..., -1] > 0.5, cells[..., :-1].unflatten(2, (self.window_size**2, -1))
        if not self.skip_hidden:
            return self._answer(tokens, shown.repeat_interleave(self.window_size**2, 1))
        answers, members = [], []
        for chosen, index in groups(shown):

            def answer(rows: Tensor, chosen: Tensor = chosen, index: Tensor = index) -> Tensor:
                return self._answer(tokens[chosen[rows, None], index[rows]])

            answers.append(run_in_passes(answer, torch.arange(len(chosen), device=tokens.device), ROWS))
            members.append(chosen)
        return torch.cat(answers)[torch.cat(members).argsort()]

    def _answer(
        self, tokens: Float[Tensor, "n cells tokens D"], shown: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "n K"]:
        mixed = torch.cat([self.first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens.flatten(1, 2)], dim=1)
        seen = None if shown is None else nn.functional.pad(shown, (1, 0), value=True)[:, None, None]
        for block in self.blocks:
            mixed = block(mixed, seen)
        return self.head(self.norm(mixed[:, 0]))


def _checked(widths: tuple[int, ...], number: int) -> tuple[int, ...]:
    if len(widths) != number:
        raise InputError(f"this shared front has {number} widths, not {len(widths)}")
    return widths


def _small_front(inputs: int, image_size: tuple[int, int], field: int, widths: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions before and, for a field of 10, after 2x2 pooling; a cell for every 2x2 pixels."""
    first, second, features = widths
    kernel = 3 if field == 10 else 1
    layers: list[nn.Module] = []
    for channels, outputs in ((inputs, first), (first, second)):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(second, second, kernel, padding=kernel // 2, bias=False)]
    layers += [Position(second, image_size[0] // 2, image_size[1] // 2), nn.BatchNorm2d(second), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(second, features, 1), nn.GELU())
