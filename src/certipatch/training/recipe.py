"""Recipes: everything that a training needs to be repeated, as a YAML file that pydantic checks."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from certipatch.defenses.registry import METHODS, names_with
from certipatch.defenses.settings import Side
from certipatch.errors import InputError, problem
from certipatch.models import BagNetSettings, FallbackEnsembleSettings
from certipatch.plumbing.parsing import from_yaml
from certipatch.plumbing.settings import Settings
from certipatch.saved.card import DefenseSpec
from certipatch.threats import PatchThreat, SparseThreat, Threat

# Appendix A.1 of Chiang et al. 2020, for MNIST.
INTERVAL_DEFAULTS = {
    "defense": "interval-bounds",
    "epochs": 100,
    "optimizer": "adam",
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "warmup_fraction": 0.0,
    "halving_interval": 0.1,
}


class Objective(Settings):
    """The views of a step, and the terms of its loss."""

    renamed: ClassVar[dict[str, str]] = {
        "cross_entropy": "cross_entropy_weight",
        "vote_margin": "vote_margin_weight",
        "margin_from": "margin_start",
        "pooled_cross_entropy": "pooled_cross_entropy_weight",
        "masked_cross_entropy": "masked_cross_entropy_weight",
        "mask_margin": "mask_margin_weight",
        "mask_temperature": "margin_temperature",
        "mask_scale": "margin_scale",
    }

    views_per_step: int | Literal["all"] = 1
    """``1`` is ablated training as in the paper: one random view for all pictures of the batch. A larger number draws
    that many, anew for each batch; ``all`` shows every view of every picture. With ``mask_margin_weight``, a number takes views
    evenly spaced, from a first one drawn anew, and the margin is that of those alone."""
    cross_entropy_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean cross entropy of the views."""
    vote_margin_weight: float = Field(default=0.0, ge=0)
    """Weight of the worst-location vote margin; needs ``views_per_step: all``."""
    patch: int = Field(default=5, ge=1)
    """Side in pixels of the square patch that the vote margin is for."""
    vote_width: float = Field(default=0.1, gt=0)
    temperature: float = Field(default=2.0, gt=0)
    margin_start: float = Field(default=0.1, ge=0, le=1)
    """Share of the training after which margins count."""
    pooled_cross_entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross entropy of the mean logits."""
    masked_cross_entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the same without the true class's heaviest window."""
    mask_margin_weight: float = Field(default=0.0, ge=0)
    """Weight of the certificate of robust masking itself, on confidences, at its worst location and rival."""
    margin_temperature: float = Field(default=0.02, gt=0)
    """Temperature of the smooth worst case, as a share of the views."""
    margin_scale: float = Field(default=10.0, gt=0)
    """Steepness of the loss of a margin, per share of the views."""

    @model_validator(mode="after")
    def _check(self) -> "Objective":
        for name in ("vote_margin_weight", "masked_cross_entropy_weight", "pooled_cross_entropy_weight"):
            if getattr(self, name) > 0 and self.views_per_step != "all":
                raise ValueError(f"{name} needs views_per_step: all")
        if self.views_per_step != "all" and self.views_per_step < 1:
            raise ValueError("views_per_step is at least 1, or all")
        weights = (
            "cross_entropy_weight",
            "vote_margin_weight",
            "pooled_cross_entropy_weight",
            "masked_cross_entropy_weight",
            "mask_margin_weight",
        )
        if all(getattr(self, name) == 0 for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0; nothing would be trained")
        return self


class IntervalTraining(Settings):
    """Training with interval bounds (Chiang et al. 2020). Intervals under the patch grow from the pixel to [0, 1]."""

    renamed: ClassVar[dict[str, str]] = {
        "places": "sampled_locations",
        "all_from": "all_start",
        "ramp_from": "ramp_start",
        "ramp_until": "ramp_end",
        "clean": "clean_loss_weight",
    }

    strategy: Literal["all", "random", "guided", "pooled", "sparse", "natural"] = "all"
    """Bounds of a step: at all locations of the patch; at a random few; at a few that a U-Net expects to be bad; for
    blocks of locations; for any few pixels; none."""
    patch: Side | tuple[Side, Side] = 5
    """Size of the patch in pixels: the side of a square, or height and width."""
    sampled_locations: int = Field(default=10, ge=1, le=4096)
    """Locations of a step, for ``random`` (drawn for each batch, shared by its images) and ``guided`` (for each image)."""
    all_start: float = Field(default=1.0, ge=0, le=1)
    """For ``random``: share of the training after which a step bounds all locations."""
    pool: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(2,), min_length=1, max_length=4)
    """For ``pooled``: sides of the squares of locations that have one bound behind the first, second … layer."""
    pixels: int = Field(default=4, ge=1, le=4096**2)
    """For ``sparse``: number of pixels that the attacker changes."""
    ramp_start: float = Field(default=0.01, ge=0, le=1)
    """Share of the training after which intervals grow."""
    ramp_end: float = Field(default=0.61, ge=0, le=1)
    """Share of the training after which they are whole."""
    clean_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross entropy of clean pictures beside that of the bounds; the paper has none."""
    guide_rate: float = Field(default=2.0, gt=0)
    """For ``guided``: learning rate of the U-Net, as a multiple of the network's."""

    @model_validator(mode="after")
    def _check(self) -> "IntervalTraining":
        if self.ramp_start > self.ramp_end:
            raise ValueError(f"intervals cannot be whole ({self.ramp_end}) before they grow ({self.ramp_start})")
        return self

    def strength(self, share: float) -> float:
        """t of the interval [(1 − t)x, (1 − t)x + t] under the patch, after a share of the training."""
        if share >= self.ramp_end:
            return 1.0
        if share <= self.ramp_start:
            return 0.0
        return (share - self.ramp_start) / (self.ramp_end - self.ramp_start)


