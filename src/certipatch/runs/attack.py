"""Attacked accuracy: resumable runs in which every image is attacked, those with a certificate too.

The run folder is that of ``evaluate`` with other columns (``records.ATTACK_RECORD``). Its evidence is the attacked pixels
and the locations that were tried; ``broken/`` holds every image and patch that broke a certificate.

Clean ≥ attacked, because only images with the right prediction are counted. Attacked ≥ certified, because a certificate is
a proof: certified images are attacked like all others, and nothing is clamped.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from certipatch import attacks
from certipatch.attacks import Attack, Task, Victim, certifies
from certipatch.attacks.locate import check_search
from certipatch.attacks.losses import has_soft_version
from certipatch.data import Pictures
from certipatch.errors import InputError
from certipatch.inference import batch_size_for
from certipatch.plumbing.distributed import Workers
from certipatch.runs.attack_records import attack_rows, save_break
from certipatch.runs.experiment import DataRef, open_experiment
from certipatch.runs.folder import remove_temporaries, write_report
from certipatch.runs.metrics import wilson
from certipatch.runs.records import ATTACK_EVIDENCE, ATTACK_RECORD, read_records, write_part
from certipatch.runs.run import Progress, RunType, configuration, part_of, run_shards
from certipatch.saved import DefenseRef
from certipatch.threats import PatchThreat, Threat

CPU = torch.device("cpu")
PART = 50  # images per record file; a killed run loses at most one file
LEARNED_FROM = 200  # training images of a universal patch


@final
@dataclass(frozen=True)
class AttackJob:
    """A defense, images and an attack; the fields are those of ``run.Job`` and ``attacks.Task``."""

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
        """The attack on some images."""
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


def attack_into(
    out: Path,
    defense: DefenseRef,
    data: DataRef,
    threat: Threat | None,
    attack_name: str,
    progress: Progress = lambda done, total, text: None,
    options: dict[str, Any] | None = None,
    report: Callable[[Pictures, Path, dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Attack into a run folder; gives the summary. A finished run is left as it is.

    Args:
        options: fields of ``AttackJob``; those that are None get the attack's or the job's default.
        report: makes the text of ``report.html`` from the images, the run folder and the summary; None for no page.
    """
    method = attacks.find(attack_name)
    method.check(threat)
    opened = open_experiment(defense, data, threat or PatchThreat(1), certified=False)
    adaptive = (options or {}).get("adaptive", True)
    if method.gradients and adaptive and isinstance(threat, PatchThreat) and not has_soft_version(opened.defense):
        if opened.workers.first:
            print(f"note: {opened.name} has no soft version to follow, so square attacks it", file=sys.stderr)
        method = attacks.find("square")
    fields: dict[str, Any] = opened.job() | {"starts": method.starts, "steps": method.steps}
    fields |= {"batch": default_batch(opened.card.image_size)}
    fields |= {key: value for key, value in (options or {}).items() if value is not None}
    job = AttackJob(**fields, threat=threat, attack=method)
    summary = attack(job, out, progress, opened.workers)
    if opened.workers.first:
        if report is not None:
            write_report(out, lambda: report(job.pictures, out, summary))
        remove_temporaries(out)
    return summary


def default_batch(image_size: tuple[int, int]) -> int:
    """The default number of attacked images per gradient."""
    return min(256, batch_size_for(math.prod(image_size)))


def attack(
    job: AttackJob, out: Path, progress: Progress = lambda done, total, text: None, workers: Workers | None = None
) -> dict[str, Any]:
    """Attack every image of ``job`` into the run folder ``out``; gives the summary. As ``run_shards``.

    Errors: InputError as there, and if the attack does not fit the threat or the defense.
    """
    job.attack.check(job.threat)
    check_search(job.search)
    if job.target is not None and not 0 <= job.target < len(job.class_names):
        raise InputError(f"--target {job.target} is no class; give 0 to {len(job.class_names) - 1}")
    return run_shards(job, ATTACK, out, progress, workers)


def _process_shard(
    job: AttackJob, out: Path, config: dict[str, Any], first: int, notify: Callable[[int], None]
) -> pa.Table:
    """Certify and attack a part, and write it."""
    indices, images = part_of(job, config, first)
    victim, targets = Victim(job.defense, job.adaptive, job.bf16), job.pictures.labels[indices.start : indices.stop]
    if job.attack.prepare is not Attack.prepare and not job.learned:
        job.learned.append(_learned(job, victim))
    certificate = job.defense.certify(images, job.threat) if certifies(job.defense) and job.threat is not None else None
    answer = victim.answer(images) if certificate is None else None
    label = (certificate.label if certificate is not None else answer.label).cpu()  # type: ignore[union-attr]
    alarm = torch.zeros_like(label, dtype=torch.bool)
    if certificate is not None and certificate.alarm is not None:
        alarm = certificate.alarm.cpu()
    elif answer is not None:
        alarm = answer.alarm.cpu()
    margins = None if certificate is None else certificate.margin.cpu()
    worth = (label == targets) & ~alarm
    if margins is not None:  # a certificate of a wrong prediction, or of one location, is a claim too
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
    rows = attack_rows(job, indices, images.cpu(), label, alarm, certificate, chosen.tolist(), outcome)
    records = pa.table({name: [row[name] for row in rows] for name in ATTACK_RECORD.names}, ATTACK_RECORD)
    evidence = pa.table({name: [row[name] for row in rows] for name in ATTACK_EVIDENCE.names}, ATTACK_EVIDENCE)
    for i, row in enumerate(rows):
        if row["violated"] and outcome is not None and not sampled(job.defense):
            save_break(out, indices[i], images[i].cpu(), outcome.attacked[chosen.tolist().index(i)].cpu(), row)
    write_part(out, config, records, evidence)
    return records


def _learned(job: AttackJob, victim: Victim) -> Tensor | None:
    """The tensor that an attack learns from the run's first images, once for all shards."""
    number = min(LEARNED_FROM, len(job.pictures))
    images = job.pictures.images(range(number)).to(job.device)
    label = victim.answer(images).label
    return job.attack.prepare(victim, job.task(images, label, None, list(range(number))))


def sampled(defense: Any) -> bool:
    """Return True if certificates hold with a probability only, so that a prediction may change by chance."""
    return getattr(defense, "confidence", 1.0) < 1


def summarize_attack(config: dict[str, Any], out: Path, defense: Any) -> dict[str, Any]:
    """The summary of a run with complete records. The same records give the same bytes."""
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


ATTACK = RunType(_process_shard, _counts, summarize_attack, _timing)
