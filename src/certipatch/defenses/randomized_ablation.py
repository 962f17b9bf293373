"""Randomized ablation (Levine & Feizi, AAAI 2020; 2020, section 2.1 and Table 2): sampled views vote."""

import hashlib
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Certificate
from certipatch.defenses.base import Defense, Evidence
from certipatch.defenses.settings import DefenseSettings
from certipatch.errors import InputError
from certipatch.inference import batch_size_for
from certipatch.model_check import check_model
from certipatch.models import receptive_fields
from certipatch.rules import ClopperPearson
from certipatch.rules.clopper_pearson import MAX_SAMPLES, check_samples
from certipatch.rules.soft import lead_of, soft_votes
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views import OneOf, PixelSets, RandomPixels, RandomViews, Views
from certipatch.views.incidence import Incidence, sees
from certipatch.views.render import image_size

SAMPLED = 32  # random views behind one gradient


class RandomizedSettings(DefenseSettings):
    """The paper's."""

    samples: int = Field(default=10_000, ge=1, le=MAX_SAMPLES)
    samples_to_pick: int = Field(default=1_000, ge=1, le=MAX_SAMPLES)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)


DEFAULT = RandomizedSettings()


def delta(
    views: RandomViews, threat: Threat, image_size: tuple[int, int]
) -> tuple[Float64[Tensor, " L"], Incidence | None]:
    """Δ of every location: the chance, over the whole family, that a random view shows a pixel of it.

    A location touches the parts (pixels, columns, bands) that ``sees`` says; a sparse threat is one location, that of
    the ``pixels`` pixels that touch most parts. The relation is None for it.

    Errors: InputError if the threat does not fit, or has too many locations to count.
    """
    if isinstance(threat, SparseThreat):
        return views.chance(torch.tensor([most_touched(views, threat.pixels, image_size)]), image_size), None
    if isinstance(views, RandomPixels) and threat.count == 1:  # no relation of 50,176 pixels and 37,249 locations
        relation = sees(torch.ones((1, *image_size), dtype=torch.bool), threat, image_size)
        pixels = torch.tensor([sum(map(sum, mask)) for mask in relation.locations.masks])
        return views.chance(pixels[relation.locations.shape], image_size), relation
    relation = sees(views.parts, threat, image_size)
    return views.chance(relation.sizes[relation.row_of], image_size), relation


def most_touched(views: RandomViews, pixels: int, image_size: tuple[int, int]) -> int:
    """The most parts that any ``pixels`` pixels can touch.

    Never more than ``pixels`` times what one of them touches; where taking the best pixel again and again reaches that,
    or reaches every part, it is the answer. Otherwise all choices are gone through.
    """
    number = views.check(image_size)
    if isinstance(views, RandomPixels):
        return min(pixels, number)
    single = sees(views.parts, PatchThreat(1), image_size)
    rows = single.rows[single.undominated]
    reached = torch.zeros(number, dtype=torch.bool)
    for _ in range(min(pixels, number)):
        reached |= rows[int((rows & ~reached).sum(1).argmax())]
    number_touched = int(reached.sum())
    if number_touched == min(pixels * int(single.sizes.max()), int(rows.any(0).sum())):
        return number_touched
    return int(sees(views.parts, SparseThreat(pixels), image_size).sizes.max())


