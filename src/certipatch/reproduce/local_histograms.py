"""Figure 3 of PatchGuard (and 5, 6): what a patch does to local logits.

There it makes a few of them very large, and their mean believes those.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from certipatch import attacks
from certipatch.attacks import Task, Victim
from certipatch.defenses import Undefended
from certipatch.evidence import PIXELS
from certipatch.plumbing import devices
from certipatch.reproduce import local_logits, plots
from certipatch.reproduce.attacked import Strength, Target, pictures_of, target
from certipatch.reproduce.bench import Bench
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.patchguard_attacks import LARGEST, LOCAL, ONE_PLACE, PICTURES, notes
from certipatch.reproduce.plots import BLUE, RED
from certipatch.reproduce.studies import Study
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Share, Table
from certipatch.saved.weights import write_tensors
from certipatch.threats import PatchThreat

PART = 50
BINS = 40


@final
class Patient:
    """A network under an attack that nothing ends before its last step; its worst picture is then kept.

    It is a detector that always raises an alarm, so that no attack succeeds.
    """

    notion: ClassVar[str] = "detection"

    def __init__(self, model: nn.Module):
        self.model = model

    def evidence(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.model(images)

    def label(self, logits: Float[Tensor, "N K"]) -> Tensor:
        return logits.argmax(1)

    def certificate(self, logits: Float[Tensor, "N K"], threat: PatchThreat) -> Any:
        return SimpleNamespace(alarm=torch.ones(len(logits), dtype=torch.bool, device=logits.device))


@final
@dataclass(frozen=True, eq=False)
class Maxima:
    """The largest of every cell's local logits, of N pictures as they are and attacked; and which global answers are right."""

    clean: Float[Tensor, "N V"]
    attacked: Float[Tensor, "N V"]
    right: Bool[Tensor, " N"]
    standing: Bool[Tensor, " N"]


def histograms(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Figure 3: histograms of the largest local logits, of clean and of attacked pictures."""
    bench, threat, strength = bench.first(PICTURES), PatchThreat(LARGEST), ONE_PLACE.within(bench)
    models, rows, panels = [study.model("plain"), study.model("bagnet")], [], []
    for wanted in models:
        found = target(bench, wanted, threat)
        if isinstance(found, NotRun):
            rows.append(Row(wanted.name, [found]))
            continue
        maxima = largest_logits(bench, found, threat, strength)
        for words, values in (("clean", maxima.clean), ("attacked", maxima.attacked)):
            right = maxima.right if words == "clean" else maxima.standing
            above = int((values > maxima.clean.max()).any(1).sum())
            middle, high, most = (float(values.flatten().double().quantile(q)) for q in (0.5, 0.99, 1.0))
            cells: list[Cell] = [Number(middle), Number(high), Number(most), Share(above, len(values))]
            rows.append(Row(f"{found.card.name}, {words}", [*cells, Share(int(right.sum()), len(right))]))
        cells_each = f"{maxima.clean.shape[1]} cells, {len(maxima.clean):,} pictures"
        shown = [("clean", maxima.clean.flatten(), BLUE), ("attacked", maxima.attacked.flatten(), RED)]
        panels.append((f"{found.card.name}: {cells_each}", [(n, v.numpy(), c) for n, v, c in shown]))
    names = ("largest of a cell's local logits", "share of cells, %")
    columns = ["median", "99 % quantile", "largest", "pictures above every clean cell", "global accuracy"]
    more = [
        f"{LARGEST} patch at one random place; every attack runs to its last step and raises the foremost wrong class of the "
        "global answer; the paper prints no numbers",
        LOCAL,
    ]
    figure = plots.histograms(panels, names, BINS)
    return Table(columns, rows, notes(bench, {"attack": strength}, models, more), {"figure.png": figure})


def largest_logits(bench: Bench, found: Target, threat: PatchThreat, strength: Strength) -> Maxima:
    """Local logits of all pictures before and after an attack on the global answer; a part that is kept is not made again."""
    pictures, device = pictures_of(bench, found), devices.default()
    network = local_logits.map_of(found.defense, found.name).to(device)
    whole = found.defense.model if isinstance(found.defense, Undefended) else local_logits.MeanOfCells(network)
    card = found.card
    about = [card.sha256, card.name, repr(getattr(card, "model", None)), card.image_size, bench.fingerprint(card)]
    asked = [*about, threat.to_dict(), asdict(strength)]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(pictures), PART):
        numbers = list(range(first, min(first + PART, len(pictures))))
        path = bench.out / "maxima" / key / f"part-{first:08d}.safetensors"
        part = _kept(path, len(numbers))
        if part is None:
            labels = torch.from_numpy(pictures.labels[numbers]).to(device)
            images = pictures.images(numbers).to(device)
            part = _attacked(network, whole.to(device), images, labels, numbers, threat, strength)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, part)
        parts.append(part)
        bench.progress(numbers[-1] + 1, len(pictures), f"local logits of {card.name}, attacked")
    return Maxima(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _attacked(
    network: nn.Module,
    whole: nn.Module,
    images: Float[Tensor, "B C H W"],
    labels: Tensor,
    numbers: list[int],
    threat: PatchThreat,
    strength: Strength,
) -> dict[str, Tensor]:
    """The fields of ``Maxima`` for some pictures."""
    starts, steps = strength.rounds
    task = Task(
        images=images,
        label=labels,
        threat=threat,
        numbers=numbers,
        starts=starts,
        steps=steps,
        step=strength.step,
        search=strength.search,
        batch=max(1, min(256, PIXELS // images[0, 0].numel())),
    )
    attacked = attacks.find(strength.attack).run(Victim(Patient(whole)), task).attacked
    found = {}
    for name, answer, shown in (("clean", "right", images), ("attacked", "standing", attacked)):
        found[name] = local_logits.answers(network, shown).amax(2).cpu()
        found[answer] = (local_logits.answers(whole, shown).argmax(1) == labels).cpu()
    return found


def _kept(path: Path, number: int) -> dict[str, Tensor] | None:
    """A part of so many pictures; None where it is missing, damaged or foreign."""
    try:
        part = load_file(path)
        cells = part["clean"].shape[1]
    except (OSError, SafetensorError, LookupError):
        return None
    shapes = {"clean": (number, cells), "attacked": (number, cells), "right": (number,), "standing": (number,)}
    return part if {name: tuple(tensor.shape) for name, tensor in part.items()} == shapes else None
