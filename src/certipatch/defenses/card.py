"""A trained defense on disk: ``card.json`` says what it is, ``weights.safetensors`` holds the network's weights.

Neither can run code. The network is laid out without memory first, and the file's tensors must be exactly its own, so
that a card cannot ask for more than the weights beside it.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from certipatch import views
from certipatch.defenses.base import Defense
from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
from certipatch.errors import InputError
from certipatch.models import ModelSettings, create

Side = Annotated[int, Field(ge=1, le=4096)]


class ViewSettings(BaseModel):
    """Views in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["columns", "rows", "blocks"]
    width: Side
    stride: Side = 1
    wrap: bool = True
    count: int = Field(default=1, ge=1, le=8)


class SmoothingSettings(BaseModel):
    """Settings of derandomized smoothing in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float | None = Field(default=0.3, ge=0, lt=1)
    margin: Literal["location", "paper"] = "location"


class Card(BaseModel):
    """What a trained defense is and where it comes from."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=100)
    defense: Literal["derandomized-smoothing"]
    settings: SmoothingSettings
    views: ViewSettings
    model: ModelSettings
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
        return create(
            self.model, views.create(self.views.model_dump()), self.channels, len(self.classes), self.image_size
        )


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
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: {place}: {first['msg']}") from None


def load_folder(folder: Path) -> tuple[Defense, Card]:
    """The trained defense in ``folder``, in eval mode, in float32, its model checked.

    Errors: InputError where a file is missing, truncated, foreign or does not match the card, or where the model
    check refuses the network.
    """
    card = read(folder)
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
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'card.json'}: {error}") if not isinstance(error, InputError) else error from None
    network = card.network()
    network.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights.items()})
    network.eval().requires_grad_(False)
    settings = card.settings.model_dump()
    defense = DerandomizedSmoothing(network, views.create(card.views.model_dump()), **settings)
    defense.check(torch.rand((1, card.channels, *card.image_size), generator=torch.Generator().manual_seed(0)))
    return defense, card


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
    temporary.replace(path)
