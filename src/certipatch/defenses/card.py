"""A trained defense on disk: ``card.json`` says what it is, ``weights.safetensors`` holds the network's weights.

Neither can run code. The network is laid out without memory first, and the file's tensors must be exactly its own, so
that a card cannot ask for more than the weights beside it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from certipatch import views as view_sets
from certipatch.defenses.bagcert import BagCert
from certipatch.defenses.base import Defense
from certipatch.defenses.clipped_bagnet import ClippedBagNet
from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
from certipatch.defenses.digital_watermarking import DigitalWatermarking
from certipatch.defenses.interval_bounds import IntervalBounds
from certipatch.defenses.local_gradients_smoothing import LocalGradientsSmoothing
from certipatch.defenses.minority_reports import MinorityReports
from certipatch.defenses.patchcleanser import PatchCleanser
from certipatch.defenses.patchcure import PatchCURE
from certipatch.defenses.patchguard import PatchGuard
from certipatch.defenses.patchguard_plus_plus import PatchGuardPlusPlus
from certipatch.defenses.randomized_ablation import RandomizedAblation
from certipatch.defenses.undefended import Undefended
from certipatch.errors import InputError, problem
from certipatch.models import LOCAL, ModelSettings, create
from certipatch.rules.clopper_pearson import MAX_SAMPLES
from certipatch.threats import PatchThreat, Threat

Side = Annotated[int, Field(ge=1, le=4096)]


class ViewSettings(BaseModel):
    """Views in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["columns", "rows", "cross", "blocks", "random-pixels", "random-columns"]
    width: Side | None = None
    stride: Side = 1
    wrap: bool = True
    count: int = Field(default=1, ge=1, le=8)
    keep: int | None = Field(default=None, ge=1, le=4096**2)
    """Of random views: how many pixels or columns are shown."""

    @property
    def random(self) -> bool:
        """Whether views are drawn, not numbered."""
        return self.name.startswith("random-")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        needed, foreign = ("keep", self.width) if self.random else ("width", self.keep)
        if getattr(self, needed) is None:
            raise ValueError(f"{self.name} need a {needed}")
        if foreign is not None or (self.random and (self.stride, self.wrap, self.count) != (1, True, 1)):
            raise ValueError(
                f"{self.name} are described by their {needed}, not by {'width' if self.random else 'keep'}"
            )
        return self

    @model_serializer
    def values(self) -> dict[str, Any]:
        """The settings that ``views.create`` takes."""
        if self.random:
            return {"name": self.name, "keep": self.keep}
        return {name: getattr(self, name) for name in ("name", "width", "stride", "wrap", "count")}


class Settings(BaseModel):
    """Settings of a defense in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SmoothingSettings(Settings):
    """Derandomized smoothing."""

    threshold: float | None = Field(default=0.3, ge=0, lt=1)
    margin: Literal["location", "paper"] = "location"


class RandomizedSettings(Settings):
    """Randomized ablation; the paper's."""

    samples: int = Field(default=10_000, ge=1, le=MAX_SAMPLES)
    samples_to_pick: int = Field(default=1_000, ge=1, le=MAX_SAMPLES)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)


class PatchGuardSettings(Settings):
    """PatchGuard. ``patch`` is what it is built for where no threat is given, or where it is ``fixed``, always."""

    evidence: Literal["logits", "confidence", "sigmoid", "prediction"] | None = None
    threshold: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    patch: Side = 5
    fixed: bool = False


class ClippedBagNetSettings(Settings):
    """Clipped BagNet."""

    scale: float = Field(default=0.05, gt=0)
    shift: float = 1.0


class BagCertSettings(Settings):
    """BagCert."""

    threshold: float = Field(default=0.3, ge=0, lt=1)


class DetectionSettings(Settings):
    """PatchGuard++."""

    threshold: float = Field(default=0.5, ge=0, lt=1)
    patch: Side = 5


class GradientSettings(Settings):
    """Local gradients smoothing; the paper's."""

    window: int = Field(default=15, ge=1, le=4096)
    overlap: int = Field(default=5, ge=0, le=4096)
    threshold: float = Field(default=0.1, ge=0, le=1)
    smoothing: float = Field(default=2.3, ge=0)


class WatermarkSettings(Settings):
    """Digital watermarking."""

    share: float = Field(default=0.1, gt=0, lt=1)
    neighbours: float = Field(default=0.4, ge=0, le=1)
    size: int | None = Field(default=None, ge=1, le=4095)


PerAxis = Annotated[int, Field(ge=1, le=256)]
Fill = Annotated[float, Field(ge=0, le=1)]


