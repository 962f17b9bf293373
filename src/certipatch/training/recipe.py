"""Recipes: everything that a training needs to be repeated, as a YAML file that pydantic checks."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from certipatch.defenses.registry import METHODS, names_with
from certipatch.defenses.settings import Side
from certipatch.errors import InputError, problem
from certipatch.models import BagNetSettings, FallbackEnsembleSettings
from certipatch.plumbing.parsing import from_yaml
from certipatch.saved.card import DefenseSpec
from certipatch.threats import PatchThreat, SparseThreat, Threat

# Appendix A.1 of Chiang et al. 2020, for MNIST.
INTERVAL_DEFAULTS = {
    "defense": "interval-bounds",
    "epochs": 100,
    "optimizer": "adam",
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "warmup": 0.0,
    "halving": 0.1,
}


class Objective(BaseModel):
    """Which views a step looks at, and what it asks of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    views_per_step: int | Literal["all"] = 1
    """``1`` is ablated training as in the paper: one random view for all pictures of the batch. A larger number draws
    that many, anew for each batch; ``all`` shows every view of every picture. With ``mask_margin``, a number takes views
    evenly spaced, from a first one drawn anew, and the margin is that of those alone."""
    cross_entropy: float = Field(default=1.0, ge=0)
    """Weight of the mean cross entropy of the views."""
    vote_margin: float = Field(default=0.0, ge=0)
    """Weight of the worst-location vote margin; needs ``views_per_step: all``."""
    patch: int = Field(default=5, ge=1)
    """Side in pixels of the square patch that the vote margin is for."""
    vote_width: float = Field(default=0.1, gt=0)
    temperature: float = Field(default=2.0, gt=0)
    margin_from: float = Field(default=0.1, ge=0, le=1)
    """Share of the training after which margins count."""
    pooled_cross_entropy: float = Field(default=0.0, ge=0)
    """Weight of the cross entropy of the mean logits."""
    masked_cross_entropy: float = Field(default=0.0, ge=0)
    """Weight of the same without the true class's heaviest window."""
    mask_margin: float = Field(default=0.0, ge=0)
    """Weight of the certificate of robust masking itself, on confidences, at its worst location and rival."""
    mask_temperature: float = Field(default=0.02, gt=0)
    """Of the smooth worst case, as a share of the views."""
    mask_scale: float = Field(default=10.0, gt=0)
    """Steepness of the loss of a margin, per share of the views."""

    @model_validator(mode="after")
    def _check(self) -> "Objective":
        for name in ("vote_margin", "masked_cross_entropy", "pooled_cross_entropy"):
            if getattr(self, name) > 0 and self.views_per_step != "all":
                raise ValueError(f"{name} needs views_per_step: all")
        if self.views_per_step != "all" and self.views_per_step < 1:
            raise ValueError("views_per_step is at least 1, or all")
        weights = ("cross_entropy", "vote_margin", "pooled_cross_entropy", "masked_cross_entropy", "mask_margin")
        if all(getattr(self, name) == 0 for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0; nothing would be trained")
        return self


class IntervalTraining(BaseModel):
    """Training with interval bounds (Chiang et al. 2020). Intervals under the patch grow from the pixel to [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["all", "random", "guided", "pooled", "sparse", "natural"] = "all"
    """Which bounds a step looks at: of all places of the patch; of a random few; of a few that a U-Net thinks bad; of
    blocks of places; of any few pixels; none."""
    patch: Side | tuple[Side, Side] = 5
    """Of the patch in pixels: the side of a square, or height and width."""
    places: int = Field(default=10, ge=1, le=4096)
    """Of ``random`` (drawn anew for each batch, shared by its pictures) and ``guided`` (drawn for each picture)."""
    all_from: float = Field(default=1.0, ge=0, le=1)
    """Of ``random``: share of the training after which a step looks at all places."""
    pool: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(2,), min_length=1, max_length=4)
    """Of ``pooled``: sides of the squares of places that have one bound behind the first, second … layer."""
    pixels: int = Field(default=4, ge=1, le=4096**2)
    """Of ``sparse``: how many pixels the attacker changes."""
    ramp_from: float = Field(default=0.01, ge=0, le=1)
    """Share of the training after which intervals grow."""
    ramp_until: float = Field(default=0.61, ge=0, le=1)
    """Share of the training after which they are whole."""
    clean: float = Field(default=0.0, ge=0)
    """Weight of the cross entropy of clean pictures beside that of the bounds; the paper has none."""
    guide_rate: float = Field(default=2.0, gt=0)
    """Of ``guided``: learning rate of the U-Net, as a multiple of the network's."""

    @model_validator(mode="after")
    def _check(self) -> "IntervalTraining":
        if self.ramp_from > self.ramp_until:
            raise ValueError(f"intervals cannot be whole ({self.ramp_until}) before they grow ({self.ramp_from})")
        return self

    def strength(self, share: float) -> float:
        """t of the interval [(1 − t)x, (1 − t)x + t] under the patch, after a share of the training."""
        if share >= self.ramp_until:
            return 1.0
        if share <= self.ramp_from:
            return 0.0
        return (share - self.ramp_from) / (self.ramp_until - self.ramp_from)


class MaskTraining(BaseModel):
    """Training for double masking: cross entropy under two of the defense's masks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["random", "greedy", "climbing"] = "random"
    """Two random masks (Xiang et al. 2022); the worst one and the worst beside it (Saha et al. 2023); or, at no cost, those
    that a picture learned from when it came up before, one of them moved to where its gradient then led."""
    coarse: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(), max_length=3)
    """Of a search: masks per axis of larger masks that are tried first; then only those within the worst of them."""
    tries: int | None = Field(default=None, ge=1, le=64)
    """Of a search: how many masks are tried for each of the two, those of largest gain along the gradient; None for all."""
    greedy_from: float = Field(default=0.0, ge=0, le=1)
    """Of ``greedy``: share of the training after which masks are the worst ones; before it they are random."""
    climbing_from: float = Field(default=0.0, ge=0, le=1)
    """Of ``climbing``: share of the training after which masks move along the gradient; before it they are random."""
    searched: float = Field(default=0.0, ge=0, le=1)
    """Of ``climbing``: share of the pictures of each step whose two masks are searched for as ``greedy`` does."""
    finer: float = Field(default=0.0, ge=0, le=1)
    """Share of the batches that learn under the ``finer`` masks of the defense; the others learn under the larger ones."""
    finer_from: float = Field(default=0.0, ge=0, le=1)
    """Share of the training after which they do; before it all learn under the larger ones."""
    draws: int = Field(default=1, ge=1, le=64)
    """Of random masks: how many pairs are drawn for a picture, of which it learns from the one of largest loss."""
    draws_from: float = Field(default=0.0, ge=0, le=1)
    """Share of the training after which that many are drawn; before it one."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes."""
    mix: float = Field(default=0.0, ge=0, le=0.5)
    """Largest share of another picture of the batch that is mixed into each, drawn evenly, and of its target (mixup)."""

    @model_validator(mode="after")
    def _check(self) -> "MaskTraining":
        if self.strategy != "greedy" and self.greedy_from:
            raise ValueError("greedy_from belongs to strategy: greedy")
        if self.strategy != "climbing" and (self.climbing_from or self.searched):
            raise ValueError("climbing_from and searched belong to strategy: climbing")
        if self.strategy != "greedy" and not self.searched and (self.coarse or self.tries):
            raise ValueError("coarse and tries belong to strategy: greedy, or to climbing where masks are searched for")
        if self.coarse and self.tries:
            raise ValueError("masks are found from coarse to fine or by tries along the gradient, not both")
        if list(self.coarse) != sorted(set(self.coarse)):
            raise ValueError("coarse goes from few masks per axis to many")
        return self


class Augment(BaseModel):
    """Random changes of each training batch; the empty ones leave pictures alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shift: int = Field(default=0, ge=0, le=64)
    """Largest shift in pixels along each axis, drawn for each picture; black comes in."""
    flip: bool = False
    """Mirror half of the pictures left to right."""
    crop: int | None = Field(default=None, ge=33, le=4096)
    """Side in pixels of a square that is cut out at a random place, for networks whose cells do not know where they
    are: a step on small squares costs a share of one on whole pictures."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Largest angle in degrees by which pictures are turned, either way, drawn for each; black comes in."""
    scale: float = Field(default=0.0, ge=0, le=1)
    """0.1: each axis up to 1.1 times as long or as short, drawn for each picture and axis."""
    colour: float = Field(default=0.0, ge=0, lt=1)
    """0.2: brightness, contrast and saturation up to 1.2 times as strong or as weak, each drawn for each picture."""

    @property
    def plain(self) -> "Augment":
        """The same without those changes that no picture to be answered has."""
        return self.model_copy(update={"rotate": 0.0, "scale": 0.0, "colour": 0.0})


class Recipe(DefenseSpec):
    """A training, from data to a certified defense on disk."""

    name: str = Field(pattern=r"[A-Za-z0-9_.-]{1,64}")
    data: str
    split: str = "train"
    resize: tuple[Side, Side] | None = None
    """Resize and centre-crop every picture to (H, W) first; without, all must have one size."""
    limit: int | None = Field(default=None, ge=1)
    holdout: int = Field(default=1000, ge=0)
    """Last pictures of the split, kept out of the training to watch it."""
    start: str | Annotated[tuple[str, ...], Field(min_length=2, max_length=8)] | None = None
    """A trained model, by zoo name or folder, whose weights the training begins with; it has the same network. For a
    cross, two of them: of its columns and of its rows; for an ensemble, one of each member. ``imagenet-lite``: the
    ImageNet weights of efficientnet-lite0."""
    frozen: tuple[str, ...] = ()
    """Parts of the network, as ``stem`` or ``blocks.0``, that stay as they are at the start: a step passes them once, and
    takes no gradient of theirs."""
    objective: Objective = Objective()
    interval: IntervalTraining | None = None
    """Training with interval bounds, instead of ``objective``. Where it is given, ``defense``, ``epochs``,
    ``optimizer``, ``learning_rate``, ``weight_decay``, ``warmup`` and ``halving`` default to the paper's for MNIST."""
    masking: MaskTraining | None = None
    """Training under masks, instead of ``objective``, for the defenses that lay masks over pictures."""
    augment: Augment = Augment()
    plain_from: float = Field(default=1.0, ge=0, le=1)
    """Share of the training after which pictures are only shifted, mirrored and cropped: not turned, scaled, recoloured or
    mixed, as those that are to be answered are not."""
    epochs: int = Field(ge=0, le=10_000)
    """0: what it starts with, as it is, as an ensemble of trained models."""
    batch_size: int = Field(default=128, ge=1, le=65_536)
    optimizer: Literal["adamw", "sgd", "adam", "muon"] = "adamw"
    """``muon``: for hidden layers, with AdamW for the first, the last and all vectors; learns in fewer epochs."""
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; afterwards it falls as a cosine."""
    halving: float | None = Field(default=None, gt=0, le=1)
    """Instead of a cosine: the rate stays until intervals are whole, then is halved after each such share of the
    training."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    weights: Literal["float32", "float16", "int8"] = "float32"
    """How the trained weights are stored, and so served; ``int8``: in steps of 1/127 of the largest of each output."""
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _paper(cls, values: Any) -> Any:
        return {**INTERVAL_DEFAULTS, **values} if isinstance(values, dict) and values.get("interval") else values

    @property
    def threat(self) -> Threat:
        """What the training is to withstand."""
        if self.masking is not None:
            return PatchThreat(self.settings["patch"])
        if self.interval is None:
            return PatchThreat(self.objective.patch)
        sparse = self.interval.strategy == "sparse"
        return SparseThreat(self.interval.pixels) if sparse else PatchThreat(self.interval.patch)

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        asked = self.objective
        method = METHODS[self.defense]
        if self.interval is not None and not method.trains_by_bounds:
            raise ValueError(
                f"training with interval bounds is for {names_with('trains_by_bounds')}, not {self.defense}"
            )
        if self.epochs == 0 and self.start is None:
            raise ValueError("epochs: 0 trains nothing; give at least 1, or trained models as start")
        if isinstance(self.model, FallbackEnsembleSettings) and self.epochs:
            raise ValueError(
                "members of a fallback-ensemble are trained one by one; give the trained models as start, with epochs: 0"
            )
        if self.interval is not None and asked != Objective():
            raise ValueError("interval stands instead of objective; leave one out")
        if self.masking is not None and (self.interval is not None or asked != Objective()):
            raise ValueError("masking stands instead of objective and interval; leave them out")
        if self.masking is not None and self.masking.finer and not self.settings.get("subdivisions"):
            raise ValueError("masking.finer is for a defense with finer masks; use settings.subdivisions=2")
        if self.masking is not None and not method.trains_under_masks:
            raise ValueError(f"training under masks is for {names_with('trains_under_masks')}, not {self.defense}")
        if self.halving is not None and self.interval is None:
            raise ValueError("halving begins when intervals are whole; it needs interval")
        if self.model.local_logits and asked.views_per_step != "all":
            raise ValueError("a network of local logits yields all of them at once; use objective.views_per_step: all")
        if method.reads_whole_images and (asked.vote_margin or asked.mask_margin or asked.masked_cross_entropy):
            raise ValueError("a network without views has no margin to raise; use cross_entropy alone")
        if self.augment.crop is not None and (not isinstance(self.model, BagNetSettings) or self.model.resize):
            raise ValueError("augment.crop is for networks of any picture size: a bagnet without resize")
        if self.views is not None and self.views.random and asked.views_per_step == "all":
            raise ValueError(f"{self.views.name} cannot all be shown; use objective.views_per_step: 1")
        if self.views is not None and (asked.mask_margin or asked.masked_cross_entropy) and self.views.count != 1:
            raise ValueError("masking needs views of one band or block")
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