@final
class RandomizedAblation(Defense):
    """Random views vote for their top class; a second sample bounds the vote with confidence 1 − α.

    Args:
        model: an ``nn.Module`` in eval mode, as for ``DerandomizedSmoothing``: its ``encoding`` says what it reads.
        views: ``views.RandomPixels(45)``, ``views.RandomColumns(6)``; or numbered views such as ``views.Columns(6)``, of
            which one is drawn at a time (Table 2 of the paper); None for the receptive fields of local logits.
        samples: views of the sample that certifies.
        samples_to_pick: views of the sample that picks the class.
        alpha: chance of a wrong certificate. The defaults are the paper's.
        seed: of the draws. An image's sample depends on the seed and its own pixels, never on its neighbours.
        batch_size: most images or views of a pass on an accelerator (default: 2²⁰ pixels); see ``inference``.

    Where there are fewer numbered views than samples each is computed once, and only their votes are drawn: the same
    answers for V passes instead of ``samples``. The theorem, and what it says of the sampled answer, is in
    ``rules.ClopperPearson``. The first call with images of a new size runs the model check.
    """

    name: ClassVar[str] = "randomized-ablation"
    settings_class = RandomizedSettings
    in_words: ClassVar[str] = (
        "The network never sees the whole picture. It looks at views drawn at random, and each votes for "
        "one class. A patch can only change votes of views that show one of its pixels, and what share of all possible views "
        "those are is known exactly. Where the answer keeps more than half of all votes without that share, nothing painted "
        "there can take it from the class that most views vote for. The votes are estimated from a sample, so each "
        "certificate holds with the stated confidence only."
    )
    takes_random_views: ClassVar[bool] = True
    watched_settings: ClassVar[dict[str, Any]] = {"samples": 50, "samples_to_pick": 10}  # fewer certify less

    def __init__(
        self,
        model: nn.Module,
        views: RandomViews | Views | None,
        samples: int = DEFAULT.samples,
        samples_to_pick: int = DEFAULT.samples_to_pick,
        alpha: float = DEFAULT.alpha,
        seed: int = DEFAULT.seed,
        batch_size: int | None = None,
    ):
        check_samples(samples_to_pick, "samples_to_pick")
        self.options = RandomizedSettings.checked(
            samples=samples, samples_to_pick=samples_to_pick, alpha=alpha, seed=seed
        )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.views = OneOf(views) if isinstance(views, Views) else views
        self.samples_to_pick, self.seed = samples_to_pick, seed
        self.rule = ClopperPearson(samples, alpha)
        self.theorem, self.confidence = self.rule.theorem, 1 - alpha
        self._families: dict[tuple[int, int], RandomViews] = {}
        self._tolerance: dict[tuple[Any, ...], tuple[bytes, ev.Tolerance]] = {}
        self._worst: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self._delta: dict[tuple[Threat, tuple[int, int]], tuple[Tensor, Incidence | None]] = {}

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        """Expectation over transformations: soft votes of some random views, others at each step."""
        size = image_size(images)
        family = self.family(size)
        if isinstance(family, OneOf):
            index = None
            if getattr(self.model, "encoding", "null") != "all-views":
                index = family.choose(size, SAMPLED, generator)
            logits = ev.differentiable_logits(self.model, family.views, images, index)
        else:
            views = PixelSets(family.draw(size, SAMPLED, generator))
            logits = ev.differentiable_logits(self.model, views, images)
        return lead_of(soft_votes(logits, None).mean(1))

    def family(self, image_size: tuple[int, int]) -> RandomViews:
        """The random views of images of (H, W) pixels. InputError if they do not fit."""
        if image_size not in self._families:
            views = self.views or OneOf(receptive_fields(self.model, image_size))
            views.check(image_size)
            self._families[image_size] = views
        return self._families[image_size]

    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        self.tolerance(images)

    def tolerance(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        """The measured rounding of a score for images of this size; runs the model check the first time."""
        first = next(self.model.parameters(), images)
        autocast = torch.is_autocast_enabled(images.device.type)
        key = (*images.shape[1:], images.dtype, images.device, self.model.training, first.dtype, autocast)
        state = ev.weights_digest(self.model)
        if self._tolerance.get(key, (None,))[0] != state:
            size = image_size(images)
            family = self.family(size)
            if isinstance(family, OneOf):
                views = family.views
            elif getattr(self.model, "encoding", "null") in ("null", "fill"):
                views = PixelSets(family.draw(size, 8, torch.Generator().manual_seed(0)))
            else:
                raise InputError(f"{family.name} cannot be shown to this network; it needs the encoding null or fill")
            self._tolerance[key] = state, check_model(self.model, views, images, self.batch_size)
        return self._tolerance[key][1]

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        """Votes (B, 2, K) for each class in the two samples; in the second without those that rounding could turn."""
        ev.check_images(images)
        size, tolerance = image_size(images), self.tolerance(images)
        family = self.family(size)
        if not isinstance(family, OneOf):
            counts = [self._sampled(family, image, tolerance) for image in images.split(1)]
        elif self._each_once(family, size):
            step = max(1, 2**14 // family.check(size))
            counts = [self._redrawn(family, part, tolerance) for part in images.split(step)]
        else:
            counts = [self._redrawn(family, image, tolerance) for image in images.split(1)]
        return Evidence(torch.cat(counts), None, size)

    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self.rule.predict(evidence.values)

    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        chances, relation = self.delta(threat, evidence.image_size)
        verdict = self.rule.certify(evidence.values, chances)
        return Certificate(verdict.label, verdict.margin, threat, self.theorem, relation, confidence=self.confidence)

    def delta(self, threat: Threat, image_size: tuple[int, int]) -> tuple[Float64[Tensor, " L"], Incidence | None]:
        """Δ of every location of a threat, computed once, and the relation that says where they lie."""
        if (threat, image_size) not in self._delta:
            self._delta[threat, image_size] = delta(self.family(image_size), threat, image_size)
        return self._delta[threat, image_size]

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        largest = torch.zeros(len(evidence.values), dtype=torch.int64, device=evidence.values.device)
        for side in range(1, min(evidence.image_size) + 1):
            key = (side, evidence.image_size)
            if key not in self._worst:
                self._worst[key] = delta(self.family(key[1]), PatchThreat(side), key[1])[0].amax(0, keepdim=True)
            certified = self.rule.certify(evidence.values, self._worst[key]).certified
            if not certified.any():  # Δ grows with the side
                break
            largest[certified] = side
        return largest

    def number_of_views(self, image_size: tuple[int, int]) -> int:
        """Rows of the evidence: two samples."""
        return 2

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        family = self.family(image_size)
        if isinstance(family, OneOf) and self._each_once(family, image_size):
            return ev.forward_passes(self.model, family.views, image_size)
        return self.samples_to_pick + self.rule.samples

    def to(self, device: str | torch.device) -> "RandomizedAblation":
        self.model.to(device)
        return self

    def _each_once(self, family: OneOf, size: tuple[int, int]) -> bool:
        few = family.check(size) <= self.samples_to_pick + self.rule.samples
        return few or getattr(self.model, "encoding", "null") == "all-views"

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.samples_to_pick, self.rule.samples

    def _generator(self, image: Float[Tensor, "1 C H W"]) -> torch.Generator:
        """One stream for both samples of an image, the second after the first; from the seed and the pixels alone."""
        pixels = image.detach().cpu().double().contiguous().numpy().tobytes()
        digest = hashlib.sha256(f"{self.seed}/".encode() + pixels).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _votes(
        self, views: Views, images: Float[Tensor, "B C H W"], tolerance: ev.Tolerance, index: Tensor | None = None
    ) -> tuple[Bool[Tensor, "B v K"], Bool[Tensor, "B v K"]]:
        """Votes for the top class: all of them, and those that rounding cannot turn."""
        logits = ev.logits(self.model, views, images, index, self.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        votes, unsure = ev.votes(ev.scores(logits), None, tolerance)
        return votes, votes & ~unsure[..., None]

    def _sampled(
        self, family: RandomViews, image: Float[Tensor, "1 C H W"], tolerance: ev.Tolerance
    ) -> Int64[Tensor, "1 2 K"]:
        """Draw views for one image, a fixed number at a time, and count."""
        size = image_size(image)
        step = batch_size_for(size[0] * size[1])  # of the draws, so that the batch size changes none of them
        generator, counts = self._generator(image), []
        for sample, number in enumerate(self._sizes):
            parts = []
            for first in range(0, number, step):
                views = PixelSets(family.draw(size, min(step, number - first), generator))
                parts.append(self._votes(views, image, tolerance)[sample].sum(1))
            counts.append(torch.stack(parts).sum(0))
        return torch.stack(counts, 1)

    def _redrawn(
        self, family: OneOf, images: Float[Tensor, "B C H W"], tolerance: ev.Tolerance
    ) -> Int64[Tensor, "B 2 K"]:
        """Compute each numbered view once (only the drawn ones, of one image, where they are many); count draws."""
        size = image_size(images)
        number = family.check(size)
        generators = [self._generator(image) for image in images.split(1)]
        drawn = [family.choose(size, n, generator) for generator in generators for n in self._sizes]
        times = torch.stack([index.bincount(minlength=number) for index in drawn]).unflatten(0, (-1, 2))  # (B, 2, V)
        index = None if self._each_once(family, size) else times[0].any(0).nonzero().flatten()
        votes = torch.stack(self._votes(family.views, images, tolerance, index), 1).long()  # (B, 2, v, K)
        times = (times if index is None else times[..., index]).to(votes.device)
        return (votes * times[..., None]).sum(2)