class MaskSettings(Settings):
    """Masks over the picture. ``patch`` is what they are made for where no threat is given."""

    masks: PerAxis | tuple[PerAxis, PerAxis] | None = None
    stride: Side | tuple[Side, Side] | None = None
    fill: Fill | tuple[Fill, ...] | None = None
    patch: Side = 5


class PatchCleanserSettings(MaskSettings):
    """PatchCleanser. Without ``maps`` it stops as soon as the verdict is known."""

    maps: bool = False


class PatchCURESettings(Settings):
    """PatchCURE. ``patch`` is what its masks are made for where no threat is given."""

    masks: PerAxis | tuple[PerAxis, PerAxis] | None = None
    stride: PerAxis | tuple[PerAxis, PerAxis] | None = None
    patch: Side = 5
    maps: bool = False


class MinorityReportsSettings(MaskSettings):
    """Minority Reports."""

    threshold: float = Field(default=0.5, ge=0, lt=1)


SETTINGS: dict[str, type[Settings]] = {
    "lgs": GradientSettings,
    "dw": WatermarkSettings,
    "derandomized-smoothing": SmoothingSettings,
    "randomized-ablation": RandomizedSettings,
    "patchguard": PatchGuardSettings,
    "clipped-bagnet": ClippedBagNetSettings,
    "bagcert": BagCertSettings,
    "patchguard-plus-plus": DetectionSettings,
    "interval-bounds": Settings,
    "patchcleanser": PatchCleanserSettings,
    "patchcure": PatchCURESettings,
    "minority-reports": MinorityReportsSettings,
    "undefended": Settings,
}
Method = Literal[
    "lgs",
    "dw",
    "derandomized-smoothing",
    "randomized-ablation",
    "patchguard",
    "clipped-bagnet",
    "bagcert",
    "patchguard-plus-plus",
    "interval-bounds",
    "patchcleanser",
    "patchcure",
    "minority-reports",
    "undefended",
]
# Defenses of networks that read whole pictures, without views.
PLAIN: dict[str, Callable[..., Any]] = {
    "undefended": Undefended,
    "interval-bounds": IntervalBounds,
    "lgs": LocalGradientsSmoothing,
    "dw": DigitalWatermarking,
    "patchcleanser": PatchCleanser,
    "patchcure": PatchCURE,
    "minority-reports": MinorityReports,
}
BUILT_FOR_A_PATCH = ("patchguard", "patchguard-plus-plus", "patchcleanser", "patchcure", "minority-reports")


