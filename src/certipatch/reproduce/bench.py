"""What every table needs: pictures, trained models, and the logits of all views, computed once and kept."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from certipatch import evidence as ev
from certipatch.data import Pictures, load
from certipatch.data.loading import DATA_VARIABLE
from certipatch.defenses import Defense, Evidence, RandomizedAblation
from certipatch.defenses.base import ViewDefense
from certipatch.errors import InputError
from certipatch.plumbing import devices, resources
from certipatch.reproduce.table import NotRun, Share
from certipatch.saved import Card, locate, open_defense, read_card
from certipatch.saved.open import ClassifierInfo
from certipatch.saved.weights import write_tensors
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
    work: str = "training"
    """What takes so long."""

    def missing(self) -> NotRun:
        """What stands in the table where there is no such model."""
        hours = "" if self.hours is None else f", about {self.hours:g} h of {self.work}"
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
@dataclass(frozen=True, eq=False)
class Reach:
    """Which of N pictures a defense answers right, and the side of the largest square patch that it certifies."""

    right: Bool[Tensor, " N"]
    largest: Int64[Tensor, " N"]

    def outcomes(self, side: int) -> Outcomes:
        """Against a square patch anywhere: certificates nest."""
        return Outcomes(self.right, self.right & (self.largest >= side))


@final
class Bench:
    """Pictures and models of one table, and counts from them.

    Args:
        out: folder for logits and finished counts; what is there is used again.
        data, split, limit: the pictures, as for ``evaluate``.
        models: names or folders by role, instead of the usual ones.
        starts, steps: of attacks, instead of the table's.
    """

    def __init__(
        self,
        out: Path,
        data: str,
        split: str | None = None,
        limit: int | None = None,
        models: dict[str, str] | None = None,
        progress: Progress = lambda done, total, text: None,
        starts: int | None = None,
        steps: int | None = None,
    ):
        self.out, self.data, self.split, self.limit = out, data, split, limit
        self.models, self.progress = models or {}, progress
        self.starts, self.steps = starts, steps
        self.broken: list[str] = []
        """What attacks broke that a theorem forbids."""
        self._pictures: dict[tuple[int, int] | None, Pictures] = {}
        self._fingerprint: str | None = None

    def beside(self, data: str) -> "Bench":
        """The same for other data, with the usual models."""
        return self._like(data, self.split, self.limit, {})

    def first(self, number: int) -> "Bench":
        """The same on the first pictures of the split, unless the user set a limit."""
        return self if self.limit is not None else self._like(self.data, self.split, number, self.models)

    def _like(self, data: str, split: str | None, limit: int | None, models: dict[str, str]) -> "Bench":
        found = Bench(self.out, data, split, limit, models, self.progress, self.starts, self.steps)
        found.broken = self.broken
        return found

    def folder(self, wanted: Wanted) -> Path | None:
        """Where the model is: as ``--model`` says, in the zoo, or in ``models/``; None where it is not."""
        if wanted.role in self.models:
            return locate(self.models[wanted.role])
        trained = Path("models") / wanted.name
        if (trained / "card.json").exists():
            return trained
        return locate(wanted.name) if resources.find("zoo", wanted.name) else None

    def pictures(self, card: Card | ClassifierInfo) -> Pictures:
        """The pictures, in the size that the model reads where it resizes."""
        size = card.image_size if card.resize else None
        if size not in self._pictures:
            self._pictures[size] = load(self.data, self.split, size=size, limit=self.limit)
        found = self._pictures[size]
        if len(found.class_names) != len(card.classes):
            raise InputError(
                f"{found.name} has {len(found.class_names)} classes, but {card.name} {len(card.classes)}; name a network "
                "that was trained on these data with --model ROLE=FOLDER"
            )
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

    def fingerprint(self, card: Card | ClassifierInfo) -> str:
        """Of the pictures."""
        self._fingerprint = self._fingerprint or self.pictures(card).fingerprint()
        return self._fingerprint

    def logits(self, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (B, V, K) of all views and targets (B,), part by part."""
        card = read_card(folder)
        opened: list[ViewDefense] = []

        def ask(images: Float[Tensor, "B C H W"]) -> Tensor:
            if not opened:
                opened.append(_views_of(open_defense(str(folder))[0], card).to(images.device))
            defense = opened[0]
            views = defense.views_of(card.image_size)
            return ev.logits(defense.model, views, images, batch_size=defense.batch_size).float()

        return self._parts("logits", card, _identity(card), ask)

    def counts(self, card: Card, defense: RandomizedAblation) -> Iterator[tuple[Tensor, Tensor]]:
        """Votes (B, 2, K) in the two samples of randomized ablation and targets (B,), part by part."""

        def ask(images: Float[Tensor, "B C H W"]) -> Tensor:
            return defense.to(images.device).evidence(images).values

        return self._parts("counts", card, f"{_identity(card)}/{defense.settings()}", ask)

    def _parts(
        self, kind: str, card: Card, asked: str, ask: Callable[[Float[Tensor, "B C H W"]], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``ask`` says of all pictures, and their targets, a few at a time; what is kept is not asked again."""
        pictures = self.pictures(card)
        key = hashlib.sha256(f"{asked}/{self.fingerprint(card)}".encode()).hexdigest()[:16]
        kept = self.out / kind / key
        device = devices.default()
        for first in range(0, len(pictures), PART):
            indices = range(first, min(first + PART, len(pictures)))
            path = kept / f"part-{first:08d}.safetensors"
            kept_part = _read(path, kind)
            found = None if kept_part is None else kept_part[0]
            if found is None or len(found) != len(indices):
                images = pictures.images(indices)
                if tuple(images.shape[2:]) != card.image_size:
                    height, width = card.image_size
                    raise InputError(f"{card.name} reads {height}x{width} pixels, {pictures.name} has others")
                found = ask(images.to(device)).cpu()
                _keep(path, {kind: found})
            self.progress(indices[-1] + 1, len(pictures), f"{kind} of {card.name}")
            yield found, torch.from_numpy(pictures.labels[indices.start : indices.stop])

    def defense(self, folder: Path, method: str, threat: PatchThreat, **settings: Any) -> ViewDefense:
        """A method around the model's network."""
        return _views_of(open_defense(method, str(folder), threat, settings)[0], read_card(folder))

    def probe(self, card: Card) -> Float[Tensor, "1 C H W"]:
        """The first picture, on which rounding is measured."""
        return self.pictures(card).images(range(1))

    def evidence(
        self, folder: Path, method: str, threat: PatchThreat, **settings: Any
    ) -> Iterator[tuple[Defense, Evidence, Tensor]]:
        """A method around the model's network, its evidence of the pictures, and their targets, part by part."""
        card = read_card(folder)
        if method == RandomizedAblation.name:
            sampled = open_defense(method, str(folder), threat, settings)[0]
            assert isinstance(sampled, RandomizedAblation)
            for counts, targets in self.counts(card, sampled):
                yield sampled, Evidence(counts, None, card.image_size), targets
            return
        defense, probe = self.defense(folder, method, threat, **settings), self.probe(card)
        for logits, targets in self.logits(folder):
            yield defense, evidence_of(defense, logits, probe), targets

    def outcomes(self, wanted: Wanted, method: str, patch: int | str, **settings: Any) -> Outcomes | NotRun:
        """What a method around a model's network makes of every picture, against one square patch anywhere."""
        threat = PatchThreat(patch)

        def judge(defense: Defense, evidence: Evidence, targets: Tensor) -> list[Tensor]:
            found = defense.certificate(evidence, threat)
            right = found.label == targets
            if found.alarm is not None:
                right &= ~found.alarm
            return [right, right & found.certified]

        found = self._judged(wanted, method, threat, settings, str(patch), judge)
        return found if isinstance(found, NotRun) else Outcomes(*found)

    def reach(self, wanted: Wanted, method: str, **settings: Any) -> Reach | NotRun:
        """The largest certified square of every picture, for methods whose answer does not depend on the patch."""

        def judge(defense: Defense, evidence: Evidence, targets: Tensor) -> list[Tensor]:
            largest = defense.largest_patch(evidence)
            assert largest is not None, f"{method} is built for one patch"
            return [defense.label(evidence) == targets, largest]

        found = self._judged(wanted, method, PatchThreat(1), settings, "largest", judge)
        return found if isinstance(found, NotRun) else Reach(*found)

    def _judged(
        self,
        wanted: Wanted,
        method: str,
        threat: PatchThreat,
        settings: dict[str, Any],
        question: str,
        judge: Callable[[Defense, Evidence, Tensor], list[Tensor]],
    ) -> list[Tensor] | NotRun:
        """Two tensors (N,) about all pictures, kept under the question."""
        folder = self.folder(wanted)
        if folder is None:
            return wanted.missing()
        card = read_card(folder)
        number = len(self.pictures(card))
        asked = json.dumps([_identity(card), self.fingerprint(card), method, question, settings], sort_keys=True)
        path = self.out / "outcomes" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.safetensors"
        kept = _read(path, "first", "second")
        if kept is None or any(tensor.shape != (number,) for tensor in kept):
            parts = [judge(*part) for part in self.evidence(folder, method, threat, **settings)]
            kept = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
            _keep(path, {"first": kept[0], "second": kept[1]}, {"asked": asked})
        return kept


def at_hand(data: str) -> bool:
    """Whether the data are in the user's own folder of known datasets: nothing is fetched for a table's other rows."""
    root = os.environ.get(DATA_VARIABLE)
    return bool(root) and (Path(root) / data).is_dir()


def evidence_of(defense: ViewDefense, logits: Tensor, probe: Float[Tensor, "1 C H W"]) -> Evidence:
    """What ``defense`` makes of logits of all views; its rounding is measured on ``probe``."""
    device = next(defense.model.parameters()).device
    values, unsure, error = defense.values(logits, defense.tolerance(probe.to(device)))
    return Evidence(values, unsure, (probe.shape[2], probe.shape[3]), error)


def _identity(card: Card) -> str:
    """All of a card that answers depend on."""
    return json.dumps(card.model_dump(mode="json", include={"sha256", "defense", "settings", "views", "model"}))


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


def _keep(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file, whole or not at all, also where another process writes the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{os.getpid()}")
    write_tensors(own, tensors, metadata)
    own.replace(path)
