"""Opens a defense by name: from the zoo, from a folder that ``train`` wrote, or around somebody else's classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from certipatch.defenses import Defense
from certipatch.defenses.registry import METHODS, names_with
from certipatch.errors import InputError, suggestion, validated
from certipatch.models.adapters import FORMS, Adapted, is_adapter, open_model
from certipatch.models.adapters.sources import opening
from certipatch.plumbing import resources
from certipatch.saved.card import Card, build_defense, load_defense
from certipatch.saved.card import read as read_card
from certipatch.threats import PatchThreat, Threat

DatasetProbe = Callable[[], tuple[Sequence[tuple[int, int]], tuple[str, ...] | None]]
"""Looks at a dataset: sizes (H, W) of its images, and the names of their classes, if they have any."""


@final
@dataclass(frozen=True)
class DefenseRef:
    """A defense as the user names it."""

    name: str
    """A zoo name or a folder; with ``model`` a method for that model's network."""
    model: str | None = None
    """A zoo name, a folder, or somebody else's classifier."""
    settings: dict[str, Any] | None = None
    """Settings that differ from those of the card, or from the method's defaults."""

    @property
    def network(self) -> str:
        """The name that opens the network."""
        return self.model or self.name


@final
@dataclass(frozen=True)
class ClassifierInfo:
    """Facts about a classifier that has no card."""

    name: str
    image_size: tuple[int, int]
    """(H, W) of the images that the attacker paints."""
    channels: int
    classes: tuple[str, ...]
    sha256: str
    """The hash of the weights and the preprocessing, or of the file; the code is not part of it."""
    resize: bool
    """Images of another size are resized and centre-cropped first; the attacker paints on the result."""
    seed: int = 0


def zoo() -> dict[str, Card]:
    """The shipped models by name."""
    names = resources.resource_names("zoo", "*/card.json")
    return {name: read_card(folder) for name in names if (folder := resources.find("zoo", name))}


def locate(name: str) -> Path:
    """The folder of a defense: a zoo name, or a folder that ``train`` wrote. InputError with the nearest name."""
    if (folder := resources.find("zoo", name)) is not None and (folder / "card.json").exists():
        return folder
    if Path(name).is_dir():
        return Path(name)
    if resources.find("recipes", f"{name}.yaml") is not None:
        raise InputError(
            f"no weights of {name!r} here; take zoo/{name} of the repository if it is there, or train it: certipatch "
            f"train recipes/{name}.yaml --data PATH --out models/{name}, then --defense models/{name}"
        )
    if "/" in name:
        raise InputError(
            f"there is no folder {name}; give a zoo model (certipatch list models) or the folder that train wrote"
        )
    known = resources.resource_names("zoo", "*/card.json")
    raise InputError(f"unknown defense {name!r}, and no folder of a training; {suggestion(name, known)}")


def locate_model(name: str) -> Path:
    """The folder of the defense that holds a network. InputError that names the other forms of --model."""
    try:
        return locate(name)
    except InputError as error:
        message = str(error).replace("unknown defense", "unknown model", 1)
        raise InputError(f"{message}; or somebody else's classifier: {FORMS}") from None


def load(name: str, threat: Threat | None = None) -> Defense:
    """A trained defense, from the zoo or a folder, ready to ``predict`` and ``certify``.

    ``threat`` is the patch of defenses that are built for one, such as PatchGuard; the card's patch by default.
    """
    return open_defense(name, threat=threat)[0]


def open_defense(
    name: str, model: str | None = None, threat: Threat | None = None, changes: dict[str, Any] | None = None
) -> tuple[Defense, Card]:
    """A trained defense and its card, from the zoo or a folder.

    Args:
        name, model, changes: the fields of a ``DefenseRef``; ``model`` is a zoo name or folder.
        threat: the threat of defenses whose predictions depend on the patch; None for the card's.
    """
    check_method(name, model)
    if model is None:
        return load_defense(locate(name), threat, None, changes)
    return load_defense(locate(model), threat, name, changes)


def check_method(name: str, model: str | None) -> None:
    """InputError for a method without a network, and for a network without a method."""
    if model is None and name in METHODS:
        raise InputError(f"--defense {name} is a method; name the network it goes around with --model, as a zoo name")
    if model is not None and name not in METHODS:
        raise InputError(f"--defense {name!r} is no method to put around --model; {suggestion(name, METHODS)}")