class Described(BaseModel):
    """What recipes and cards both say: a defense with its settings, its views, and its network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    defense: Method = "derandomized-smoothing"
    settings: dict[str, Any] = {}
    views: ViewSettings | None = None
    """Bands or blocks; none for networks of local logits, whose views are their receptive fields, and for plain ones."""
    model: ModelSettings

    @model_validator(mode="after")
    def _complete(self) -> Self:
        settings = SETTINGS[self.defense].model_validate(self.settings)
        object.__setattr__(self, "settings", settings.model_dump(mode="json"))
        local = self.model.name in LOCAL
        if local == (self.views is not None) and self.defense not in PLAIN:
            needs = "has receptive fields of its own; leave views out" if local else "needs views"
            raise ValueError(f"{self.defense} with the network {self.model.name} {needs}")
        if self.defense in PLAIN and (self.views is not None or local):
            raise ValueError(f"{self.defense} reads whole pictures, without views; {self.model.name} cannot")
        if self.defense == "patchcure" and not self.model.name.startswith("shared-"):
            raise ValueError(
                f"patchcure needs a network with a shared front, shared-bagnet or shared-vit, not {self.model.name}"
            )
        if self.views is not None and self.views.random and self.defense != "randomized-ablation":
            raise ValueError(f"{self.defense} asks every view; {self.views.name} are for randomized-ablation")
        return self

    def created_views(self) -> view_sets.Views | None:
        """The bands or blocks, or None."""
        found = None if self.views is None else view_sets.create(self.views.values())
        return found if isinstance(found, view_sets.Views) else None

    def random_views(self) -> view_sets.RandomViews | None:
        """The random views, or None."""
        found = None if self.views is None else view_sets.create(self.views.values())
        return found if isinstance(found, view_sets.RandomViews) else None


class Card(Described):
    """What a trained defense is and where it comes from."""

    name: str = Field(max_length=100)
    image_size: tuple[Side, Side]
    channels: int = Field(ge=1, le=16)
    classes: tuple[str, ...] = Field(min_length=2, max_length=100_000)
    resize: bool = False
    """Pictures of another size are resized and centre-cropped first; the attacker paints on what comes out."""
    sha256: str
    """Of ``weights.safetensors``."""
    data: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    seed: int = 0
    versions: dict[str, str] = {}
    training: dict[str, Any] = {}
    """Time, machine and steps."""
    metrics: list[dict[str, Any]] = []
    """Measured results, each with its data, n and command."""

    def network(self) -> nn.Module:
        """The network of this card, with fresh weights."""
        views = self.random_views() or self.created_views()
        return create(self.model, views, self.channels, len(self.classes), self.image_size)


def build(card: Described, network: nn.Module, threat: Threat | None = None) -> Defense:
    """The defense that ``card`` describes around ``network``.

    Args:
        threat: the patch that PatchGuard, PatchCleanser and their kin are built for; None for the one in their settings.
            Where it is a sparse threat they are built for a patch of so many pixels a side, which never certifies more.
    """
    settings = dict(card.settings)
    found = card.created_views()
    if card.defense in BUILT_FOR_A_PATCH:
        patch = settings.pop("patch")
        given = isinstance(threat, PatchThreat) and not settings.get("fixed")
        settings["threat"] = threat if given else PatchThreat(patch)
    if card.defense in PLAIN:
        return PLAIN[card.defense](network, **settings)
    if card.defense == "patchguard":
        settings["clip"] = math.inf if settings["clip"] is None else settings["clip"]
    return BUILDERS[card.defense](network, views=card.random_views() or found, **settings)


BUILDERS: dict[str, Callable[..., Defense]] = {
    "derandomized-smoothing": DerandomizedSmoothing,
    "randomized-ablation": RandomizedAblation,
    "patchguard": PatchGuard,
    "clipped-bagnet": ClippedBagNet,
    "bagcert": BagCert,
    "patchguard-plus-plus": PatchGuardPlusPlus,
}


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> Card:
    """The card of a defense folder. InputError if it is missing or not a card."""
    path = folder / "card.json"
    try:
        if path.stat().st_size > 16 * 2**20:
            raise InputError(f"{path} is larger than 16 MiB; that is no card")
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{folder} is no trained defense: {error.strerror or error}: card.json") from None
    except ValidationError as error:
        place, words = problem(error)
        raise InputError(f"{path}: {place or 'the file'}: {words}") from None


def load_folder(
    folder: Path, threat: Threat | None = None, method: str | None = None, changes: dict[str, Any] | None = None
) -> tuple[Defense, Card]:
    """The trained defense in ``folder``, in eval mode, in float32, its model checked.

    Args:
        threat: what defenses whose answers depend on the patch are built for; None for the one in their card.
        method: another defense to put around the network, with its default settings.
        changes: settings of the defense that differ from the card's, or from the defaults of ``method``.

    Errors: InputError where a file is missing, truncated, foreign or does not match the card, or where the model
    check refuses the network.
    """
    card = read(folder)
    if changes or (method is not None and method != card.defense):
        kept = card.settings if method in (None, card.defense) else {}
        try:
            card = Card.model_validate(
                card.model_dump() | {"defense": method or card.defense, "settings": kept | (changes or {})}
            )
        except ValidationError as error:
            place, words = problem(error, SETTINGS[method or card.defense].model_fields)
            place += ": " * bool(place)
            raise InputError(f"{method or card.defense} around {folder.name}: {place}{words}") from None
    weights = read_weights(folder, card)
    network = card.network()
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    defense = build(card, network, threat)
    defense.check(torch.rand((1, card.channels, *card.image_size), generator=torch.Generator().manual_seed(0)))
    return defense, card


def read_weights(folder: Path, card: Card) -> dict[str, torch.Tensor]:
    """The weights beside ``card``, floating-point ones in float32. InputError unless they are its network's own."""
    path = folder / "weights.safetensors"
    try:
        if sha256(path) != card.sha256:
            raise InputError(f"{path} is not the file that card.json names (sha256 differs); train or copy it again")
        with torch.device("meta"):
            network = card.network()
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                names = sorted(set(found.items()) ^ set(expected.items()))
                raise InputError(f"{path} does not hold the weights of {card.model.name}: {names[0][0]} differs")
            weights = {name: file.get_tensor(name) for name in expected}
        return {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'card.json'}: {error}") if not isinstance(error, InputError) else error from None


def write(folder: Path, card: Card) -> None:
    """Write ``card.json``, whole or not at all."""
    temporary = folder / "card.json.part"
    temporary.write_text(json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
    temporary.replace(folder / "card.json")


def save_weights(folder: Path, network: nn.Module, dtype: torch.dtype) -> str:
    """Write ``weights.safetensors`` with floating-point weights as ``dtype``; gives its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: w.to(dtype) if w.is_floating_point() else w for n, w in network.state_dict().items()}
    write_tensors(folder / "weights.safetensors", state)
    return sha256(folder / "weights.safetensors")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. OSError where there is no room or permission."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
