"""Defenses by name: each a small composition of views, network and rule."""

import difflib
from pathlib import Path
from typing import Any

from certipatch.defenses.bagcert import BagCert
from certipatch.defenses.base import Defense, Evidence
from certipatch.defenses.card import Card, load_folder
from certipatch.defenses.card import read as read_card
from certipatch.defenses.clipped_bagnet import ClippedBagNet
from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
from certipatch.defenses.digital_watermarking import DigitalWatermarking
from certipatch.defenses.interval_bounds import IntervalBounds
from certipatch.defenses.local_gradients_smoothing import LocalGradientsSmoothing
from certipatch.defenses.methods import METHODS
from certipatch.defenses.minority_reports import MinorityReports
from certipatch.defenses.patchcleanser import PatchCleanser
from certipatch.defenses.patchcure import PatchCURE
from certipatch.defenses.patchguard import PatchGuard
from certipatch.defenses.patchguard_plus_plus import PatchGuardPlusPlus
from certipatch.defenses.randomized_ablation import RandomizedAblation
from certipatch.defenses.undefended import Undefended
from certipatch.errors import InputError
from certipatch.plumbing import resources
from certipatch.threats import Threat

__all__ = [
    "METHODS",
    "BagCert",
    "Card",
    "ClippedBagNet",
    "Defense",
    "DerandomizedSmoothing",
    "DigitalWatermarking",
    "Evidence",
    "IntervalBounds",
    "LocalGradientsSmoothing",
    "MinorityReports",
    "PatchCURE",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "RandomizedAblation",
    "Undefended",
    "load",
    "locate",
    "open_defense",
    "read_card",
    "zoo",
]


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
        raise InputError(f"there is no folder {name}; give a zoo model (certipatch list models) or what train wrote")
    known = resources.resource_names("zoo", "*/card.json")
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}, or the folder of a training"
    )
    raise InputError(f"unknown defense {name!r}; {hint}")


def open_defense(
    name: str, model: str | None = None, threat: Threat | None = None, changes: dict[str, Any] | None = None
) -> tuple[Defense, Card]:
    """A trained defense and its card, from the zoo or a folder.

    Args:
        name: a zoo name or folder; with ``model`` a method, which is put around that model's network.
        model: a zoo name or folder.
        threat: what defenses whose answers depend on the patch are built for; None for the one in their card.
        changes: settings of the defense that differ from its card's, or from the method's defaults.
    """
    if model is None:
        if name in METHODS:
            raise InputError(
                f"--defense {name} is a method; name the network it goes around with --model, as a zoo name"
            )
        return load_folder(locate(name), threat, None, changes)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"methods are {', '.join(METHODS)}"
        raise InputError(f"--defense {name!r} is no method to put around --model; {hint}")
    return load_folder(locate(model), threat, name, changes)


def load(name: str, threat: Threat | None = None) -> Defense:
    """A trained defense, from the zoo or a folder, ready to ``predict`` and ``certify``.

    ``threat`` is the patch that PatchGuard and its kin are built for; without, the one that their card names.
    """
    return open_defense(name, threat=threat)[0]
