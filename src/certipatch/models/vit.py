"""Vision transformer that skips hidden tokens (Dosovitskiy et al. 2021; Salman et al., Smoothed ViT, 2022).

A view hides most of the image, and tokens that nobody may read need not be computed: a band of 4 of 32 columns costs
an eighth of a pass. A token is kept when it shows a pixel, its hidden pixels written over with the constant that NULL
encoding gives them, so that a view's answer depends on its visible pixels alone.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.errors import InputError
from certipatch.models.passes import run_in_passes
from certipatch.models.settings import Depth, NetworkSettings, Pixels
from certipatch.views import RandomViews, Views

MAX_TOKENS = 2**16  # of an image
ROWS = 8  # of equally many tokens in a pass

EmbedDim = Annotated[int, Field(ge=1, le=1280)]
"""Channels of a token."""


class ViTSettings(NetworkSettings):
    """Vision transformer: logits of NULL-encoded views of any kind, and of whole images; hidden tokens cost nothing."""

    name: Literal["vit"] = "vit"
    patch_size: Pixels = 4
    """Side of a token in pixels."""
    embed_dim: EmbedDim = 192
    depth: Depth = 6
    """Blocks."""
    num_heads: Depth = 3
    """Heads of each attention."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return ViT(views, channels, classes, image_size, **self.sizes())