class MaskTraining(Settings):
    """Training for double masking: cross entropy under two of the defense's masks."""

    renamed: ClassVar[dict[str, str]] = {
        "strategy: climbing": "strategy: hill-climbing",
        "coarse": "coarse_grids",
        "greedy_from": "greedy_start",
        "climbing_from": "climbing_start",
        "finer": "small_mask_fraction",
        "finer_from": "small_mask_start",
        "draws": "random_candidates",
        "draws_from": "random_candidates_start",
        "mix": "mixup_max",
    }

    strategy: Literal["random", "greedy", "hill-climbing"] = "random"
    """Two random masks (Xiang et al. 2022); the worst one and the worst beside it (Saha et al. 2023); or, at no cost, those
    that a picture learned from when it came up before, one of them moved to where its gradient then led."""
    coarse_grids: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(), max_length=3)
    """For ``greedy``: masks per axis of larger masks that are tried first; then only those within the worst of them."""
    greedy_start: float = Field(default=0.0, ge=0, le=1)
    """For ``greedy``: share of the training after which masks are the worst ones; before it they are random."""
    climbing_start: float = Field(default=0.0, ge=0, le=1)
    """For ``hill-climbing``: share of the training after which masks move along the gradient; before it they are random."""
    small_mask_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the batches that learn under the smaller masks of the defense; the others learn under the larger ones."""
    small_mask_start: float = Field(default=0.0, ge=0, le=1)
    """Share of the training after which they do; before it all learn under the larger ones."""
    random_candidates: int = Field(default=1, ge=1, le=64)
    """For random masks: pairs that are drawn for an image, which learns from the one of largest loss."""
    random_candidates_start: float = Field(default=0.0, ge=0, le=1)
    """Share of the training after which that many are drawn; before it one."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes."""
    mixup_max: float = Field(default=0.0, ge=0, le=0.5)
    """Largest share of another picture of the batch that is mixed into each, drawn evenly, and of its target (mixup)."""

    @model_validator(mode="after")
    def _check(self) -> "MaskTraining":
        if self.strategy != "greedy" and self.greedy_start:
            raise ValueError("greedy_start belongs to strategy: greedy")
        if self.strategy != "hill-climbing" and self.climbing_start:
            raise ValueError("climbing_start belongs to strategy: hill-climbing")
        if self.strategy != "greedy" and self.coarse_grids:
            raise ValueError("coarse_grids belongs to strategy: greedy")
        if list(self.coarse_grids) != sorted(set(self.coarse_grids)):
            raise ValueError("coarse_grids goes from few masks per axis to many")
        return self


