"""Attacked accuracy: resumable runs in which every picture is attacked, those with a certificate too.

A run folder as that of ``evaluate``, with other columns (``records.ATTACK_RECORD``), the attacked pixels and the places
tried as evidence, and in ``broken/`` every picture and patch that broke a certificate.

clean ≥ attacked because only pictures with the right answer are counted; attacked ≥ certified because a certificate is
a proof: certified pictures are attacked like all others, and nothing is clamped.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from certipatch.attacks import Attack, Outcome, Task, Victim, certifies
from certipatch.attacks.locate import check_search
from certipatch.certificate import Certificate
from certipatch.data import Pictures
from certipatch.errors import InputError
from certipatch.evaluation.metrics import wilson
from certipatch.evaluation.records import ATTACK_EVIDENCE, ATTACK_RECORD, MAX_SCORES, read_records, write_part
from certipatch.evaluation.run import Kind, Progress, configuration, part_of, work
from certipatch.plumbing.distributed import Workers
from certipatch.plumbing.files import write_bytes
from certipatch.threats import PatchThreat, SparseThreat, Threat

CPU = torch.device("cpu")
PART = 50  # pictures per record file; what a killed run loses
LEARNED_FROM = 200  # pictures that a universal patch is learned from


@final
@dataclass(frozen=True)
class AttackJob:
    """What is attacked, with which attack; fields as of ``run.Job`` and ``attacks.Task``."""

    defense: Any
    defense_name: str
    model_sha256: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    pictures: Pictures
    threat: Threat | None
    attack: Attack
    starts: int
    steps: int
    step: float = 0.05
    search: str = "auto"
    target: int | None = None
    epsilon: float = 0.0
    adaptive: bool = True
    bf16: bool = False
    seed: int = 0
    device: torch.device = CPU
    opened: str | None = None
    part: int = field(default_factory=lambda: PART)
    batch: int = 256
    learned: list[Tensor | None] = field(default_factory=list, compare=False)

    def config(self, dataset_sha256: str | None = None) -> dict[str, Any]:
        """All settings, as plain values."""
        threat = {"kind": "linf", "epsilon": self.epsilon} if self.threat is None else self.threat.to_dict()
        names = ("starts", "steps", "step", "search", "target", "adaptive")
        how = {"name": self.attack.name} | {name: getattr(self, name) for name in names}
        how |= {"bf16": True} if self.bf16 else {}
        return configuration("attack", self, dataset_sha256, threat=threat, attack=how)

    def task(self, images: Tensor, label: Tensor, margins: Tensor | None, numbers: list[int]) -> Task:
        """The attack on some pictures."""
        return Task(
            images=images,
            label=label,
            threat=self.threat,
            numbers=numbers,
            starts=self.starts,
            steps=self.steps,
            step=self.step,
            search=self.search,
            margins=margins,
            target=self.target,
            epsilon=self.epsilon,
            seed=self.seed,
            batch=self.batch,
            prepared=self.learned[0] if self.learned else None,
        )


def attack(
    job: AttackJob, out: Path, progress: Progress = lambda done, total, text: None, workers: Workers | None = None
) -> dict[str, Any]:
    """Attack every picture of ``job`` into the run folder ``out``; gives the summary. As ``run.work``.

    Errors: InputError as there, and where the attack does not fit the threat or the defense.
    """
    job.attack.check(job.threat)
    check_search(job.search)
    if job.target is not None and not 0 <= job.target < len(job.class_names):
        raise InputError(f"--target {job.target} is no class; give 0 to {len(job.class_names) - 1}")
    return work(job, ATTACK, out, progress, workers)


def _make(job: AttackJob, out: Path, config: dict[str, Any], first: int, notify: Callable[[int], None]) -> pa.Table:
    """Certify and attack a part, and write it."""
    indices, images = part_of(job, config, first)
    victim, targets = Victim(job.defense, job.adaptive, job.bf16), job.pictures.labels[indices.start : indices.stop]
    if job.attack.prepare is not Attack.prepare and not job.learned:
        job.learned.append(_learned(job, victim))
    found = job.defense.certify(images, job.threat) if certifies(job.defense) and job.threat is not None else None
    answer = victim.answer(images) if found is None else None
    label = (found.label if found is not None else answer.label).cpu()  # type: ignore[union-attr]
    alarm = torch.zeros_like(label, dtype=torch.bool)
    if found is not None and found.alarm is not None:
        alarm = found.alarm.cpu()
    elif answer is not None:
        alarm = answer.alarm.cpu()
    margins = None if found is None else found.margin.cpu()
    worth = (label == targets) & ~alarm
    if margins is not None:  # a certificate of a wrong answer, or of one place, is a claim too
        worth |= (margins > 0).any(1) & ~alarm
    if job.target is not None:
        worth &= label != job.target
    chosen = worth.nonzero().flatten()
    outcome = None
    if len(chosen):
        on = chosen.to(images.device)
        numbers = [indices[i] for i in chosen.tolist()]
        task = job.task(
            images[on], label[chosen].to(images.device), None if margins is None else margins[chosen], numbers
        )
        skipped = len(indices) - len(chosen)
        outcome = job.attack.run(victim, task, lambda done: notify(done + skipped))
    rows = _rows(job, indices, images.cpu(), label, alarm, found, chosen.tolist(), outcome)
    records = pa.table({name: [row[name] for row in rows] for name in ATTACK_RECORD.names}, ATTACK_RECORD)
    evidence = pa.table({name: [row[name] for row in rows] for name in ATTACK_EVIDENCE.names}, ATTACK_EVIDENCE)
    for i, row in enumerate(rows):
        if row["violated"] and outcome is not None and not sampled(job.defense):
            save_break(out, indices[i], images[i].cpu(), outcome.attacked[chosen.tolist().index(i)].cpu(), row)
    write_part(out, config, records, evidence)
    return records


def _learned(job: AttackJob, victim: Victim) -> Tensor | None:
    """What an attack learns from the run's first pictures, once for all parts."""
    number = min(LEARNED_FROM, len(job.pictures))
    images = job.pictures.images(range(number)).to(job.device)
    label = victim.answer(images).label
    return job.attack.prepare(victim, job.task(images, label, None, list(range(number))))


