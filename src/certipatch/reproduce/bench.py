"""What every table needs: pictures, trained models, and the logits of all views, computed once and kept."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from certipatch import devices, resources
from certipatch import evidence as ev
from certipatch.data import Pictures, load
from certipatch.defenses import Card, Evidence, locate, open_defense, read_card
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.card import write_tensors
from certipatch.errors import InputError
from certipatch.reproduce.table import NotRun, Share
from certipatch.threats import PatchThreat

PART = 250
Progress = Callable[[int, int, str], None]


@final
@dataclass(frozen=True)
class Wanted:
    """A model that a table looks at: its role in ``--model ROLE=NAME``, its usual name, and what its training takes."""

    role: str
    name: str
    hours: float | None = None
    """On two CPU cores, by its recipe; None where there is no recipe."""

    def missing(self) -> NotRun:
        """What stands in the table where there is no such model."""
        hours = "" if self.hours is None else f", about {self.hours:g} h of training"
        return NotRun(f"not run{hours} ({self.name})")


@final
@dataclass(frozen=True, eq=False)
class Outcomes:
    """Which of N pictures a defense answers right, and which of these it certifies."""

    right: Bool[Tensor, " N"]
    certified: Bool[Tensor, " N"]

    def shares(self, of: slice = slice(None)) -> tuple[Share, Share]:
        """Clean and certified accuracy, of all pictures or some."""
        right, certified = self.right[of], self.certified[of]
        return Share(int(right.sum()), len(right)), Share(int(certified.sum()), len(right))


@final
class Bench:
    """Pictures and models of one table, and counts from them.

    Args:
        out: folder for logits and finished counts; what is there is used again.
        data, split, limit: the pictures, as for ``evaluate``.
        models: names or folders by role, instead of the usual ones.
    """

    def __init__(
        self,
        out: Path,
        data: str,
        split: str | None = None,
        limit: int | None = None,
        models: dict[str, str] | None = None,
        progress: Progress = lambda done, total, text: None,
    ):
        self.out, self.data, self.split, self.limit = out, data, split, limit
        self.models, self.progress = models or {}, progress
        self._pictures: dict[tuple[int, int] | None, Pictures] = {}

    def folder(self, wanted: Wanted) -> Path | None:
        """Where the model is: as ``--model`` says, in the zoo, or in ``models/``; None where it is not."""
        if wanted.role in self.models:
            return locate(self.models[wanted.role])
        trained = Path("models") / wanted.name
        if (trained / "card.json").exists():
            return trained
        return locate(wanted.name) if resources.find("zoo", wanted.name) else None

    def pictures(self, card: Card) -> Pictures:
        """The pictures, in the size that the model reads where it resizes."""
        size = card.image_size if card.resize else None
        if size not in self._pictures:
            self._pictures[size] = load(self.data, self.split, size=size, limit=self.limit)
        found = self._pictures[size]
        if len(found.class_names) != len(card.classes):
            raise InputError(f"{found.name} has {len(found.class_names)} classes, but {card.name} {len(card.classes)}")
        return found

    def describe(self) -> list[str]:
        """What was looked at: data, n, and models."""
        notes = []
        for found in self._pictures.values():
            note = f" ({found.note})" if found.note else ""
            notes.append(
                f"ours: {len(found)} pictures of {found.name} {found.split}{note}, ± half of Wilson's 95 % interval"
            )
        return notes

    def logits(self, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (B, V, K) of all views and targets (B,), part by part."""
        card = read_card(folder)
        pictures = self.pictures(card)
        key = hashlib.sha256(f"{card.sha256}/{pictures.fingerprint()}".encode()).hexdigest()[:16]
        kept = self.out / "logits" / key
        kept.mkdir(parents=True, exist_ok=True)
        device = devices.default()
        defense = None
        for first in range(0, len(pictures), PART):
            indices = range(first, min(first + PART, len(pictures)))
            path = kept / f"part-{first:08d}.safetensors"
            kept_part = _read(path, "logits")
            found = None if kept_part is None else kept_part[0]
            if found is None or len(found) != len(indices):
                defense = defense or _views_of(open_defense(str(folder))[0], card)
                images = pictures.images(indices)
                if tuple(images.shape[2:]) != card.image_size:
                    height, width = card.image_size
                    raise InputError(f"{card.name} reads {height}x{width} pixels, {pictures.name} has others")
                defense.to(device)
                views = defense.views_of(card.image_size)
                found = ev.logits(defense.model, views, images.to(device), batch_size=defense.batch_size).float().cpu()
                write_tensors(path, {"logits": found})
            self.progress(indices[-1] + 1, len(pictures), f"logits of {card.name}")
            yield found, torch.from_numpy(pictures.labels[indices.start : indices.stop])

    def defense(self, folder: Path, method: str, threat: PatchThreat, **settings: Any) -> ViewDefense:
        """A method around the model's network."""
        return _views_of(open_defense(method, str(folder), threat, settings)[0], read_card(folder))

    def outcomes(self, wanted: Wanted, method: str, patch: int | str, **settings: Any) -> Outcomes | NotRun:
        """What a method around a model's network makes of every picture, against one square patch anywhere."""
        folder = self.folder(wanted)
        if folder is None:
            return wanted.missing()
        card = read_card(folder)
        pictures = self.pictures(card)
        asked = json.dumps([card.sha256, pictures.fingerprint(), method, patch, settings], sort_keys=True)
        path = self.out / "outcomes" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.safetensors"
        kept = _read(path, "right", "certified")
        if kept is None or any(tensor.shape != (len(pictures),) for tensor in kept):
            defense = self.defense(folder, method, threat := PatchThreat(patch), **settings)
            right, certified = [], []
            for logits, targets in self.logits(folder):
                found = defense.certificate(evidence_of(defense, logits, card.image_size), threat)
                hit = found.label == targets
                right.append(hit if found.alarm is None else hit & ~found.alarm)
                certified.append(right[-1] & found.certified)
            kept = [torch.cat(right), torch.cat(certified)]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"right": kept[0], "certified": kept[1]}, {"asked": asked})
        return Outcomes(*kept)


def evidence_of(defense: ViewDefense, logits: Tensor, image_size: tuple[int, int]) -> Evidence:
    """What ``defense`` makes of logits of all views."""
    parameter = next(defense.model.parameters())
    probe = torch.zeros((1, _channels(defense), *image_size), dtype=torch.float32, device=parameter.device)
    values, unsure, error = defense.values(logits, defense.tolerance(probe))
    return Evidence(values, unsure, image_size, error)


def _channels(defense: ViewDefense) -> int:
    return next(iter(defense._tolerance))[0]  # the model check has measured pictures of this shape


def _views_of(defense: Any, card: Card) -> ViewDefense:
    if not isinstance(defense, ViewDefense):
        raise InputError(f"{card.name} looks at whole pictures; this table needs the evidence of views")
    return defense


def _read(path: Path, *names: str) -> list[Tensor] | None:
    """The tensors of a file; None where it is missing or damaged."""
    try:
        found = load_file(path)
        return [found[name] for name in names]
    except (OSError, KeyError, SafetensorError):
        return None
