"""A trained defense on disk: ``card.json`` describes it, ``weights.safetensors`` holds the network's weights.

Neither file can run code. The network is first built without memory, and its tensors must be exactly those of the file,
so that a card cannot demand more memory than the weights beside it.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import nn

from certipatch import views as view_sets
from certipatch.defenses.base import Defense
from certipatch.defenses.registry import METHODS, names_with
from certipatch.defenses.settings import Side, ViewSettings
from certipatch.errors import InputError, validated
from certipatch.models import ModelSettings
from certipatch.plumbing.settings import Settings
from certipatch.saved.weights import SCALE, restored, sha256
from certipatch.threats import Threat


class DefenseSpec(Settings):
    """The common part of recipes and cards: a defense with its settings, its views, and its network."""

    defense: str = "derandomized-smoothing"
    settings: dict[str, Any] = Field(default_factory=dict)
    views: ViewSettings | None = None
    """None for networks of whole images, and for networks of local logits: their views are their receptive fields."""
    model: ModelSettings

    @field_validator("defense")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"{name!r} is not known; use one of {', '.join(METHODS)}")
        return name

    @model_validator(mode="after")
    def _complete(self) -> Self:
        method = METHODS[self.defense]
        settings = method.settings_class.model_validate(self.settings)
        object.__setattr__(self, "settings", settings.model_dump(mode="json"))
        local = self.model.local_logits
        if local == (self.views is not None) and not method.reads_whole_images:
            needs = "has receptive fields of its own; leave views out" if local else "needs views"
            raise ValueError(f"{self.defense} with the network {self.model.name} {needs}")
        if method.reads_whole_images and (self.views is not None or local):
            raise ValueError(f"{self.defense} reads whole pictures, without views; {self.model.name} cannot")
        method.check_network(self.model)
        if self.views is not None and self.views.random and not method.takes_random_views:
            drawing = names_with("takes_random_views")
            raise ValueError(f"{self.defense} asks every view; {self.views.name} are for {drawing}")
        return self

    def view_set(self) -> view_sets.Views | view_sets.RandomViews | None:
        """The views, or None."""
        return None if self.views is None else view_sets.create(self.views.values())

    def created_views(self) -> view_sets.Views | None:
        """The bands or blocks, or None."""
        views = self.view_set()
        return views if isinstance(views, view_sets.Views) else None

    def random_views(self) -> view_sets.RandomViews | None:
        """The random views, or None."""
        views = self.view_set()
        return views if isinstance(views, view_sets.RandomViews) else None

    def build(self, network: nn.Module, threat: Threat | None = None) -> Defense:
        """The defense around ``network``. As ``build_defense``."""
        return build_defense(self.defense, network, self.settings, threat, self.view_set())


class Card(DefenseSpec):
    """The description of a trained defense, and its origin."""

    name: str = Field(max_length=100)
    image_size: tuple[Side, Side]
    channels: int = Field(ge=1, le=16)
    classes: tuple[str, ...] = Field(min_length=2, max_length=100_000)
    resize: bool = False
    """Images of another size are resized and centre-cropped first; the attacker paints on the result."""
    sha256: str
    """The hash of ``weights.safetensors``."""
    data: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    """Time, machine and steps."""
    metrics: list[dict[str, Any]] = Field(default_factory=list)
    """Measured results, each with its data, n and command."""

    def network(self) -> nn.Module:
        """The network of this card, with fresh weights."""
        return self.model.build(self.view_set(), self.channels, len(self.classes), self.image_size)


def build_defense(
    method: str,
    network: nn.Module,
    settings: dict[str, Any],
    threat: Threat | None = None,
    views: view_sets.Views | view_sets.RandomViews | None = None,
) -> Any:
    """The defense ``method`` around ``network``, with settings as a card stores them. As ``Method.from_settings``."""
    defense_class = METHODS[method]
    return defense_class.from_settings(network, defense_class.settings_class.model_validate(settings), threat, views)


def read(folder: Path) -> Card:
    """The card of a defense folder. InputError if it is missing or not a card."""
    path = folder / "card.json"
    try:
        if path.stat().st_size > 16 * 2**20:
            raise InputError(f"{path} is larger than 16 MiB; that is no card")
        with validated(str(path), whole="the file"):
            return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{folder} is no trained defense: {error.strerror or error}: card.json") from None


def load_defense(
    folder: Path, threat: Threat | None = None, method: str | None = None, changes: dict[str, Any] | None = None
) -> tuple[Defense, Card]:
    """The trained defense in ``folder``, in eval mode, in float32. The first images check its model.

    Args:
        threat: the threat of defenses whose predictions depend on the patch; None for the card's.
        method: another defense to put around the network, with its default settings.
        changes: settings of the defense that differ from the card's, or from the defaults of ``method``.

    Errors: InputError if a file is missing, truncated or foreign, or if it does not match the card.
    """
    card = read(folder)
    if changes or (method is not None and method != card.defense):
        kept = card.settings if method in (None, card.defense) else {}
        name = method or card.defense
        with validated(f"{name} around {folder.name}", METHODS[name].settings_class.model_fields):
            card = Card.model_validate(card.model_dump() | {"defense": name, "settings": kept | (changes or {})})
    weights = read_weights(folder, card)
    network = card.network()
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    return card.build(network, threat), card


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
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name, shape in list(expected.items()):
                if len(shape) > 1 and name + SCALE in shapes:
                    expected[name + SCALE] = shape[:1]
            if shapes != expected:
                names = sorted(set(shapes.items()) ^ set(expected.items()))
                raise InputError(f"{path} does not hold the weights of {card.model.name}: {names[0][0]} differs")
            return restored({name: file.get_tensor(name) for name in expected})
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
