"""Views and network as a graph: images → logits of every view. The pixels of each view are constants of the graph."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certipatch.defenses.masked import MaskedClassifier
from certipatch.models import CrossConvNet, ViT
from certipatch.models.vit import cut, groups, visible_tokens
from certipatch.views import Bands, Blocks, Cross, Views
from certipatch.views.render import constant, crop, null

Logits = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) → logits (B, V, K)."""


def logits(model: nn.Module, views: Views, image_size: tuple[int, int], channels: int) -> Logits:
    """The function that ``evidence.logits`` computes, for images of one size."""
    if isinstance(model, MaskedClassifier):
        if isinstance(model.model, ViT):
            return logits(model.model, views, image_size, channels)
    elif isinstance(model, CrossConvNet):
        assert isinstance(views, Cross)
        parts = [logits(net, part, image_size, channels) for net, part in zip(model.parts, views.parts, strict=True)]
        return lambda images: torch.cat([part(images) for part in parts], dim=1)
    encoding = getattr(model, "encoding", "null")
    if encoding == "all-views":
        return model
    if encoding == "crop":
        assert isinstance(views, Bands | Blocks)
        return _each(model, _cropped(views, image_size))
    visible = views.visible(image_size)
    if isinstance(model, ViT):
        return _kept_tokens(model, visible)
    if encoding == "null":
        return _each(model, lambda images: null(images, visible))
    value = constant(torch.zeros(1, channels, 1, 1), getattr(model, "fill", 0.5))
    return _each(model, lambda images: torch.where(visible[None, :, None], images[:, None], value))


def _each(model: nn.Module, rendered: Callable[[Tensor], Tensor]) -> Logits:
    def answer(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V K"]:
        shown = rendered(images)
        return model(shown.flatten(0, 1)).unflatten(0, (-1, shown.shape[1]))

    return answer


def _cropped(views: Bands | Blocks, image_size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    height, width = image_size
    numbers = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    cut_out = crop(numbers, views, torch.arange(views.number(image_size)))[0]  # pixel numbers, then positions
    place, position = cut_out[:, 0].long(), cut_out[:, 1:].float()

    def rendered(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V C1 h w"]:
        pixels = images.flatten(2)[:, :, place].transpose(1, 2)
        return torch.cat([pixels, position.expand(pixels.shape[0], -1, -1, -1, -1)], dim=2)

    return rendered


def _kept_tokens(model: ViT, visible: Tensor) -> Logits:
    """The tokens that each view keeps, as indices; views of equally many share a batch."""
    blank = torch.zeros(1, model.in_channels, *visible.shape[1:])
    token_groups = groups(visible_tokens(null(blank, visible)[0], model.patch_size))
    order = torch.cat([chosen for chosen, _ in token_groups]).argsort()

    def answer(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V K"]:
        shown = null(images, visible)
        pieces = cut(shown.flatten(0, 1), model.patch_size).unflatten(0, (-1, shown.shape[1]))
        answers = []
        for chosen, index in token_groups:
            kept = pieces[:, chosen[:, None], index]
            tokens = model.embed(kept) + model.position[index]
            answers.append(model.answer(tokens.flatten(0, 1)).unflatten(0, (-1, len(chosen))))
        return torch.cat(answers, dim=1)[:, order]

    return answer
