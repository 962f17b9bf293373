"""Figure 3 of PatchGuard (and 5, 6): the effect of a patch on local logits.

The patch makes a few local logits very large, and these dominate the mean.
"""

import hashlib
import json
from dataclasses import dataclass
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
from certipatch.defenses.undefended import Undefended
from certipatch.inference import batch_size_for
from certipatch.plumbing import devices
from certipatch.reproduce import local_logits, plots
from certipatch.reproduce.attacked import Strength, Target, pictures_of, target
from certipatch.reproduce.context import ReproductionContext, keep_tensors
from certipatch.reproduce.measures import strength_of
from certipatch.reproduce.plots import BLUE, RED
from certipatch.reproduce.rows import Plan
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Share, Table
from certipatch.threats import PatchThreat

PART = 50
BINS = 40


@final
class AlwaysAlarming:
    """A network whose attack runs to its last step and keeps its worst image.

    The network is a detector that always raises an alarm, so that no attack succeeds.
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
class LargestLogits:
    """The largest local logit of every cell, on N clean and attacked images, and the correctness of global predictions."""

    clean: Float[Tensor, "N V"]
    attacked: Float[Tensor, "N V"]
    right: Bool[Tensor, " N"]
    standing: Bool[Tensor, " N"]


def draw_histograms(plan: Plan) -> Table:
    """Figure 3: histograms of the largest local logits, of clean and of attacked images."""
    rows: list[Row] = []
    panels = []
    for row in plan.rows:
        slot, threat = plan.study.model(row.model), row.threat(plan.study)
        assert isinstance(threat, PatchThreat)
        victim = target(plan.context, slot, threat)
        if isinstance(victim, NotRun):
            rows.append(Row(slot.name, [victim]))
            continue
        strength = strength_of(plan.paper, row).limited_to(plan.context.starts, plan.context.steps)
        maxima, name = largest_logits(plan.context, victim, threat, strength), victim.card.name
        for words, values in (("clean", maxima.clean), ("attacked", maxima.attacked)):
            right = maxima.right if words == "clean" else maxima.standing
            above = int((values > maxima.clean.max()).any(1).sum())
            middle, high, most = (float(values.flatten().double().quantile(q)) for q in (0.5, 0.99, 1.0))
            cells: list[Cell] = [Number(middle), Number(high), Number(most), Share(above, len(values))]
            rows.append(Row(f"{name}, {words}", [*cells, Share(int(right.sum()), len(right))]))
        shown = [("clean", maxima.clean.flatten(), BLUE), ("attacked", maxima.attacked.flatten(), RED)]
        title = f"{name}: {maxima.clean.shape[1]} cells, {len(maxima.clean):,} pictures"
        panels.append((title, [(words, values.numpy(), colour) for words, values, colour in shown]))
    figure = plots.histograms(panels, ("largest of a cell's local logits", "share of cells, %"), BINS)
    return Table(list(plan.columns), rows, figures={"figure.png": figure})


def largest_logits(
    context: ReproductionContext, victim: Target, threat: PatchThreat, strength: Strength
) -> LargestLogits:
    """Local logits of all images before and after an attack on the global prediction; kept parts are not computed again."""
    pictures, device = pictures_of(context, victim), devices.default()
    network = local_logits.map_of(victim.defense, victim.name).to(device)
    whole = victim.defense.model if isinstance(victim.defense, Undefended) else local_logits.MeanOfCells(network)
    card = victim.card
    about = [card.sha256, card.name, repr(getattr(card, "model", None)), card.image_size, context.fingerprint(card)]
    question = json.dumps([*about, threat.to_dict(), strength.model_dump()], sort_keys=True)
    key = hashlib.sha256(question.encode()).hexdigest()[:16]
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(pictures), PART):
        numbers = list(range(first, min(first + PART, len(pictures))))
        path = context.out / "maxima" / key / f"part-{first:08d}.safetensors"
        part = _kept(path, len(numbers))
        if part is None:
            labels = torch.from_numpy(pictures.labels[numbers]).to(device)
            images = pictures.images(numbers).to(device)
            part = _attacked(network, whole.to(device), images, labels, numbers, threat, strength)
            keep_tensors(path, part)
        parts.append(part)
        context.progress(numbers[-1] + 1, len(pictures), f"local logits of {card.name}, attacked")
    return LargestLogits(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _attacked(
    network: nn.Module,
    whole: nn.Module,
    images: Float[Tensor, "B C H W"],
    labels: Tensor,
    numbers: list[int],
    threat: PatchThreat,
    strength: Strength,
) -> dict[str, Tensor]:
    """The fields of ``LargestLogits`` for some images."""
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
        batch=min(256, batch_size_for(images[0, 0].numel())),
    )
    attacked = attacks.find(strength.attack).run(Victim(AlwaysAlarming(whole)), task).attacked
    results = {}
    for name, answer, shown in (("clean", "right", images), ("attacked", "standing", attacked)):
        results[name] = local_logits.answers(network, shown).amax(2).cpu()
        results[answer] = (local_logits.answers(whole, shown).argmax(1) == labels).cpu()
    return results


def _kept(path: Path, number: int) -> dict[str, Tensor] | None:
    """A stored part of ``size`` images; None if it is missing, damaged or foreign."""
    try:
        part = load_file(path)
        cells = part["clean"].shape[1]
    except (OSError, SafetensorError, LookupError):
        return None
    shapes = {"clean": (number, cells), "attacked": (number, cells), "right": (number,), "standing": (number,)}
    return part if {name: tuple(tensor.shape) for name, tensor in part.items()} == shapes else None
