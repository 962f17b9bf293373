"""Attacked accuracy in a table: every cell is an attack run in a folder of its own, which resumes.

``target`` opens a model, or a method around its network; ``attacked`` attacks it and gives the three numbers.
``certipatch report`` makes the page of each run.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from certipatch import attacks
from certipatch.data import Pictures, load
from certipatch.defenses.undefended import Undefended
from certipatch.errors import InputError
from certipatch.inference import batch_size_for
from certipatch.models.adapters import is_adapter, open_model
from certipatch.plumbing import devices, resources
from certipatch.reproduce.context import ReproductionContext, missing
from certipatch.reproduce.schema import ModelSlot, Strength
from certipatch.reproduce.table import NotRun, Share
from certipatch.runs.attack import AttackJob
from certipatch.runs.attack import attack as run_attack
from certipatch.runs.folder import IGNORED_KEYS, yaml_round_trip
from certipatch.runs.records import read_evidence, read_records
from certipatch.saved import Card, open_defense
from certipatch.saved.open import ClassifierInfo, attacked_image_size, wrap_classifier
from certipatch.threats import PatchThreat, Threat

UNCERTIFIED = "-"
"""The text in place of a certified accuracy, if a defense proves nothing."""


@final
@dataclass(frozen=True, eq=False)
class Target:
    """A defense to attack: any object with ``predict``; if it has ``certify``, its certificates are attacked too."""

    defense: Any
    card: Card | ClassifierInfo
    name: str
    """The name in ``certipatch attack``: a model, or METHOD:MODEL."""
    opened: str
    """The name or folder that opens the model."""


@final
@dataclass(frozen=True, eq=False)
class AttackResult:
    """The three numbers of a finished attack run, and the run."""

    clean: Share
    attacked: Share
    certified: Share | str
    """The certified share, or ``UNCERTIFIED`` if nothing is proven."""
    target: Target
    pictures: Pictures
    folder: Path
    summary: dict[str, Any]

    @property
    def cells(self) -> list[Share | str]:
        """Clean, attacked and certified accuracy."""
        return [self.clean, self.attacked, self.certified]

    def images(self, numbers: Sequence[int]) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"]]:
        """Some clean images and their attacked versions; an image without an attack stays unchanged.

        Errors: InputError if an attack changed more pixels than are stored.
        """
        clean = self.pictures.images(list(numbers))
        changed, result = read_evidence(self.folder, ["pixels", "values"]), clean.flatten(2).clone()
        attacked = read_records(self.folder)["attacked"]
        for row, number in enumerate(numbers):
            pixels, values = (changed[name][number].as_py() for name in ("pixels", "values"))
            if pixels is not None and values is not None:
                where = torch.from_numpy(np.frombuffer(pixels, "<i4").copy()).long()
                result[row, :, where] = torch.from_numpy(np.frombuffer(values, "<f4").copy()).view(clean.shape[1], -1)
            elif attacked[number].as_py():
                raise InputError(f"{self.folder}: attacks of so many pixels are not stored")
        return clean, result.view_as(clean)


def target(
    context: ReproductionContext, slot: ModelSlot, threat: Threat | None, method: str | None = None, **settings: Any
) -> Target | NotRun:
    """The trained model of a role, or ``method`` around its network, built for the threat.

    ``NotRun`` if there is no such model, or if its package is not installed.
    """
    name, built_for = context.models.get(slot.role, slot.name), threat or PatchThreat(1)
    if is_adapter(name) and not Path(name).is_dir():
        try:
            network = open_model(name)
        except InputError as error:
            return NotRun(f"not run ({error})")
        some = load(context.data, context.split, limit=1)
        size = attacked_image_size(network, [some.pixels([0]).shape[1:3]])
        method = method or Undefended.name
        defense, info = wrap_classifier(network, method, built_for, settings, size, some.class_names)
        return Target(defense, info, f"{method}:{network.name}", name)
    folder = context.folder(slot)
    if folder is None:
        return missing(slot)
    opened = folder.name if resources.find("zoo", folder.name) == folder else str(folder)
    if method is None:
        return Target(*open_defense(str(folder), None, built_for, settings), folder.name, opened)
    return Target(*open_defense(method, str(folder), built_for, settings), f"{method}:{folder.name}", opened)


def pictures_of(context: ReproductionContext, victim: Target) -> Pictures:
    """The context's images. InputError if the target does not read images of their shape."""
    pictures = context.pictures(victim.card)
    height, width, channels = pictures.pixels([0]).shape[1:]
    if ((height, width), channels) != (victim.card.image_size, victim.card.channels):
        wanted = f"{victim.card.image_size[0]}x{victim.card.image_size[1]} pixels of {victim.card.channels} channels"
        raise InputError(f"{victim.name} reads {wanted}, {pictures.name} has {height}x{width} of {channels}")
    return pictures


def attacked(context: ReproductionContext, victim: Target, threat: Threat | None, strength: Strength) -> AttackResult:
    """Attack every image, or read the results of an earlier equal run. A broken certificate goes to ``context.broken``.

    Args:
        threat: None for the L∞ attack of ``strength.epsilon``.

    Errors: InputError if attack, threat and defense do not fit each other, or if the images do not fit the model.
    """
    strength, attack = strength.limited_to(context.starts, context.steps), attacks.find(strength.attack)
    device, pictures = devices.default(), pictures_of(context, victim)
    rows = min(256, batch_size_for(math.prod(victim.card.image_size)))
    job = AttackJob(
        defense=victim.defense.to(device),
        defense_name=victim.name,
        model_sha256=victim.card.sha256,
        image_size=victim.card.image_size,
        class_names=victim.card.classes,
        pictures=pictures,
        threat=threat,
        attack=attack,
        starts=strength.rounds[0],
        steps=strength.rounds[1],
        step=strength.step,
        search=strength.search,
        epsilon=strength.epsilon,
        adaptive=strength.adaptive,
        device=device,
        opened=victim.opened,
        part=max(5, min(50, rows // 4)),
        batch=rows,
    )
    config = yaml_round_trip(job.config(context.fingerprint(victim.card)))
    identity = {key: value for key, value in config.items() if key not in IGNORED_KEYS | {"versions", "dataset_note"}}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = context.out / "attacks" / f"{victim.name.replace(':', '-').replace('/', '-')}-{attack.name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    about = f"{victim.name}, {attack.name}{'' if strength.adaptive else ' plain'}"
    summary = run_attack(job, folder, lambda done, total, text: context.progress(done, total, f"{about}: {text}"))
    if summary["broken_certificates"]:
        context.broken.append(
            f"{summary['broken_certificates']} certificates of {victim.name} broke: {folder / 'broken'}"
        )
    n = summary["images"]
    clean, standing, certified = (
        Share(round(n * summary[f"{kind}_accuracy"]), n) for kind in ("clean", "attacked", "certified")
    )
    proven = threat is not None and not summary["theorem"].startswith("none")
    return AttackResult(clean, standing, certified if proven else UNCERTIFIED, victim, pictures, folder, summary)


def outcome(
    context: ReproductionContext,
    slot: ModelSlot,
    threat: Threat | None,
    strength: Strength,
    method: str | None = None,
    **settings: Any,
) -> AttackResult | NotRun:
    """Open a ``target`` and attack it."""
    victim = target(context, slot, threat, method, **settings)
    return victim if isinstance(victim, NotRun) else attacked(context, victim, threat, strength)