def _rows(
    job: AttackJob,
    indices: range,
    images: Tensor,
    label: Tensor,
    alarm: Tensor,
    found: Certificate | None,
    chosen: list[int],
    outcome: Outcome | None,
) -> list[dict[str, Any]]:
    """Records and evidence of a part, one dictionary per picture."""
    position = {i: at for at, i in enumerate(chosen)}
    sparse = isinstance(job.threat, SparseThreat)  # one location: the whole picture
    single = isinstance(job.threat, PatchThreat) and job.threat.count == 1
    locations = job.threat.locations(job.image_size) if isinstance(job.threat, PatchThreat) else None
    rows = []
    for i, index in enumerate(indices):
        margins = None if found is None else found.margin[i].cpu()
        row: dict[str, Any] = {
            "index": index,
            "sha256": job.pictures.sha256(index),
            "target": int(job.pictures.labels[index]),
            "label": int(label[i]),
            "alarm": bool(alarm[i]),
            "certified": margins is not None and bool((margins > 0).all()),
            "margin": None if margins is None else margins.amin().item(),
            "attacked": i in position,
            "broken": False,
            "attacked_label": int(label[i]),
            "attacked_alarm": bool(alarm[i]),
            "loss": None,
            **dict.fromkeys(("top", "left", "height", "width")),
            **dict.fromkeys(("places", "certified_places", "violated"), 0),
            **dict.fromkeys(("pixels", "values", "tried")),
        }
        if outcome is not None and i in position:
            at = position[i]
            attacked_whole = len(outcome.tried[at]) > 0
            tried = sorted(place for place in outcome.tried[at] if place >= 0)
            pixels, values = _changed(images[i], outcome.attacked[at].cpu())
            certified_places = 0
            if margins is not None:
                certified_places = int((margins[tried] > 0).sum()) if single else len(tried) * int(row["certified"])
            row |= {
                "broken": bool(outcome.broken[at]),
                "attacked_label": int(outcome.label[at]),
                "attacked_alarm": bool(outcome.alarm[at]),
                "loss": float(outcome.loss[at]),
                "places": int(attacked_whole) if sparse else len(tried),
                "certified_places": int(attacked_whole and row["certified"]) if sparse else certified_places,
                "violated": len(outcome.violated[at]),
                "pixels": pixels,
                "values": values,
                "tried": np.array(tried, "<i4").tobytes(),
            }
            place = int(outcome.choice[at, 0])
            if locations is not None and place >= 0:
                row |= dict(zip(("top", "left", "height", "width"), locations.box(place), strict=True))
        rows.append(row)
    return rows


def _changed(image: Tensor, attacked: Tensor) -> tuple[bytes | None, bytes | None]:
    """Numbers and values of the pixels that differ; None where there are too many to be stored."""
    pixels = (image != attacked).any(0).flatten().nonzero().flatten()
    if len(pixels) * len(image) > MAX_SCORES:
        return None, None
    values = attacked.flatten(1)[:, pixels].float().numpy().astype("<f4")
    return pixels.numpy().astype("<i4").tobytes(), values.tobytes()


