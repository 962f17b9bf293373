"""Evidence: a network's answers to every view, each view computed once; scores, votes, and their rounding."""

import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from certipatch.errors import InputError
from certipatch.inference import batch_size_for, canonical_logits
from certipatch.views import Views
from certipatch.views.render import image_size, render, render_each


@final
@dataclass(frozen=True)
class Tolerance:
    """Rounding of a score: it may be off by ``atol + rtol·|score|``."""

    atol: float
    rtol: float

    def of(self, scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The tolerance of each score."""
        return self.atol + self.rtol * scores.abs()


def weights_digest(model: nn.Module) -> bytes:
    """SHA-256 of a network's weights and buffers: another one once they are changed, in whatever way."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def precision_of(model: nn.Module, images: Tensor) -> torch.dtype:
    """The coarsest of the types in which a network computes: of its weights, of a black box that says so, of the images."""
    own = [p.dtype for p in model.parameters() if p.is_floating_point()]
    declared = [getattr(module, "dtype", None) for module in model.modules()]
    boxes = [dtype for dtype in declared if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    return max([*own, *boxes, images.dtype], key=lambda dtype: torch.finfo(dtype).eps)


def logits(
    model: nn.Module,
    views: Views,
    images: Float[Tensor, "B C H W"],
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "B v K"]:
    """The network's logits for views ``index`` (all V when None) of every image, by canonical inference.

    A model whose ``encoding`` is ``all-views`` maps images to (B, V, K) itself; any other gets rendered views. The default
    encoding is ``null``. ``batch_size`` is that of ``inference.canonical_logits``.
    """
    number = views.number(image_size(images))
    if getattr(model, "encoding", "null") == "all-views":
        # a copy of the pictures: the network may write into it
        every = canonical_logits(model, len(images), lambda rows: images[rows.to(images.device)], batch_size)
        if every.ndim != 3 or every.shape[1] != number:
            raise InputError(f"the model gives {tuple(every.shape)} where (B, V={number}, K) is needed")
        return every if index is None else every[:, index]
    index = torch.arange(number) if index is None else index
    picture = torch.arange(len(images)).repeat_interleave(len(index))
    return logits_of(model, views, images, picture, index.repeat(len(images)), batch_size).unflatten(
        0, (len(images), len(index))
    )


def logits_of(
    model: nn.Module,
    views: Views,
    images: Float[Tensor, "B C H W"],
    picture: Int64[Tensor, " n"],
    index: Int64[Tensor, " n"],
    batch_size: int | None = None,
) -> Float[Tensor, "n K"]:
    """The network's logits for view ``index[i]`` of image ``picture[i]``, n ≥ 1, by canonical inference."""
    encoding, fill = getattr(model, "encoding", "null"), getattr(model, "fill", 0.5)
    picture, index = picture.to(images.device), index.cpu()

    def rendered(rows: Int64[Tensor, " r"]) -> Tensor:
        return render_each(encoding, images[picture[rows.to(images.device)]], views, index[rows], fill)

    answer = canonical_logits(model, len(index), rendered, batch_size)
    if answer.ndim != 2:
        raise InputError(f"the model gives {tuple(answer.shape)} where (N, K) is needed")
    return answer


def differentiable_logits(
    model: nn.Module, views: Views, images: Float[Tensor, "N C H W"], index: Tensor | None = None
) -> Float[Tensor, "N v K"]:
    """The network's logits for views of every image, as ``logits``, with gradients: for attacks, never for answers.

    Views beyond one forward pass of ``inference.PIXELS`` pixels are computed again on the way back, to save memory.
    """
    encoding = getattr(model, "encoding", "null")
    if encoding == "all-views":
        every = model(images).to(images.dtype)
        return every if index is None else every[:, index]
    index = torch.arange(views.number(image_size(images))) if index is None else index
    step = batch_size_for(images[:, 0].numel())

    def answers(pictures: Tensor, chosen: Tensor) -> Tensor:
        shown = render(encoding, pictures, views, chosen, getattr(model, "fill", 0.5))
        return model(shown.flatten(0, 1)).to(images.dtype).unflatten(0, shown.shape[:2])

    if len(index) <= step or not images.requires_grad:
        return torch.cat([answers(images, chosen) for chosen in index.split(step)], 1)
    parts = [checkpoint(answers, images, chosen, use_reentrant=False) for chosen in index.split(step)]
    return torch.cat([part for part in parts if isinstance(part, Tensor)], 1)


def image_logits(
    model: nn.Module, images: Float[Tensor, "B C H W"], batch_size: int | None = None
) -> Float[Tensor, "B K"]:
    """A classifier's logits for whole images, by canonical inference. InputError unless finite and (B, K)."""
    answer = canonical_logits(model, len(images), lambda rows: images[rows.to(images.device)], batch_size)
    return check_logits(answer)


def check_logits(answer: Tensor) -> Float[Tensor, "B K"]:
    """The logits themselves. InputError unless finite and (B, K)."""
    if answer.ndim != 2 or not bool(torch.isfinite(answer).all()):
        raise InputError(f"the model gives {tuple(answer.shape)} where finite logits (B, K) are needed")
    return answer


def forward_passes(model: nn.Module, views: Views, image_size: tuple[int, int]) -> int:
    """Network calls per picture: 1 for a network that yields all views at once, else V."""
    return 1 if getattr(model, "encoding", "null") == "all-views" else views.number(image_size)


def scores(logits: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """Softmax confidences, in float32 or better."""
    return torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def votes(
    scores: Float[Tensor, "B V K"], threshold: float | None, tolerance: Tolerance
) -> tuple[Bool[Tensor, "B V K"], Bool[Tensor, "B V"]]:
    """Votes, and which views are *unsure*: their votes could turn within the tolerance.

    With a threshold θ a view votes for every class of score > θ; with None for its top class (the smaller index on a
    tie), where it is unsure when the runner-up lies within twice the tolerance.
    """
    if threshold is None:
        top = scores.topk(2, dim=-1).values
        unsure = top[..., 0] - top[..., 1] <= tolerance.of(top).sum(-1)
        first = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True), unsure
    return scores > threshold, ((scores - threshold).abs() <= tolerance.of(scores)).any(-1)


def check_images(images: Tensor) -> None:
    """InputError unless ``images`` are floats (B ≥ 1, C, H, W), finite and in [0, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"pictures are a float tensor (B, C, H, W) with none of them 0, not {got}")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        if bool(torch.isnan(images).any()):
            raise InputError("pictures contain NaN")
        raise InputError(f"pixel values must lie in [0, 1], not [{low.item():g}, {high.item():g}]; divide by 255")
