"""Evidence: what a network says about every view, each view computed once, in full batches; and the model check.

A certificate rests on one assumption: a view's evidence depends on its visible pixels alone. ``check_model`` tests it
on the model that is served, and measures how far rounding moves a view's scores.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from certipatch.devices import whole_float32
from certipatch.errors import InputError
from certipatch.views import Views
from certipatch.views.render import render, render_each

PIXELS = 2**20  # of one forward pass, unless a batch size is given: 1024 views of 32x32, 20 of 224x224
# By parameter type: the largest change of a logit, relative to 1 + the largest, that counts as rounding; the least
# tolerance of a score.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@final
@dataclass(frozen=True)
class Tolerance:
    """Rounding of a score: it may be off by ``atol + rtol·|score|``."""

    atol: float
    rtol: float

    def of(self, scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The tolerance of each score."""
        return self.atol + self.rtol * scores.abs()


@torch.no_grad()
def weights_state(model: nn.Module) -> tuple[float, ...]:
    """The sums of a network's weights and buffers: other ones once it was trained further, or has loaded others."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple(torch.stack([t.sum(dtype=torch.float64) for t in tensors]).tolist()) if tensors else ()


def precision_of(model: nn.Module, images: Tensor) -> torch.dtype:
    """The coarsest of the types in which a network computes: of its weights, of a black box that says so, of the pictures."""
    own = [p.dtype for p in model.parameters() if p.is_floating_point()]
    said = [getattr(module, "dtype", None) for module in model.modules()]
    boxes = [dtype for dtype in said if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    return max([*own, *boxes, images.dtype], key=lambda dtype: torch.finfo(dtype).eps)


def ask(model: nn.Module, pictures: Float[Tensor, "N C H W"]) -> Tensor:
    """What a network answers. InputError where it cannot read pictures of this type or size."""
    try:
        answer = model(pictures)
    except (torch.OutOfMemoryError, InputError):
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), pictures.dtype)
        reason = " ".join(str(error).split())[:160]
        if dtype != pictures.dtype:
            reason = f"its weights are {dtype}, so convert them with images.to({dtype})"
        size = "x".join(map(str, pictures.shape[1:]))
        raise InputError(f"the model cannot read pictures of {size} in {pictures.dtype}: {reason}") from error
    if not isinstance(answer, Tensor):
        raise InputError(f"the model answers with a {type(answer).__name__}; let it give the logits alone, one tensor")
    return answer


@torch.inference_mode()
@whole_float32()
def logits(
    model: nn.Module,
    views: Views,
    images: Float[Tensor, "B C H W"],
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "B v K"]:
    """The network's logits for views ``index`` (all V when None) of every picture.

    A model whose ``encoding`` is ``all-views`` maps pictures to (B, V, K) itself; any other gets rendered views. Forward
    passes take ``batch_size`` pictures or views, by default 2²⁰ pixels of them. The default encoding is ``null``.
    """
    encoding = getattr(model, "encoding", "null")
    number = views.number((images.shape[2], images.shape[3]))
    batch_size = batch_size or max(1, PIXELS // (images.shape[2] * images.shape[3]))
    if encoding == "all-views":
        parts = [ask(model, part.clone()) for part in images.split(batch_size)]  # a copy: theirs to write into
        every = torch.cat(parts)
        if every.ndim != 3 or every.shape[1] != number:
            raise InputError(f"the model gives {tuple(every.shape)} where (B, V={number}, K) is needed")
        return every if index is None else every[:, index]
    index = torch.arange(number) if index is None else index
    pictures = []
    for images_part in images.split(batch_size):
        step = max(1, batch_size // len(images_part))
        parts = []
        for chosen in index.split(step):
            rendered = render(encoding, images_part, views, chosen, getattr(model, "fill", 0.5))
            answer = ask(model, rendered.flatten(0, 1))
            if answer.ndim != 2 or len(answer) != rendered.shape[0] * rendered.shape[1]:
                raise InputError(f"the model gives {tuple(answer.shape)} where (N, K) is needed")
            parts.append(answer.unflatten(0, rendered.shape[:2]))
        pictures.append(torch.cat(parts, dim=1))
    return torch.cat(pictures)


@torch.inference_mode()
@whole_float32()
def logits_of(
    model: nn.Module,
    views: Views,
    images: Float[Tensor, "B C H W"],
    picture: Int64[Tensor, " n"],
    index: Int64[Tensor, " n"],
    batch_size: int | None = None,
) -> Float[Tensor, "n K"]:
    """The network's logits for view ``index[i]`` of picture ``picture[i]``, n ≥ 1, in batches of ``batch_size``."""
    batch_size = batch_size or max(1, PIXELS // (images.shape[2] * images.shape[3]))
    parts = []
    for of, chosen in zip(picture.split(batch_size), index.split(batch_size), strict=True):
        taken = images[of.to(images.device)]
        encoding, fill = getattr(model, "encoding", "null"), getattr(model, "fill", 0.5)
        answer = ask(model, render_each(encoding, taken, views, chosen, fill))
        if answer.ndim != 2 or len(answer) != len(of):
            raise InputError(f"the model gives {tuple(answer.shape)} where (N, K) is needed")
        parts.append(answer)
    return torch.cat(parts)


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

    With up to two of ``images`` and a random picture, for up to eight views (four where each costs a pass): the same
    view (a) twice, (b) on its own and beside all-black, all-white and random pictures in batches of 1, 2, 5 and 9,
    (c) with its hidden pixels set to 0, 1 and random. The largest change of a logit, twice over, bounds the change of a
    score: the tolerance, which is never less than a share of the largest logit. (Logits, since a score that is saturated
    on the probes hides rounding that shows on other pictures.) With ``raw`` the logits themselves are the scores.

    Errors: InputError that says which of the three changed a logit by more than rounding can.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        return _checked(model, views, images, batch_size, seed, raw)
    finally:  # a BatchNorm in training mode has moved its statistics
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _checked(
    model: nn.Module, views: Views, images: Float[Tensor, "B C H W"], batch_size: int | None, seed: int, raw: bool
) -> Tolerance:
    generator = torch.Generator().manual_seed(seed)

    def random_like(pictures: Tensor) -> Tensor:
        return torch.rand(pictures.shape, generator=generator).to(pictures)

    probes = torch.cat([images[:2], random_like(images[:1])])
    size = images.shape[2], images.shape[3]
    number = views.number(size)
    probed = 8 if getattr(model, "encoding", "null") == "all-views" else 4  # rendered views cost a pass each
    index = torch.linspace(0, number - 1, min(number, probed)).round().long().unique()

    def answer(pictures: Tensor, chosen: Tensor = index) -> Tensor:
        found = logits(model, views, pictures, chosen, batch_size).double()
        # Softmax sees differences only; an offset of all classes could hide a leak.
        return found if raw else found - found.mean(-1, keepdim=True)

    alone = torch.cat([answer(probe[None]) for probe in probes])
    if alone.shape[-1] < 2:
        raise InputError(f"model refused: it knows {alone.shape[-1]} class; a certificate needs at least two")
    if not bool(torch.isfinite(alone).all()):
        raise InputError("model refused: its answers are not finite")
    dtype = precision_of(model, images)
    limit = LIMITS.get(dtype, 1e-4)
    worst = 0.0

    def measure(other: Tensor, reference: Tensor, reason: str) -> None:
        nonlocal worst
        change = ((other - reference).abs().max() / (1 + reference.abs().max())).item()
        if not change <= limit:
            raise InputError(f"model refused: {reason}{training}; an answer changed by {change:.2g} (limit {limit:g})")
        worst = max(worst, (other - reference).abs().max().item())

    training = "; it is in training mode, call model.eval()" if any(m.training for m in model.modules()) else ""
    measure(torch.cat([answer(probe[None]) for probe in probes]), alone, "the same view twice gives two answers")
    coupled = "a view's answer depends on the other pictures in the batch"
    neighbours = torch.cat([torch.zeros_like(probes[:1]), torch.ones_like(probes[:1]), random_like(probes[:1])])
    for others in (1, 4, 8):
        batch = neighbours.repeat(3, 1, 1, 1)[:others]
        measure(answer(torch.cat([batch, probes[:1]]))[-1:], alone[:1], coupled)
    measure(answer(probes), alone, coupled)
    rows = [torch.cat([answer(probe[None], view[None]) for view in index], 1) for probe in probes]
    measure(torch.cat(rows), alone, coupled)  # one row in a pass, as the last batch may have, takes another kernel
    for position, view in enumerate(index):
        shown = views.visible(size, view[None])[0].to(images.device)
        for fill in (torch.zeros_like(probes), torch.ones_like(probes), random_like(probes)):
            changed = answer(torch.where(shown, probes, fill), view[None])
            measure(changed[:, 0], alone[:, position], f"view {int(view)} leaks: its answer depends on hidden pixels")
    floor = FLOORS.get(dtype, 1e-6)
    steepness = getattr(model, "steepness", 1.0)  # of what the model does with confidences
    if raw and steepness != 1:
        raise InputError(
            "model refused: a cascade's confidences are bounded, not their logarithms; choose other evidence"
        )
    if raw:
        return Tolerance(atol=max(4 * worst, floor), rtol=floor)
    largest = alone.abs().max().item()  # a score hides how large its logits are, and with them their rounding
    rounding = max(2 * worst, floor * max(1.0, largest))  # |Δ softmax| ≤ max |Δ logit| / 2
    return Tolerance(atol=steepness * rounding, rtol=floor)
