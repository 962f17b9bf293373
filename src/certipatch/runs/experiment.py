"""Opens the parts of a run: the defense, the images, and the place of this process among the workers."""

import sys
from dataclasses import dataclass
from typing import Any, final

import torch

from certipatch.data import Pictures, load
from certipatch.errors import InputError
from certipatch.plumbing import devices, distributed
from certipatch.plumbing.distributed import Workers
from certipatch.saved import Card, ClassifierInfo, DefenseRef
from certipatch.saved.open import check_shape, open_certified, open_named
from certipatch.threats import Threat

SIZE_SAMPLE = 16  # images per dataset for a comparison of sizes, before a classifier reads them


@final
@dataclass(frozen=True)
class DataRef:
    """Images as the user names them."""

    name: str
    """A dataset name, a Hub dataset, or a folder."""
    split: str | None = None
    limit: int | None = None
    """Only the first N."""


@final
@dataclass(frozen=True)
class Experiment:
    """A defense, ready to run on images."""

    defense: Any
    card: Card | ClassifierInfo
    name: str
    """The defense's name in results."""
    opened: str | None
    """The user's name for the model."""
    pictures: Pictures
    device: torch.device
    workers: Workers

    def job(self) -> dict[str, Any]:
        """The fields that a ``Job`` and an ``AttackJob`` have in common."""
        return {
            "defense": self.defense,
            "defense_name": self.name,
            "model_sha256": self.card.sha256,
            "image_size": self.card.image_size,
            "class_names": self.card.classes,
            "pictures": self.pictures,
            "device": self.device,
            "opened": self.opened,
        }


def open_experiment(defense: DefenseRef, data: DataRef, threat: Threat, certified: bool) -> Experiment:
    """Open a defense and the images that it reads, on the device of this worker.

    Args:
        certified: refuse an empirical defense.

    Errors: InputError if one of the two cannot be opened, or if they do not fit each other.
    """
    device, workers = devices.worker()
    opening = open_certified if certified else open_named
    opened, card, name = opening(defense, threat, lambda: probe_dataset(data))
    size = card.image_size if card.resize else None
    pictures = load(data.name, data.split, size=size, channels=card.channels, limit=data.limit)
    pictures = align_classes(pictures, card.classes, name)
    check_shape(pictures.pixels([0])[0].shape, card, pictures.name)
    opened.to(device)
    return Experiment(opened, card, name, defense.network, pictures, device, workers)


def probe_dataset(data: DataRef) -> tuple[list[tuple[int, int]], tuple[str, ...] | None]:
    """The sizes of some of a dataset's images, the first and the last among them, and the names of its classes."""
    pictures = load(data.name, data.split)
    sample = sorted({round(i * (len(pictures) - 1) / (SIZE_SAMPLE - 1)) for i in range(SIZE_SAMPLE)})
    return [pictures.pixels([i])[0].shape[:2] for i in sample], pictures.class_names


def warn_if_trained_on(pictures: Pictures, card: Card | ClassifierInfo, name: str) -> None:
    """Print a note on stderr if images are those that a defense was trained on."""
    trained = card.data if isinstance(card, Card) else {}
    if (trained.get("name"), trained.get("split")) == (pictures.name, pictures.split) and distributed.rank() == 0:
        print(
            f"note: {name} was trained on {pictures.name} {pictures.split}; accuracy on its own training data is not "
            "meaningful; choose another --split",
            file=sys.stderr,
        )


def align_classes(pictures: Pictures, classes: tuple[str, ...], name: str) -> Pictures:
    """Images with their classes numbered as a defense numbers them: by their names, else unchanged.

    InputError if the numbers of classes differ; a note on stderr if names differ.
    """
    if len(pictures.class_names) != len(classes):
        raise InputError(f"{pictures.name} has {len(pictures.class_names)} classes, but {name} knows {len(classes)}")
    pictures = pictures.in_order_of(classes)
    pairs = zip(pictures.class_names, classes, strict=True)
    differing = [(theirs, ours) for theirs, ours in pairs if theirs.casefold() != ours.casefold()]
    known = {name.casefold() for name in classes}
    alone = [one for one, _ in differing if one.casefold() not in known]
    elsewhere = {one.casefold() for one, _ in differing} & {other.casefold() for _, other in differing}
    if elsewhere:
        raise InputError(
            f"{pictures.name} and {name} both know {min(elsewhere)!r}, but number it differently, and {name} does not know "
            f"{', '.join(map(repr, alone[:3]))}; give the classes the same names, one of {', '.join(map(repr, classes[:8]))}"
        )
    if differing and distributed.rank() == 0:
        theirs, ours = differing[0]
        print(
            f"note: {len(differing)} classes are called otherwise ({theirs!r} in {pictures.name}, {ours!r} in {name}, …); "
            "they are matched by number",
            file=sys.stderr,
        )
    return pictures