def check_tokens(image_size: tuple[int, int], patch_size: int) -> None:
    """InputError if an image has too many tokens to learn a position of each."""
    if (image_size[0] // patch_size) * (image_size[1] // patch_size) > MAX_TOKENS:
        raise InputError(
            f"tokens of {patch_size} pixels are too many for {image_size[0]}x{image_size[1]}; use a larger patch_size"
        )


class Block(nn.Module):
    """Attention among tokens, then two linear layers on each; layer norm before both, shortcuts around both.

    Args:
        embed_dim: channels of a token.
        num_heads: of the attention; they share the channels.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6), nn.LayerNorm(embed_dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.fc1, self.fc2 = nn.Linear(embed_dim, 4 * embed_dim), nn.Linear(4 * embed_dim, embed_dim)

    def forward(
        self, tokens: Float[Tensor, "N t D"], shown: Bool[Tensor, "N 1 1 t"] | None = None
    ) -> Float[Tensor, "N t D"]:
        """Tokens that are not ``shown`` are read by none."""
        q, k, v = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


class ViT(nn.Module):
    """Vision transformer: logits of NULL-encoded views of any kind, and of whole images; hidden tokens cost nothing.

    Args:
        views: taken for the sake of the other networks; it reads all kinds.
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) in pixels, multiples of ``patch_size``; positions are learned, so one network serves one size.
        patch_size: side of a token in pixels.
        embed_dim: channels of a token, a multiple of ``num_heads``.
        depth: blocks.
        num_heads: of each attention.

    ``forward`` maps NULL-encoded views ``[x, 1 − x]`` (N, 2C, H, W), or whole images (N, C, H, W), to logits (N, K).
    Which pixels are visible is read off the views: there the two halves add up to 1, elsewhere to 0. Views of equally many
    tokens share passes of ``ROWS``. With ``skip_hidden`` False hidden tokens are computed and masked in every
    attention, to the same answers.
    """

    encoding = "null"

    def __init__(
        self,
        views: Views | RandomViews | None,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        patch_size: int = 4,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 3,
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise InputError(
                f"tokens of {patch_size} pixels do not fill {image_size[0]}x{image_size[1]}; use another patch_size"
            )
        check_tokens(image_size, patch_size)
        if embed_dim % num_heads:
            raise InputError(f"{num_heads} heads cannot share {embed_dim} channels; use a multiple")
        self.in_channels, self.patch_size, self.image_size = in_channels, patch_size, image_size
        self.skip_hidden = True
        self.embed = nn.Linear(2 * in_channels * patch_size**2, embed_dim)
        self.first = nn.Parameter(
            torch.zeros(1, 1, embed_dim)
        )  # the token that gathers the answer, its position included
        tokens = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        self.position = nn.Parameter(torch.zeros(tokens, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        for tensor in (self.first, self.position):
            nn.init.trunc_normal_(tensor, std=0.02)

    def forward(self, views: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        views = null_encoded(views, self.in_channels, self.image_size)
        pieces, shown = cut(views, self.patch_size), visible_tokens(views, self.patch_size)
        if not self.skip_hidden:
            seen = F.pad(shown, (1, 0), value=True)[:, None, None]
            return self.answer(self.embed(pieces) + self.position, seen)
        answers, members = [], []
        for chosen, index in groups(shown):

            def answer(rows: Tensor, chosen: Tensor = chosen, index: Tensor = index) -> Tensor:
                kept = pieces[chosen[rows, None], index[rows]]
                return self.answer(self.embed(kept) + self.position[index[rows]])

            answers.append(run_in_passes(answer, torch.arange(len(chosen), device=views.device), ROWS))
            members.append(chosen)
        return torch.cat(answers)[torch.cat(members).argsort()]

    def answer(
        self, tokens: Float[Tensor, "n t D"], shown: Bool[Tensor, "n 1 1 t1"] | None = None
    ) -> Float[Tensor, "n K"]:
        """Logits of embedded tokens; those that are not ``shown`` (the first one included) are read by none."""
        tokens = torch.cat([self.first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, shown)
        return self.head(self.norm(tokens[:, 0]))


def null_encoded(views: Float[Tensor, "N C H W"], channels: int, image_size: tuple[int, int]) -> Tensor:
    """NULL-encoded views as they are, whole images encoded. InputError on any other shape."""
    if tuple(views.shape[2:]) != image_size or views.shape[1] not in (channels, 2 * channels):
        raise InputError(
            f"the network reads {channels} or, NULL-encoded, {2 * channels} channels of {image_size[0]}x{image_size[1]} pixels, "
            f"not {tuple(views.shape[1:])}"
        )
    return views if views.shape[1] == 2 * channels else torch.cat([views, 1 - views], dim=1)


def visible_pixels(views: Float[Tensor, "N C2 H W"]) -> Bool[Tensor, "N H W"]:
    """Compute the visible pixels of NULL-encoded views: the halves of a channel add up to 1 there, and to 0 elsewhere."""
    one, other = views.chunk(2, dim=1)
    return (one + other)[:, 0] > 0.5


def visible_tokens(views: Float[Tensor, "N C2 H W"], patch_size: int) -> Bool[Tensor, "N T"]:
    """Compute the tokens of NULL-encoded views that show a pixel, row by row."""
    shown = visible_pixels(views).unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    return shown.any(4).any(2).flatten(1)


def cut(views: Float[Tensor, "N C H W"], patch_size: int) -> Float[Tensor, "N T P"]:
    """Squares of ``patch_size`` x ``patch_size`` pixels, row by row; P runs over channels, rows and columns."""
    grid = views.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # N C h p w p
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def groups(shown: Bool[Tensor, "N T"]) -> list[tuple[Tensor, Tensor]]:
    """Views of equally many tokens: their numbers (n,), and which tokens each of them keeps (n, t)."""
    counts = shown.sum(1)
    groups = []
    for count in counts.unique().tolist():
        chosen = (counts == count).nonzero()[:, 0]
        groups.append((chosen, shown[chosen].nonzero()[:, 1].view(len(chosen), count)))
    return groups


def from_timm(
    weights: Mapping[str, Tensor],
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
) -> dict[str, Tensor]:
    """The weights of a timm ``vit_*_patch*`` under this network's names, to the same answers on whole images.

    Args:
        weights: timm's ``state_dict()`` of a plain ViT with a class token (no registers, distillation or layer scale).
        mean, std: with which that model normalises pixels, per channel. (x − m)/s = ((1 − m)·x − m·(1 − x))/s moves into
            the embedding of the two halves; a hidden pixel then weighs as much as one of value m.

    Errors: InputError that names what is missing or unknown.
    """
    left = dict(weights)

    def take(name: str) -> Tensor:
        if name not in left:
            raise InputError(f"these are no weights of a plain timm ViT: {name} is missing")
        return left.pop(name)

    kernel, positions = take("patch_embed.proj.weight"), take("pos_embed")[0]
    if kernel.shape[1] != len(mean) or len(mean) != len(std):
        raise InputError(f"mean and std need a value for each of {kernel.shape[1]} channels")
    m, s = (kernel.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    tensors: dict[str, Tensor] = {
        "embed.weight": torch.cat([kernel * (1 - m) / s, -kernel * m / s], dim=1).flatten(1),
        "embed.bias": take("patch_embed.proj.bias"),
        "first": take("cls_token") + positions[0],
        "position": positions[1:],
    }
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.qkv": "qkv",
        "attn.proj": "proj",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    for number in range(len({name.split(".")[1] for name in left if name.startswith("blocks.")})):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                tensors[f"blocks.{number}.{ours}.{kind}"] = take(f"blocks.{number}.{theirs}.{kind}")
    for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
        tensors[name] = take(name)
    if left:
        raise InputError(f"these are no weights of a plain timm ViT: {next(iter(left))} is unknown")
    return tensors


def sizes_of(weights: Mapping[str, Tensor], channels: int = 3) -> dict[str, Any]:
    """Settings of the ViT that ``from_timm`` weights fit, but for its heads."""
    embed_dim, pixels = weights["embed.weight"].shape
    patch_size = round((pixels / (2 * channels)) ** 0.5)
    depth = sum(name.endswith("norm1.weight") for name in weights)
    return {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth}
