"""Images and models of a table, with logits and counts of defenses that are computed once and kept."""

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
from certipatch.defenses import Defense, Evidence
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.interval_bounds import IntervalBounds
from certipatch.defenses.randomized_ablation import RandomizedAblation
from certipatch.errors import InputError
from certipatch.plumbing import devices, resources
from certipatch.reproduce.schema import ModelSlot
from certipatch.reproduce.table import NotRun, Share
from certipatch.saved import Card, locate, open_defense, read_card
from certipatch.saved.open import ClassifierInfo
from certipatch.saved.weights import write_tensors
from certipatch.threats import PatchThreat, Threat
from certipatch.views.render import image_size

PART = 250
Progress = Callable[[int, int, str], None]


@final
@dataclass(frozen=True, eq=False)
class Outcomes:
    """N images: the defense is right or not, and certifies the right class or not."""

    right: Bool[Tensor, " N"]
    certified: Bool[Tensor, " N"]

    def shares(self) -> tuple[Share, Share]:
        """Clean and certified accuracy."""
        return Share(int(self.right.sum()), len(self.right)), Share(int(self.certified.sum()), len(self.right))


@final
@dataclass(frozen=True, eq=False)
class LargestCertified:
    """N images: the defense is right or not, and the side of the largest square patch that it certifies."""

    right: Bool[Tensor, " N"]
    largest: Int64[Tensor, " N"]

    def outcomes(self, side: int) -> Outcomes:
        """The outcomes against a square patch anywhere; certificates nest."""
        return Outcomes(self.right, self.right & (self.largest >= side))


