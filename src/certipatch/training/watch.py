"""Validation metrics, shown in the progress bar and written to ``log.jsonl``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certipatch.defenses import METHODS
from certipatch.models import receptive_fields
from certipatch.plumbing.parsing import from_json
from certipatch.saved import card as cards
from certipatch.threats import PatchThreat
from certipatch.training.interval import IntervalObjective
from certipatch.training.masking import MaskLoss
from certipatch.training.recipe import Recipe

SHOWN = ("clean", "masked", "certified")
WATCHED_PIXELS, FEWEST = 2**25, 16  # that views of held-out pictures show together; pictures at least


def held_out(
    recipe: Recipe, card: cards.Card, network: nn.Module, images: Tensor, targets: Tensor, device: torch.device
) -> dict[str, float]:
    """Clean and certified accuracy on held-out pictures with the weights as they are now; of large ones, on the first."""
    if len(images) == 0:
        return {}
    network.eval()
    threat = PatchThreat(min(recipe.objective.patch, *card.image_size))
    watched = card.settings | METHODS[card.defense].watched_settings
    card = card.model_copy(update={"settings": watched})
    defense = card.build(network, threat)
    views, size = card.created_views(), card.image_size
    if views is None and getattr(network, "encoding", None) == "all-views":
        views = receptive_fields(network, size)
    if views is not None:  # watching shall not take longer than learning
        shown = int(views.visible(size).sum())
        images = images[: max(FEWEST, WATCHED_PIXELS // shown)]
        targets = targets[: len(images)]
    label, certified = [], []
    for part in images.split(250):
        certificate = defense.certify(part.to(device).float().div(255), threat)
        label.append(certificate.label.cpu())
        certified.append(certificate.certified.cpu())
    right = torch.cat(label) == targets.cpu()
    robust = right & torch.cat(certified)
    return {"clean_accuracy": right.double().mean().item(), "certified_accuracy": robust.double().mean().item()}


def bounded_held_out(bounded: IntervalObjective, images: Tensor, targets: Tensor) -> dict[str, float]:
    """The same by interval bounds, with the losses."""
    if len(images) == 0:
        return {}
    device = next(bounded.parameters()).device
    return bounded.watch(images.to(device).float().div(255), targets.to(device))


def masked_held_out(under: MaskLoss, images: Tensor, targets: Tensor, device: torch.device) -> dict[str, float]:
    """Accuracy on held-out pictures as they are, and under two random masks: always the same ones. A certificate takes
    every two masks, and longer than learning does."""
    if len(images) == 0:
        return {}
    hidden = under.larger.hidden(under.larger.random(len(images), torch.Generator().manual_seed(0)))
    right = torch.zeros(2, dtype=torch.int64)
    for part, own, two in zip(images.split(250), targets.split(250), hidden.split(250), strict=True):
        part = part.to(device).float().div(255)
        for row, masks in enumerate((torch.zeros_like(two), two)):
            right[row] += int((under.answers(part, masks).argmax(1) == own.to(device)).sum())
    clean, masked = (right / len(images)).tolist()
    return {"clean_accuracy": clean, "masked_accuracy": masked}


def words(held: dict[str, float]) -> str:
    """Held-out numbers, as they stand beside the bar."""
    if not held:
        return ""
    losses = f" (loss {held['clean_loss']:.2f}, of bounds {held['bound_loss']:.2f})" if "bound_loss" in held else ""
    parts = [f"{name} {held[key]:.1%}" for name in SHOWN if (key := f"{name}_accuracy") in held]
    return f"held out: {', '.join(parts)}{losses}"


def log(out: Path, line: dict[str, Any]) -> None:
    """Write one more line of ``log.jsonl``."""
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut_log(out: Path, step: int) -> float:
    """Drop the lines of the log that were written after ``step``, or not to their end; gives the seconds until then."""
    path, kept, seconds = out / "log.jsonl", [], 0.0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return seconds
    for line in lines:
        try:
            values = from_json(line)
            if values["step"] <= step:
                kept, seconds = [*kept, line], float(values["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
    if len(kept) < len(lines):
        temporary = path.with_name("log.jsonl.part")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
    return seconds
