"""Masks and the masked classifier, shared by the defenses that lay masks over images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.method import leads_of_network
from certipatch.errors import InputError
from certipatch.inference import rows_per_pass
from certipatch.models.quickest import fastest_backend
from certipatch.rules.double_mask import FALLBACKS, Fallback
from certipatch.threats import PatchThreat
from certipatch.views import PixelSets, mask_set
from certipatch.views.incidence import sees
from certipatch.views.render import Fill, image_size, render

PerAxis = int | tuple[int, int] | None


@final
class MaskedClassifier(nn.Module):
    """A classifier of whole images that is shown masked ones; a network of NULL-encoded ones is shown those.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        fill: what masks are painted with, one value or one per channel; None for the model's own ``fill``, else 0.5.
    """

    def __init__(self, model: nn.Module, fill: Fill | None = None):
        super().__init__()
        encoding = getattr(model, "encoding", "picture")
        if encoding not in ("picture", "fill", "null"):
            raise InputError(
                f"masks lie over whole pictures, but this network reads {encoding}; give a plain classifier"
            )
        self.model, self.encoding = model, "null" if encoding == "null" else "fill"
        self.fill: Fill = checked_fill(getattr(model, "fill", 0.5) if fill is None else fill)
        self.lipschitz: float = getattr(model, "lipschitz", 1.0)
        self.training = False  # it is the model's own that matters
        self._fast_forward: tuple[nn.Module | None] = (
            None,
        )  # in a tuple, so that its weights are not counted as this module's
        self.backend = "torch"
        self.fast_forward_fingerprint = b""
        """Digest of the weights that the faster way has."""

    @property
    def fast_forward(self) -> nn.Module | None:
        """The same network by a faster way, where no gradients are asked for; None for as it was given."""
        return self._fast_forward[0]

    @property
    def served(self) -> nn.Module:
        """The network that computes logits when no gradients are needed."""
        return self.fast_forward or self.model

    def serve(self, backend: str, fast_forward: nn.Module | None) -> None:
        """Compute logits by ``fast_forward``, or by the original network if it is None."""
        self.backend, self._fast_forward = backend, (fast_forward,)

    def forward(self, pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return (self.model if torch.is_grad_enabled() else self.served)(pictures)


class MaskDefense(ViewDefense):
    """A defense that lays masks over images; arguments as for ``PatchCleanser``."""

    reads_whole_images: ClassVar[bool] = True
    trains_under_masks: ClassVar[bool] = True
    model: MaskedClassifier

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat | Sequence[PatchThreat],
        masks: PerAxis | Bool[Tensor, "M H W"] = None,
        stride: PerAxis = None,
        fill: Fill | None = None,
        batch_size: int | None = None,
    ):
        super().__init__(MaskedClassifier(model, fill), None, batch_size)
        self.threats = checked_threats(threat)
        if isinstance(masks, Tensor) and (masks.ndim != 3 or masks.dtype != torch.bool):
            raise InputError(f"masks of your own are bool (M, H, W), not {masks.dtype} {tuple(masks.shape)}")
        self.masks: Any = masks if isinstance(masks, Tensor) else per_axis(masks, "masks")
        self.stride = per_axis(stride, "stride")

    def settings(self) -> dict[str, Any]:
        masks, threats = self.masks, [threat.to_dict() for threat in self.threats]
        return {
            "masks": masks.to(torch.uint8).tolist() if isinstance(masks, Tensor) else masks and list(masks),
            "stride": self.stride and list(self.stride),
            "fill": list(f) if isinstance(f := self.model.fill, tuple) else f,
            "threat": threats if len(threats) > 1 else threats[0],
        }

    def network_leads(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Leads in the whole image."""
        return leads_of_network(self.model, images)

    def covering(self, image_size: tuple[int, int]) -> tuple[Bool[Tensor, "M H W"], Bool[Tensor, "L M"]]:
        """The masks for images of (H, W) pixels, and which of them cover each location of any of the threats."""
        return covering_masks(self.threats, image_size, self.masks, self.stride)

    def select_backend(self, images: Float[Tensor, "B C H W"], pictures: int, only: str | None = None) -> str | None:
        """Run the network in the way that is fastest here, where that is worth the trouble of finding it.

        On the CPU, by measurement; the model is checked, and its rounding measured, as it is then served.

        Args:
            images: what it is measured on.
            pictures: how many are to be looked at, for an estimate of the work.
            only: the way that is to be taken, by the name that this gave before.
        """
        size = image_size(images)
        shown = render(self.model.encoding, images[:1], self.views_of(size), torch.zeros(1, dtype=torch.int64))
        rows = shown.flatten(0, 1)
        rows = rows.expand(rows_per_pass(self.model, rows, self.batch_size), -1, -1, -1).contiguous()
        self.model.fast_forward_fingerprint = ev.weights_digest(self.model.model)
        name, fast_forward = fastest_backend(self.model.model, rows, pictures * self.number_of_views(size), only)
        self.model.serve(name, fast_forward)
        self._tolerance.clear()
        return name

    def tolerance(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        if (
            self.model.fast_forward is not None
            and ev.weights_digest(self.model.model) != self.model.fast_forward_fingerprint
        ):
            self.model.serve("torch", None)  # the faster way has the weights of before
            self._tolerance.clear()
        return super().tolerance(images)

    @contextmanager
    def reference_backend(self) -> Iterator[None]:
        backend, fast_forward = self.model.backend, self.model.fast_forward
        self.model.serve("torch", None)
        try:
            yield
        finally:
            self.model.serve(backend, fast_forward)


def covering_masks(
    threats: tuple[PatchThreat, ...],
    image_size: tuple[int, int],
    masks: Any,
    stride: tuple[int, int] | None,
    parts: Sequence[tuple[int, int]] = (),
) -> tuple[Bool[Tensor, "M H W"], Bool[Tensor, "L M"]]:
    """Masks for images of (H, W) pixels, and which of them cover each location of any of the threats.

    Errors: InputError if some location is covered by none, with the number of masks that would do.
    """
    if not isinstance(masks, Tensor):
        masks = mask_set(threats, image_size, masks, stride, parts)
    rows = []
    for threat in threats:
        relation = sees(PixelSets(~masks), threat, image_size)
        rows_kept = relation.rows[relation.undominated]
        if bool(rows_kept.all(1).any()):
            sides = " or ".join(f"{len(mask)}×{len(mask[0])}" for mask in threat.masks(image_size)[:3])
            raise InputError(
                f"mask set does not cover {f'{threat.count} ' if threat.count > 1 else ''}{sides} patches everywhere in "
                f"pictures of {image_size[0]}×{image_size[1]} pixels; larger masks would, or k ≥ 1 masks per axis"
            )
        rows.append(~rows_kept)
    return masks, torch.cat(rows).unique(dim=0)


def checked_threats(threat: PatchThreat | Sequence[PatchThreat]) -> tuple[PatchThreat, ...]:
    """One or several patch threats as a tuple. InputError on anything else."""
    threats = (threat,) if isinstance(threat, PatchThreat) else tuple(threat) if isinstance(threat, Sequence) else ()
    if not threats or not all(isinstance(one, PatchThreat) for one in threats):
        raise InputError(f"masks are made for a patch threat, or several, not for {threat}")
    return threats


def per_axis(value: Any, what: str) -> tuple[int, int] | None:
    """A whole number for both axes, or one for each, from 1 to 4096. InputError on anything else."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 4096 for n in pair):
        raise InputError(f"{what} are a whole number from 1 to 4096, or two for rows and columns, not {value!r}")
    return pair[0], pair[1]


def checked_gap(gap: Any, name: str) -> float:
    """A gap in confidence, in [0, 1). InputError on anything else."""
    if isinstance(gap, bool) or not isinstance(gap, int | float) or not 0 <= gap < 1:
        raise InputError(f"{name} is a gap in confidence, at least 0 and less than 1, not {gap!r}")
    return float(gap)


def checked_fallback(fallback: Any) -> Fallback:
    """A fallback of double masking. InputError on anything else."""
    if fallback not in FALLBACKS:
        raise InputError(f"fallback is {' or '.join(FALLBACKS)}, not {fallback!r}")
    return fallback


def checked_fill(fill: Any) -> Fill:
    """One value in [0, 1], or a tuple of one per channel. InputError on anything else."""
    values = tuple(fill) if isinstance(fill, tuple | list) else (fill,)
    if not values or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values):
        raise InputError(f"fill is a value in [0, 1], or one per channel, not {fill!r}")
    return tuple(map(float, values)) if isinstance(fill, tuple | list) else float(fill)