class Augment(Settings):
    """Random changes of each training batch; the empty ones leave pictures alone."""

    renamed: ClassVar[dict[str, str]] = {
        "shift": "max_shift",
        "rotate": "max_rotation",
        "scale": "max_scale",
        "colour": "colour_jitter",
    }

    max_shift: int = Field(default=0, ge=0, le=64)
    """Largest shift in pixels along each axis, drawn for each picture; black comes in."""
    flip: bool = False
    """Mirror half of the pictures left to right."""
    crop: int | None = Field(default=None, ge=33, le=4096)
    """Side in pixels of a square that is cut out at a random place, for networks whose cells do not know where they
    are: a step on small squares costs a share of one on whole pictures."""
    max_rotation: float = Field(default=0.0, ge=0, le=180)
    """Largest angle in degrees by which pictures are turned, either way, drawn for each; black comes in."""
    max_scale: float = Field(default=0.0, ge=0, le=1)
    """0.1: each axis up to 1.1 times as long or as short, drawn for each picture and axis."""
    colour_jitter: float = Field(default=0.0, ge=0, lt=1)
    """0.2: brightness, contrast and saturation up to 1.2 times as strong or as weak, each drawn for each picture."""

    @property
    def plain(self) -> "Augment":
        """The same without those changes that no picture to be answered has."""
        return self.model_copy(update={"max_rotation": 0.0, "max_scale": 0.0, "colour_jitter": 0.0})