def open_named(
    ref: DefenseRef, threat: Threat | None, probe: DatasetProbe = lambda: ((), None)
) -> tuple[Any, Card | ClassifierInfo, str]:
    """A defense built for ``threat``, or for the threat of its card; its card; and its name in results.

    Somebody else's classifier takes the size of the images that ``probe`` looks at, or its own input size without any.
    """
    if ref.model is not None and is_adapter(ref.model) and not Path(ref.model).is_dir():
        check_method(ref.name, ref.model)
        if threat is None:
            raise InputError(f"--model {ref.model} has no patch of its own; give --patch")
        network = open_model(ref.model)
        sizes, classes = probe()
        size = attacked_image_size(network, sizes)
        if isinstance(threat, PatchThreat):
            threat.locations(size)
        defense, info = wrap_classifier(network, ref.name, threat, ref.settings, size, classes)
        return defense, info, f"{ref.name}:{network.name}"
    if ref.model is None:
        check_method(ref.name, None)
    folder = locate(ref.name) if ref.model is None else locate_model(ref.model)
    if threat is not None:
        check_threat(threat, read_card(folder))
    defense, card = open_defense(ref.name, ref.model, threat, ref.settings)
    return defense, card, folder.name if ref.model is None else f"{ref.name}:{folder.name}"


def open_certified(
    ref: DefenseRef, threat: Threat, probe: DatasetProbe = lambda: ((), None)
) -> tuple[Defense, Card | ClassifierInfo, str]:
    """Open a certified defense as ``open_named`` does. InputError for an empirical defense, which proves nothing."""
    defense, card, name = open_named(ref, threat, probe)
    if not isinstance(defense, Defense):
        raise InputError(f"{name} is an empirical defense, it certifies nothing; attack it: certipatch attack")
    return defense, card, name


def attacked_image_size(network: Adapted, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(H, W) of the images that the attacker paints, from the sizes of the given images.

    Images of one size stay unchanged if the network reads any size, or if they are no larger than its input: the network
    then resizes them itself, after the attack. Other images are resized to the network's input size before the attack.
    """
    reads = network.image_size
    one = sizes[0] if len(set(sizes)) == 1 else None
    if one is not None and (reads is None or (one[0] <= reads[0] and one[1] <= reads[1])):
        return one
    if reads is None:
        some = " and ".join(f"{h}x{w}" for h, w in sorted(set(sizes))[:2])
        raise InputError(
            f"{network.name} reads pictures of any size, but these are {some or 'unknown'}: give pictures of one size, or "
            "the model an attribute image_size"
        )
    return reads


def wrap_classifier(
    network: Adapted,
    method: str,
    threat: Threat,
    changes: dict[str, Any] | None,
    image_size: tuple[int, int],
    classes: tuple[str, ...] | None = None,
) -> tuple[Any, ClassifierInfo]:
    """The defense ``method`` around a classifier, and the facts about it. The first images check the model.

    Args:
        network: the classifier.
        method: a defense of networks that read whole images.
        threat: the threat of defenses whose predictions depend on the patch.
        changes: settings of the defense that differ from its defaults.
        image_size: (H, W) of the images that the attacker paints.
        classes: names of the images' classes. A network that knows them among others predicts only them; a network
            without names takes them as its names.

    Errors: InputError for another method, and for unknown settings.
    """
    if not METHODS[method].reads_whole_images:
        known = names_with("reads_whole_images")
        raise InputError(f"{method} needs a network of views or local evidence; around {network.name} use {known}")
    settings_class = METHODS[method].settings_class
    with validated(f"{method} around {network.name}", settings_class.model_fields):
        settings = settings_class.model_validate(changes or {}).model_dump(mode="json")
    channels = network.preprocessing.channels
    with opening(f"{network.name}, given pictures of {channels}x{image_size[0]}x{image_size[1]} values,"):
        names = network.class_names(channels, image_size)
    if classes is not None:
        unnamed = len(names) == len(classes) and network.classes is None
        if unnamed or (len(names) > len(classes) and network.only(classes)):
            names = classes
    if len(names) < 2:
        raise InputError(f"{network.name} knows {len(names)} class; a certificate needs at least two")
    resize = network.image_size is not None
    defense = build_defense(method, network, settings, threat)
    return defense, ClassifierInfo(network.name, image_size, channels, names, network.identity, resize)


def check_threat(threat: Threat, card: Card | ClassifierInfo) -> None:
    """InputError unless the threat fits the images that the defense reads."""
    if isinstance(threat, PatchThreat):
        threat.locations(card.image_size)
    elif threat.pixels > card.image_size[0] * card.image_size[1]:
        raise InputError(f"{threat} are more than a picture of {card.image_size[0]}x{card.image_size[1]} pixels has")


def check_shape(shape: tuple[int, ...], card: Card | ClassifierInfo, name: str) -> None:
    """InputError unless the card's network reads pixels (H, W, C) of this shape."""
    height, width, channels = shape
    if (height, width) != card.image_size:
        wanted = f"{card.image_size[0]}x{card.image_size[1]}"
        raise InputError(f"{name} is {height}x{width} pixels, but {card.name} reads {wanted}; crop or resize it first")
    if channels != card.channels:
        kinds = {1: "greyscale", 3: "RGB"}
        have, want = (kinds.get(n, f"{n} channels") for n in (channels, card.channels))
        raise InputError(f"{name} is {have}, but {card.name} reads {want}; convert it first")
