"""Certificates by interval bound propagation (Chiang et al. 2020): the network itself is bounded, once per location."""

from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.bounds import Interval, passage, patch_margins, patch_verdict, regions, sparse_margins
from certipatch.bounds.patch import MEMORY, Regions
from certipatch.certificate import Certificate
from certipatch.defenses.base import Defense, Evidence
from certipatch.errors import InputError
from certipatch.inference import batch_size_for, call_network
from certipatch.model_check import FLOORS, LIMITS
from certipatch.plumbing.devices import no_tf32
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views.render import image_size


@final
class IntervalBounds(Defense):
    """The class of largest logit; certified where no patch can move another class's logit above it.

    Args:
        model: an ``nn.Module`` (B, C, H, W) → (B, K) in eval mode, made of layers that ``bounds`` knows.
        batch_size: most images of a pass on an accelerator (default: 2²⁰ pixels); see ``inference``.
        memory: bytes of clean maps that are held at once.

    **Theorem.** Inside the patch every value in [0, 1] is allowed, outside it the pixel itself. Bounds of z_y − z_k over
    that box are computed in float64 and rounded outward, so they hold for the real numbers that the weights denote.
    The network is served in its own precision, whose logits are off by at most t·(1 + s), s being the largest Σ|w_j x_j| + |b|
    of a logit over the box (its last layer's terms may be large and cancel); margin = bound − 2t(1 + s). Certified when
    every margin, over locations and rivals, is > 0: exactly 0 is not.

    **What is measured, not proved, is t**: four times the largest distance between a served logit and the same logit in
    float64, as a share of 1 + s there, over probes (up to two of the images, black, white, random and checkered ones,
    and patches of those, in batches of 1, 2, 5 and 9) and over the image itself, and never less than the house's floor
    for that precision. The first call with images of a new size, or after weights have changed, measures the probes.
    """

    name: ClassVar[str] = "interval-bounds"
    reads_whole_images: ClassVar[bool] = True
    trains_by_bounds: ClassVar[bool] = True
    theorem = "lower bound of z_y − z_k over the box, less twice the tolerance of a logit there, > 0 for every location and rival"

    def __init__(self, model: nn.Module, batch_size: int | None = None, memory: int = MEMORY):
        if not isinstance(model, nn.Module):
            raise InputError(f"interval bounds need a network, an nn.Module, not {type(model).__name__}")
        if not (batch_size is None or (isinstance(batch_size, int) and batch_size >= 1)) or memory < 1:
            raise InputError(f"batch_size and memory are at least 1, not {batch_size} and {memory}")
        self.model, self.batch_size, self.memory = model, batch_size, memory
        self._tolerance: dict[tuple[Any, ...], tuple[bytes, float]] = {}
        self._regions: dict[tuple[Threat, tuple[int, int]], Regions] = {}

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        return self.network_leads(images)

    def exported_network(self, image_size: tuple[int, int]) -> nn.Module:
        return self.model

    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        self.tolerance(images)

    def tolerance(self, images: Float[Tensor, "B C H W"]) -> float:
        """t for images of this size: the numerical error of a logit is at most t(1 + s). InputError if the model is refused."""
        precision, autocast = ev.precision_of(self.model, images), torch.is_autocast_enabled(images.device.type)
        key = (*images.shape[1:], images.dtype, images.device, self.model.training, precision, autocast)
        state = ev.weights_digest(self.model)
        if self._tolerance.get(key, (None,))[0] != state:
            self._tolerance[key] = state, self._measured(images, precision)
        return self._tolerance[key][1]

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        """Served logits (B, 1, K), their tolerance t, and the images, which certificates need again."""
        ev.check_images(images)
        tolerance, served = self.tolerance(images), self._served(images)
        exact, size = self._exact(images)
        off = (served.double() - exact).abs().amax(1)
        self._check_distance(off.max().item(), served, ev.precision_of(self.model, images))
        error = (4 * off / (1 + size)).clamp(min=tolerance)
        return Evidence(served[:, None], None, image_size(images), error, images)

    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return evidence.values[:, 0].argmax(1)

    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        label, images, error = self.label(evidence), *_complete(evidence)
        if isinstance(threat, SparseThreat):
            margin = self._sparse(images, label, threat, error)[:, None]
            relation = None
        else:
            locations = self.regions(threat, evidence.image_size)
            relation = locations.sees
            with torch.no_grad():
                margins = patch_margins(
                    self.model,
                    images,
                    label,
                    locations,
                    dtype=torch.float64,
                    outward=True,
                    slack=error,
                    memory=self.memory,
                )
            margin = margins.amin(2)
        margin = margin.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return Certificate(label, margin, threat, self.theorem, relation)

    def certified(self, evidence: Evidence, threat: Threat) -> Bool[Tensor, " B"]:
        """The verdict alone: each image is left at the first location that fails."""
        label, images, error = self.label(evidence), *_complete(evidence)
        if isinstance(threat, SparseThreat):
            return self._sparse(images, label, threat, error) > 0
        locations = self.regions(threat, evidence.image_size)
        return patch_verdict(
            self.model,
            images,
            label,
            locations,
            torch.zeros_like(error),
            dtype=torch.float64,
            outward=True,
            slack=error,
            memory=self.memory,
        )

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        """By bisection, since the bounds of a patch hold those of every patch inside it."""
        images, error = _complete(evidence)
        low = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        high = low + min(evidence.image_size) + 1  # low is certified, high is not
        while bool((high - low > 1).any()):
            tried = torch.minimum((low + high) // 2, low * 2 + 4)  # certified ones are small, and cost most
            for side in tried[high - low > 1].unique().tolist():
                chosen = ((tried == side) & (high - low > 1)).nonzero().flatten()
                part = Evidence(evidence.values[chosen], None, evidence.image_size, error[chosen], images[chosen])
                passes = self.certified(part, PatchThreat(side))
                low[chosen[passes]] = side
                high[chosen[~passes]] = side
        return low

    def regions(self, threat: PatchThreat, image_size: tuple[int, int]) -> Regions:
        """All locations of a threat, found once."""
        key = (threat, image_size)
        if key not in self._regions:
            self._regions[key] = regions(threat, image_size)
        return self._regions[key]

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        """Passes of the network for an answer; a certificate passes bounds once per location besides."""
        return 1

    def to(self, device: str | torch.device) -> "IntervalBounds":
        self.model.to(device)
        return self

    def _sparse(self, images: Tensor, label: Tensor, threat: SparseThreat, error: Tensor) -> Float[Tensor, " B"]:
        with torch.no_grad():
            margins = sparse_margins(
                self.model,
                images,
                label,
                threat.pixels,
                dtype=torch.float64,
                outward=True,
                slack=error,
                memory=self.memory,
            )
        return margins.amin(1)

    def _served(self, images: Tensor) -> Float[Tensor, "B K"]:
        return ev.image_logits(self.model, images, self.batch_size).clone()

    def _exact(self, images: Tensor) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
        """Logits in float64, by the layers that the bounds go through, and the size of their sums."""
        with torch.no_grad():
            passed = passage(self.model, (images.shape[1], images.shape[2], images.shape[3]), torch.float64)
            step, logits, sizes = batch_size_for(4 * images[0, 0].numel()), [], []
            for part in images.split(step):
                values = passed.values(Interval(part.double(), part.double()))
                logits.append(values[-1].lower)
                sizes.append(passed.size(values[passed.before_head].map(lambda x: x[:, None]))[:, 0])
            return torch.cat(logits), torch.cat(sizes)

    def _measured(self, images: Tensor, dtype: torch.dtype) -> float:
        encoding = getattr(self.model, "encoding", "picture")
        if encoding != "picture":
            raise InputError(
                f"model refused: it reads views ({encoding}), and bounds are for networks of whole pictures"
            )
        if any(module.training for module in self.model.modules()):
            raise InputError("model refused: it is in training mode, call model.eval()")
        probes = _probes(images)
        (exact, size), worst, share = self._exact(probes), 0.0, 0.0
        for batch in (1, 2, 5, 9, len(probes)):
            with torch.inference_mode(), no_tf32():
                served = torch.cat([call_network(self.model, part.clone()) for part in probes.split(batch)])
            off = (ev.check_logits(served).double() - exact).abs().amax(1)
            worst, share = max(worst, off.max().item()), max(share, (off / (1 + size)).max().item())
        self._check_distance(worst, exact, dtype)
        return max(4 * share, FLOORS.get(dtype, 1e-6))

    def _check_distance(self, off: float, logits: Tensor, dtype: torch.dtype) -> None:
        limit = LIMITS.get(dtype, 1e-4) * (1 + logits.abs().max().item())
        if not off <= limit:
            raise InputError(
                f"model refused: its answers differ from those of its layers in float64 by {off:.2g} (limit {limit:.2g}): "
                "it depends on the other pictures of a batch, or computes what bounds do not see"
            )


def _complete(evidence: Evidence) -> tuple[Tensor, Tensor]:
    if evidence.images is None or evidence.error is None:
        raise InputError("bounds need the pictures again; this evidence comes without them")
    return evidence.images, evidence.error


def _probes(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "n C H W"]:
    """Some images, extreme ones, and patches of those in each other."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((2, *images.shape[1:]), generator=generator).to(images)
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    checks = ((rows + columns) % 2).to(images).expand_as(noise[:1])
    plain = torch.cat([images[:2], noise, noise.round(), checks, 1 - checks, 0 * noise[:1], 0 * noise[:1] + 1])
    inside = (rows % 7 < 5) & (columns % 9 < 5)
    return torch.cat([plain, torch.where(inside, plain.flip(0), plain)])