def attacked_picture(image: np.ndarray, row: dict[str, Any]) -> np.ndarray | None:
    """The attacked picture as uint8 (H, W, C), from the picture and a row of the evidence; None if it was not stored."""
    if row["pixels"] is None or row["values"] is None:
        return None
    pixels = np.frombuffer(row["pixels"], "<i4")
    values = np.frombuffer(row["values"], "<f4").reshape(image.shape[2], -1)
    result = image.copy().reshape(-1, image.shape[2])
    if len(pixels) and not (pixels.min() >= 0 and pixels.max() < len(result) and values.shape[1] == len(pixels)):
        raise InputError("attacked pixels lie outside of the picture; run attack again")
    result[pixels] = np.clip(np.nan_to_num(values.T * 255), 0, 255).round().astype(np.uint8)
    return result.reshape(image.shape)


def save_break(out: Path, index: int, image: Tensor, attacked: Tensor, row: dict[str, Any]) -> None:
    """The picture and the attacked one, as PNG to look at and exactly, for whoever finds out what went wrong."""
    folder = out / "broken"
    folder.mkdir(exist_ok=True)
    meta = {
        key: str(row[key]) for key in ("index", "label", "attacked_label", "margin", "top", "left", "height", "width")
    }
    write_bytes(folder / f"{index:08d}.safetensors", save({"picture": image, "attacked": attacked.contiguous()}, meta))
    for name, pixels in (("picture", image), ("attacked", attacked)):
        shown = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
        file = io.BytesIO()
        picture.save(file, "PNG")
        write_bytes(folder / f"{index:08d}-{name}.png", file.getvalue())


def sampled(defense: Any) -> bool:
    """Whether a defense's certificates hold with a probability only, so that its answer may change by chance."""
    return getattr(defense, "confidence", 1.0) < 1


def summarize_attack(config: dict[str, Any], out: Path, defense: Any) -> dict[str, Any]:
    """The summary of a run whose records are complete. The same records give the same bytes."""
    records = read_records(out)
    columns = {name: np.asarray(records[name]) for name in ("label", "target", "alarm", "certified", "broken")}
    right = (columns["label"] == columns["target"]) & ~columns["alarm"]
    standing, robust = right & ~columns["broken"], right & columns["certified"]
    pairs, places = (int(np.sum(records[name])) for name in ("certified_places", "places"))
    broken = columns["broken"] & columns["certified"]
    by_chance = sampled(defense)
    n = len(right)
    summary = {key: config[key] for key in ("defense", "model_sha256", "dataset", "split", "images", "threat")}
    summary |= {
        "notion": getattr(defense, "notion", "recovery"),
        "theorem": getattr(defense, "theorem", "none: nothing is certified"),
        "confidence": getattr(defense, "confidence", 1.0),
        "attack": config["attack"]["name"],
        "attack_settings": {key: value for key, value in config["attack"].items() if key != "name"},
        "clean_accuracy": int(right.sum()) / n,
        "clean_ci95": wilson(int(right.sum()), n),
        "attacked_accuracy": int(standing.sum()) / n,
        "attacked_ci95": wilson(int(standing.sum()), n),
        "certified_accuracy": int(robust.sum()) / n,
        "certified_ci95": wilson(int(robust.sum()), n),
        "certified_pictures_attacked": int((columns["certified"] & np.asarray(records["attacked"])).sum()),
        "attacked_places": places,
        "attacked_certified_places": pairs,
        "broken_certificates": 0 if by_chance else int(((np.asarray(records["violated"]) > 0) | broken).sum()),
        "seed": config["seed"],
        "versions": config["versions"],
    }
    if by_chance:
        summary["changed_sampled_answers"] = int(broken.sum())
    if config["dataset_note"]:
        summary["dataset_note"] = config["dataset_note"]
    return summary


def _counts(records: pa.Table) -> dict[str, int]:
    right = (np.asarray(records["label"]) == np.asarray(records["target"])) & ~np.asarray(records["alarm"])
    broken = np.asarray(records["broken"])
    counts = {"clean": right, "attacked": right & ~broken, "certified": right & np.asarray(records["certified"])}
    return {name: int(which.sum()) for name, which in counts.items()}


def _timing(job: AttackJob, out: Path, images: int, seconds: float) -> dict[str, Any]:
    return {
        "images_per_second": round(images / max(seconds, 1e-9), 3),
        "seconds": round(seconds, 1),
        "device": f"{job.device.type}, {torch.get_num_threads()} threads",
    }


ATTACK = Kind(_make, _counts, summarize_attack, _timing)
