"""A method around somebody else's classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from pydantic import ValidationError

from certipatch.defenses.methods import BUILT_FOR_A_PATCH, METHODS, SETTINGS, WHOLE
from certipatch.errors import InputError, problem
from certipatch.models.adapters import Adapted
from certipatch.models.adapters.sources import opening
from certipatch.threats import PatchThreat, Threat


@final
@dataclass(frozen=True)
class Sheet:
    """What is known of a classifier that has no card."""

    name: str
    image_size: tuple[int, int]
    """(H, W) of the pictures that the attacker paints."""
    channels: int
    classes: tuple[str, ...]
    sha256: str
    """Of its weights and preprocessing, or of its file; not of its code."""
    resize: bool
    """Pictures of another size are resized and centre-cropped first; the attacker paints on what comes out."""
    seed: int = 0


def frame(network: Adapted, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(H, W) of the pictures that the attacker paints, from the sizes of those that there are.

    Pictures of one size stay as they are where the network reads any, or where they are no larger than what it reads:
    the resize to that is the network's own, after the attacker. Others become as large as what it reads, before him.
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


def around(
    network: Adapted,
    method: str,
    threat: Threat,
    changes: dict[str, Any] | None,
    image_size: tuple[int, int],
    classes: tuple[str, ...] | None = None,
) -> tuple[Any, Sheet]:
    """The defense ``method`` around a classifier, and what is known of it. The first pictures check the model.

    Args:
        network: the classifier.
        method: a defense of networks that read whole pictures.
        threat: what defenses whose answers depend on the patch are built for.
        changes: settings of the defense that differ from its defaults.
        image_size: (H, W) of the pictures that the attacker paints.
        classes: names of the pictures' classes. Where the network knows them and others too, it answers with them alone;
            where it has no names they are its names.

    Errors: InputError for another method, and for settings that it has not.
    """
    if method not in WHOLE:
        raise InputError(
            f"{method} needs a network of views or local evidence; around {network.name} use {', '.join(WHOLE)}"
        )
    try:
        settings = SETTINGS[method].model_validate(changes or {}).model_dump(mode="json")
    except ValidationError as error:
        place, words = problem(error, SETTINGS[method].model_fields)
        raise InputError(f"{method} around {network.name}: {place}{': ' * bool(place)}{words}") from None
    channels = network.preprocessing.channels
    with opening(f"{network.name}, given pictures of {channels}x{image_size[0]}x{image_size[1]} values,"):
        names = network.class_names(channels, image_size)
    if classes is not None:
        unnamed = len(names) == len(classes) and network.classes is None
        if unnamed or (len(names) > len(classes) and network.only(classes)):
            names = classes
    if method in BUILT_FOR_A_PATCH:
        patch = settings.pop("patch")
        settings["threat"] = threat if isinstance(threat, PatchThreat) else PatchThreat(patch)
    if len(names) < 2:
        raise InputError(f"{network.name} knows {len(names)} class; a certificate needs at least two")
    sheet = Sheet(network.name, image_size, channels, names, network.identity, network.image_size is not None)
    return METHODS[method](network, **settings), sheet
