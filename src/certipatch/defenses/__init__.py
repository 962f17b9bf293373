"""Defenses by name: each a small composition of views, network and rule."""

import difflib
from pathlib import Path

from certipatch import resources
from certipatch.defenses.base import Defense, Evidence
from certipatch.defenses.card import Card, load_folder, read
from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
from certipatch.errors import InputError

__all__ = ["METHODS", "Card", "Defense", "DerandomizedSmoothing", "Evidence", "load", "locate", "open_defense", "zoo"]

METHODS: dict[str, type[Defense]] = {DerandomizedSmoothing.name: DerandomizedSmoothing}


def zoo() -> dict[str, Card]:
    """The shipped models by name."""
    names = resources.names("zoo", "*/card.json")
    return {name: read(folder) for name in names if (folder := resources.find("zoo", name))}


def locate(name: str) -> Path:
    """The folder of a defense: a zoo name, or a folder that ``train`` wrote. InputError with the nearest name."""
    if (folder := resources.find("zoo", name)) is not None and (folder / "card.json").exists():
        return folder
    if Path(name).is_dir():
        return Path(name)
    known = resources.names("zoo", "*/card.json")
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}, or the folder of a training"
    )
    raise InputError(f"unknown defense {name!r}; {hint}")


def open_defense(name: str) -> tuple[Defense, Card]:
    """A trained defense and its card, from the zoo or a folder; its model is checked."""
    return load_folder(locate(name))


def load(name: str) -> Defense:
    """A trained defense, from the zoo or a folder, ready to ``predict`` and ``certify``."""
    return open_defense(name)[0]