@final
class ReproductionContext:
    """Images and models of one table, and counts from them.

    Args:
        out: folder for logits and finished counts; existing files are used again.
        data, split, limit: the images, as for ``evaluate``.
        models: names or folders by role, instead of the usual ones.
        starts, steps: numbers for the attacks, instead of the table's.
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
        """Certificates broken by an attack; any entry is a bug."""
        self.measured: dict[str, Any] = {}
        """Values by measurement."""
        self._pictures: dict[tuple[int, int] | None, Pictures] = {}
        self._fingerprint: str | None = None

    def for_dataset(self, data: str) -> "ReproductionContext":
        """This context for other data, with the usual models."""
        return self._like(data, self.limit, {})

    def limited_to(self, number: int) -> "ReproductionContext":
        """This context on the first images of the split, unless the user set a limit."""
        return self if self.limit is not None else self._like(self.data, number, self.models)

    def _like(self, data: str, limit: int | None, models: dict[str, str]) -> "ReproductionContext":
        other = ReproductionContext(self.out, data, self.split, limit, models, self.progress, self.starts, self.steps)
        other.broken = self.broken
        return other

    def folder(self, slot: ModelSlot) -> Path | None:
        """The model's folder, by ``--model``, in ``models/`` or in the zoo; None if it is in none.

        Errors: InputError if the model has other views than its role.
        """
        trained = Path("models") / slot.name
        if slot.role in self.models:
            folder = locate(self.models[slot.role])
        elif (trained / "card.json").exists():
            folder = trained
        elif resources.find("zoo", slot.name):
            folder = locate(slot.name)
        else:
            return None
        if slot.views is not None:
            card = read_card(folder)
            views = None if card.views is None else card.views.values()
            if views != slot.views:
                raise InputError(f"{folder}: its views are {views}, but {slot.role} stands for {slot.views}")
        return folder

    def pictures(self, card: Card | ClassifierInfo) -> Pictures:
        """The images, in the model's input size if the model resizes."""
        size = card.image_size if card.resize else None
        if size not in self._pictures:
            self._pictures[size] = load(self.data, self.split, size=size, limit=self.limit)
        pictures = self._pictures[size]
        if len(pictures.class_names) != len(card.classes):
            raise InputError(
                f"{pictures.name} has {len(pictures.class_names)} classes, but {card.name} {len(card.classes)}; name a "
                "network that was trained on these data with --model ROLE=FOLDER"
            )
        return pictures

    def describe(self) -> list[str]:
        """Data and number of images, for notes."""
        notes = []
        for pictures in self._pictures.values():
            note = f" ({pictures.note})" if pictures.note else ""
            notes.append(
                f"ours: {len(pictures)} pictures of {pictures.name} {pictures.split}{note}, ± half of Wilson's 95 % interval"
            )
        return notes

    def fingerprint(self, card: Card | ClassifierInfo) -> str:
        """The fingerprint of the images."""
        self._fingerprint = self._fingerprint or self.pictures(card).fingerprint()
        return self._fingerprint

    def logits(self, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (B, V, K) of all views and targets (B,), part by part."""
        card = read_card(folder)
        opened: list[ViewDefense] = []

        def compute(images: Float[Tensor, "B C H W"]) -> Tensor:
            if not opened:
                opened.append(_with_views(open_defense(str(folder))[0], card).to(images.device))
            (defense,) = opened
            views = defense.views_of(card.image_size)
            return ev.logits(defense.model, views, images, batch_size=defense.batch_size).float()

        return self._parts("logits", card, _identity(card), compute)

    def counts(self, card: Card, defense: RandomizedAblation) -> Iterator[tuple[Tensor, Tensor]]:
        """Votes (B, 2, K) in the two samples of randomized ablation and targets (B,), part by part."""

        def compute(images: Float[Tensor, "B C H W"]) -> Tensor:
            return defense.to(images.device).evidence(images).values

        return self._parts("counts", card, f"{_identity(card)}/{defense.settings()}", compute)

    def _ranges(self, card: Card, kind: str) -> Iterator[tuple[range, Tensor]]:
        """A few images at a time, by number, and their targets."""
        pictures = self.pictures(card)
        for first in range(0, len(pictures), PART):
            indices = range(first, min(first + PART, len(pictures)))
            yield indices, torch.from_numpy(pictures.labels[indices.start : indices.stop])
            self.progress(indices[-1] + 1, len(pictures), f"{kind} of {card.name}")

    def _parts(
        self, kind: str, card: Card, identity: str, compute: Callable[[Float[Tensor, "B C H W"]], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A tensor for all images, and their targets, part by part; kept parts are not computed again."""
        key = hashlib.sha256(f"{identity}/{self.fingerprint(card)}".encode()).hexdigest()[:16]
        device = devices.default()
        for indices, targets in self._ranges(card, kind):
            path = self.out / kind / key / f"part-{indices.start:08d}.safetensors"
            kept = read_tensors(path, kind)
            if kept is None or len(kept[0]) != len(indices):
                images = self.pictures(card).images(indices)
                if tuple(images.shape[2:]) != card.image_size:
                    height, width = card.image_size
                    raise InputError(
                        f"{card.name} reads {height}x{width} pixels, {self.pictures(card).name} has others"
                    )
                kept = [compute(images.to(device)).cpu()]
                keep_tensors(path, {kind: kept[0]})
            yield kept[0], targets

    def defense(self, folder: Path, method: str, threat: Threat, **settings: Any) -> ViewDefense:
        """A method around the model's network."""
        return _with_views(open_defense(method, str(folder), threat, settings)[0], read_card(folder))

    def probe(self, card: Card) -> Float[Tensor, "1 C H W"]:
        """The first image, on which rounding is measured."""
        return self.pictures(card).images(range(1))

    def evidence(
        self, folder: Path, method: str, threat: Threat, **settings: Any
    ) -> Iterator[tuple[Defense, Evidence, Tensor]]:
        """A method around the model's network, its evidence of the images, and their targets, part by part.

        Errors: InputError for interval bounds around another method's model.
        """
        card = read_card(folder)
        if method == IntervalBounds.name and card.defense != method:
            raise InputError(f"{folder}: its defense is {card.defense}; this table is of {method}")
        defense = open_defense(method, str(folder), threat, settings)[0]
        if isinstance(defense, RandomizedAblation):
            for counts, targets in self.counts(card, defense):
                yield defense, Evidence(counts, None, card.image_size), targets
        elif isinstance(defense, IntervalBounds):
            device = devices.default()
            defense = defense.to(device)
            for indices, targets in self._ranges(card, f"{threat}: bounds"):
                yield defense, defense.evidence(self.pictures(card).images(indices).to(device)), targets
        else:
            defense, probe = _with_views(defense, card), self.probe(card)
            for logits, targets in self.logits(folder):
                yield defense, evidence_of(defense, logits, probe), targets

    def outcomes(self, slot: ModelSlot, method: str, threat: Threat, **settings: Any) -> Outcomes | NotRun:
        """The verdicts of a method around a model's network on every image."""

        def judge(defense: Defense, evidence: Evidence, targets: Tensor) -> list[Tensor]:
            if isinstance(defense, IntervalBounds):  # verdicts alone are cheaper than margins
                right = defense.label(evidence).cpu() == targets
                return [right, right & defense.certified(evidence, threat).cpu()]
            certificate = defense.certificate(evidence, threat)
            right = certificate.label == targets
            if certificate.alarm is not None:
                right &= ~certificate.alarm
            return [right, right & certificate.certified]

        tensors = self._judged(slot, method, threat, settings, threat.to_dict(), judge)
        return tensors if isinstance(tensors, NotRun) else Outcomes(*(tensor.bool() for tensor in tensors))

    def largest_certified(self, slot: ModelSlot, method: str, **settings: Any) -> LargestCertified | NotRun:
        """The largest certified square of every image, for methods whose prediction does not depend on the patch."""

        def judge(defense: Defense, evidence: Evidence, targets: Tensor) -> list[Tensor]:
            largest = defense.largest_patch(evidence)
            assert largest is not None, f"{method} is built for one patch"
            return [defense.label(evidence) == targets, largest]

        tensors = self._judged(slot, method, PatchThreat(1), settings, "largest", judge)
        return tensors if isinstance(tensors, NotRun) else LargestCertified(*tensors)

    def _judged(
        self,
        slot: ModelSlot,
        method: str,
        threat: Threat,
        settings: dict[str, Any],
        question: object,
        judge: Callable[[Defense, Evidence, Tensor], list[Tensor]],
    ) -> list[Tensor] | NotRun:
        """Two tensors (N,) about all images, kept under a key."""
        folder = self.folder(slot)
        if folder is None:
            return missing(slot)
        card = read_card(folder)
        number = len(self.pictures(card))
        key = json.dumps([_identity(card), self.fingerprint(card), method, question, settings], sort_keys=True)
        path = self.out / "outcomes" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        kept = read_tensors(path, "first", "second")
        if kept is None or any(tensor.shape != (number,) for tensor in kept):
            parts = [judge(*part) for part in self.evidence(folder, method, threat, **settings)]
            kept = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
            keep_tensors(path, {"first": kept[0], "second": kept[1]}, {"asked": key})
        return kept


def missing(slot: ModelSlot) -> NotRun:
    """The cell of a missing model."""
    hours = "" if slot.hours is None else f", about {slot.hours:g} h of {slot.work}"
    return NotRun(f"not run{hours} ({slot.name})")


def is_local(data: str) -> bool:
    """Look for the data in the user's own folder of known datasets; nothing is downloaded for a table's other rows."""
    root = os.environ.get(DATA_VARIABLE)
    return bool(root) and (Path(root) / data).is_dir()


def evidence_of(defense: ViewDefense, logits: Tensor, probe: Float[Tensor, "1 C H W"]) -> Evidence:
    """The evidence of a defense from logits of all views; its rounding is measured on ``probe``."""
    device = next(defense.model.parameters()).device
    values, unsure, error = defense.values(logits, defense.tolerance(probe.to(device)))
    return Evidence(values, unsure, image_size(probe), error)


def read_tensors(path: Path, *names: str) -> list[Tensor] | None:
    """The tensors of a file; None if it is missing or damaged."""
    try:
        tensors = load_file(path)
        return [tensors[name] for name in names]
    except (OSError, KeyError, SafetensorError):
        return None


def keep_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file, whole or not at all, even if another process writes the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{os.getpid()}")
    write_tensors(own, tensors, metadata)
    own.replace(path)


def _identity(card: Card) -> str:
    """The parts of a card that predictions depend on."""
    return json.dumps(card.model_dump(mode="json", include={"sha256", "defense", "settings", "views", "model"}))


def _with_views(defense: Any, card: Card) -> ViewDefense:
    if not isinstance(defense, ViewDefense):
        raise InputError(f"{card.name} looks at whole pictures; this table needs the evidence of views")
    return defense