class Recipe(DefenseSpec):
    """A training, from data to a certified defense on disk."""

    renamed: ClassVar[dict[str, str]] = {
        "start": "init_from",
        "masking": "mask_training",
        "plain_from": "strong_augment_end",
        "warmup": "warmup_fraction",
        "halving": "halving_interval",
        "weights": "weight_dtype",
    }

    name: str = Field(pattern=r"[A-Za-z0-9_.-]{1,64}")
    data: str
    split: str = "train"
    resize: tuple[Side, Side] | None = None
    """Resize and centre-crop every picture to (H, W) first; without, all must have one size."""
    limit: int | None = Field(default=None, ge=1)
    holdout: int = Field(default=1000, ge=0)
    """Last pictures of the split, kept out of the training to watch it."""
    init_from: str | Annotated[tuple[str, ...], Field(min_length=2, max_length=8)] | None = None
    """A trained model, by zoo name or folder, whose weights the training begins with; it has the same network. For a
    cross, two of them: of its columns and of its rows; for an ensemble, one of each member. ``imagenet-lite``: the
    ImageNet weights of efficientnet-lite0."""
    frozen: tuple[str, ...] = ()
    """Parts of the network, as ``stem`` or ``blocks.0``, that stay as they are at the start: a step passes them once, and
    takes no gradient of theirs."""
    objective: Objective = Objective()
    interval: IntervalTraining | None = None
    """Training with interval bounds, instead of ``objective``. Where it is given, ``defense``, ``epochs``,
    ``optimizer``, ``learning_rate``, ``weight_decay``, ``warmup_fraction`` and ``halving_interval`` default to the paper's
    for MNIST."""
    mask_training: MaskTraining | None = None
    """Training under masks, instead of ``objective``, for the defenses that lay masks over pictures."""
    augment: Augment = Augment()
    strong_augment_end: float = Field(default=1.0, ge=0, le=1)
    """Share of the training after which pictures are only shifted, mirrored and cropped: not turned, scaled, recoloured or
    mixed, as those that are to be answered are not."""
    epochs: int = Field(ge=0, le=10_000)
    """0: what it starts with, as it is, as an ensemble of trained models."""
    batch_size: int = Field(default=128, ge=1, le=65_536)
    optimizer: Literal["adamw", "sgd", "adam", "muon"] = "adamw"
    """``muon``: for hidden layers, with AdamW for the first, the last and all vectors; learns in fewer epochs."""
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; afterwards it falls as a cosine."""
    halving_interval: float | None = Field(default=None, gt=0, le=1)
    """Instead of a cosine: the rate stays until intervals are whole, then is halved after each such share of the
    training."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    weight_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type in which weights are stored, and so served; ``int8``: in steps of 1/127 of the largest of each output."""
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _paper(cls, values: Any) -> Any:
        return {**INTERVAL_DEFAULTS, **values} if isinstance(values, dict) and values.get("interval") else values

    @property
    def threat(self) -> Threat:
        """The threat that the training is to withstand."""
        if self.mask_training is not None:
            return PatchThreat(self.settings["patch"])
        if self.interval is None:
            return PatchThreat(self.objective.patch)
        sparse = self.interval.strategy == "sparse"
        return SparseThreat(self.interval.pixels) if sparse else PatchThreat(self.interval.patch)

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        objective = self.objective
        method = METHODS[self.defense]
        if self.interval is not None and not method.trains_by_bounds:
            raise ValueError(
                f"training with interval bounds is for {names_with('trains_by_bounds')}, not {self.defense}"
            )
        if self.epochs == 0 and self.init_from is None:
            raise ValueError("epochs: 0 trains nothing; give at least 1, or trained models as init_from")
        if isinstance(self.model, FallbackEnsembleSettings) and self.epochs:
            raise ValueError(
                "members of a fallback-ensemble are trained one by one; give the trained models as init_from, with epochs: 0"
            )
        if self.interval is not None and objective != Objective():
            raise ValueError("interval stands instead of objective; leave one out")
        if self.mask_training is not None and (self.interval is not None or objective != Objective()):
            raise ValueError("mask_training stands instead of objective and interval; leave them out")
        if (
            self.mask_training is not None
            and self.mask_training.small_mask_fraction
            and not self.settings.get("subdivisions")
        ):
            raise ValueError(
                "mask_training.small_mask_fraction is for a defense with smaller masks; use settings.subdivisions=2"
            )
        if self.mask_training is not None and not method.trains_under_masks:
            raise ValueError(f"training under masks is for {names_with('trains_under_masks')}, not {self.defense}")
        if self.halving_interval is not None and self.interval is None:
            raise ValueError("halving_interval begins when intervals are whole; it needs interval")
        if self.model.local_logits and objective.views_per_step != "all":
            raise ValueError("a network of local logits yields all of them at once; use objective.views_per_step: all")
        if method.reads_whole_images and (
            objective.vote_margin_weight or objective.mask_margin_weight or objective.masked_cross_entropy_weight
        ):
            raise ValueError("a network without views has no margin to raise; use cross_entropy_weight alone")
        if self.augment.crop is not None and (not isinstance(self.model, BagNetSettings) or self.model.resize):
            raise ValueError("augment.crop is for networks of any picture size: a bagnet without resize")
        if self.views is not None and self.views.random and objective.views_per_step == "all":
            raise ValueError(f"{self.views.name} cannot all be shown; use objective.views_per_step: 1")
        if (
            self.views is not None
            and (objective.mask_margin_weight or objective.masked_cross_entropy_weight)
            and self.views.count != 1
        ):
            raise ValueError("robust masking needs views of one band or block")
        return self


def read(path: Path, changes: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with ``key=value`` changes (dots reach inside: ``views.width=4``).

    Errors: InputError that names the field.
    """
    try:
        if path.stat().st_size > 2**20:
            raise InputError(f"{path} is larger than 1 MiB; that is no recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = from_yaml(text)
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is no recipe: a recipe is a list of `key: value` lines")
    for change in changes or []:
        _change(values, change)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        place, words = problem(error, Recipe.model_fields)
        given = error.errors()[0]
        if place and given["type"] not in ("extra_forbidden", "missing", "unknown_setting"):
            words += f", not {json.dumps(given['input'], default=str)[:80]}"
        raise InputError(f"{path}: {place or 'recipe'}: {words}") from None


def _change(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change!r} is not understood; write key=value, as epochs=3 or views.width=4")
    *folders, last = key.split(".")
    for folder in folders:
        values = values.setdefault(folder, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {change!r}: {folder} has no fields")
    try:
        values[last] = from_yaml(text)
    except ValueError:
        raise InputError(f"--set {change!r}: {text!r} is not a value") from None
