"""Run folders: an evaluation that stops anywhere and resumes to the same summary, to the byte.

config.yaml          all settings; a folder belongs to one configuration
records/part-*.parquet    one row per picture, written atomically, part by part
evidence/part-*.parquet   the votes or scores behind each row, for re-checking
summary.json         deterministic results
timing.json          speed of this machine
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from certipatch.certificate import Certificate
from certipatch.data import Pictures
from certipatch.defenses.base import Defense
from certipatch.errors import InputError
from certipatch.evaluation.files import read_config, read_json, write_json, write_table, write_text
from certipatch.evaluation.metrics import wilson
from certipatch.evaluation.records import RECORD, evidence_rows, read_evidence, read_records
from certipatch.threats import Threat
from certipatch.versions import versions

CPU = torch.device("cpu")
PART = 250  # pictures per record file; the batch that a killed run loses
Progress = Callable[[int, int, str], None]


@final
@dataclass(frozen=True)
class Job:
    """What is evaluated: a defense with its identity, pictures, and a threat."""

    defense: Defense
    defense_name: str
    model_sha256: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    pictures: Pictures
    threat: Threat
    seed: int = 0
    device: torch.device = CPU
    opened: str | None = None
    """What the user called the model: a zoo name or a folder."""

    def config(self) -> dict[str, Any]:
        """All settings, as plain values; ``source``, ``model`` and ``versions`` tell where from and with what."""
        return {
            "command": "evaluate",
            "defense": self.defense_name,
            "method": self.defense.name,
            "settings": self.defense.settings(),
            "model_sha256": self.model_sha256,
            "image_size": list(self.image_size),
            "classes": list(self.class_names),
            "dataset": self.pictures.name,
            "dataset_sha256": self.pictures.fingerprint(),
            "dataset_note": self.pictures.note,
            "split": self.pictures.split,
            "images": len(self.pictures),
            "threat": self.threat.to_dict(),
            "seed": self.seed,
            "part": PART,
            "source": self.pictures.source,
            "model": self.opened,
            "versions": versions(),
        }


def evaluate(job: Job, out: Path, progress: Progress = lambda done, total, text: None) -> dict[str, Any]:
    """Certify every picture of ``job`` into the run folder ``out``; gives the summary.

    Parts that are there are kept; unreadable ones are made again. A finished run is left as it is.

    Errors: InputError where ``out`` holds another configuration, or cannot be written.
    """
    config = _claim(job, out)
    if (out / "summary.json").exists():
        return read_json(out / "summary.json")
    for folder in ("records", "evidence"):
        (out / folder).mkdir(exist_ok=True)
    total, correct, certified, done = len(job.pictures), 0, 0, 0
    evaluated, seconds = 0, 0.0
    for first in range(0, total, PART):
        indices = range(first, min(first + PART, total))
        records = _read_part(out, first, indices)
        if records is None:
            started = time.monotonic()
            records = _evaluate_part(job, out, indices)
            seconds += time.monotonic() - started
            evaluated += len(indices)
        done += len(indices)
        right = np.asarray(records["label"]) == np.asarray(records["target"])
        correct += int(right.sum())
        certified += int((right & np.asarray(records["certified"])).sum())
        progress(done, total, f"clean {correct / done:.1%}, certified {certified / done:.1%}")
    summary = summarize(config, out, job.defense)
    if evaluated:
        write_json(out / "timing.json", _timing(job, evaluated, seconds))
    write_json(out / "summary.json", summary)
    return summary


def summarize(config: dict[str, Any], out: Path, defense: Defense) -> dict[str, Any]:
    """The summary of a run whose records are complete. The same records give the same bytes."""
    records = read_records(out)
    right = np.asarray(records["label"]) == np.asarray(records["target"])
    right &= ~np.asarray(records["alarm"])
    robust = right & np.asarray(records["certified"])
    n = len(right)
    summary = {key: config[key] for key in ("defense", "model_sha256", "dataset", "split", "images", "threat")}
    summary |= {
        "notion": defense.notion,
        "theorem": defense.theorem,
        "clean_accuracy": int(right.sum()) / n,
        "clean_ci95": wilson(int(right.sum()), n),
        "certified_accuracy": int(robust.sum()) / n,
        "certified_ci95": wilson(int(robust.sum()), n),
        "seed": config["seed"],
        "versions": config["versions"],
    }
    if config["dataset_note"]:
        summary["dataset_note"] = config["dataset_note"]
    evidence = read_evidence(out)
    largest = np.array([-1 if side is None else side for side in evidence["largest_patch"].to_pylist()])
    if (largest >= 0).all():
        sides = range(1, min(config["image_size"]) + 1)
        summary["certified_by_patch"] = {str(side): int((right & (largest >= side)).sum()) / n for side in sides}
    return summary


def _claim(job: Job, out: Path) -> dict[str, Any]:
    """Make the run folder, or see that it is this run's. Gives the configuration, as it comes back from the file."""
    config = yaml.safe_load(yaml.safe_dump(job.config()))
    if (out / "config.yaml").exists():
        found = read_config(out)
        free = {"source", "model"} | ({"versions"} if (out / "summary.json").exists() else set())
        for key in sorted((config.keys() | found.keys()) - free):
            if config.get(key) != found.get(key):
                old, new = (str(values.get(key))[:60] for values in (found, config))
                raise InputError(f"{out} holds another run: {key} is {old} there, {new} here; give a new --out")
        return found
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is no run folder; give a new or empty --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return config


def _part(out: Path, folder: str, first: int) -> Path:
    return out / folder / f"part-{first:08d}.parquet"


def _read_part(out: Path, first: int, indices: range) -> pa.Table | None:
    """The records of a part, or None where it is missing, unreadable or not these pictures."""
    try:
        records = pq.read_table(_part(out, "records", first), schema=RECORD)
        evidence = pq.read_table(_part(out, "evidence", first), columns=["index"])
    except (OSError, pa.ArrowException):
        return None
    wanted = list(indices)
    return records if records["index"].to_pylist() == wanted == evidence["index"].to_pylist() else None


def _evaluate_part(job: Job, out: Path, indices: range) -> pa.Table:
    images = job.pictures.images(indices)
    if tuple(images.shape[2:]) != job.image_size:
        raise InputError(
            f"{job.pictures.name} has pictures of {images.shape[2]}x{images.shape[3]} pixels, but {job.defense_name} "
            f"reads {job.image_size[0]}x{job.image_size[1]}"
        )
    evidence = job.defense.evidence(images.to(job.device))
    found = job.defense.certificate(evidence, job.threat)
    records = _records(job, indices, found)
    largest = job.defense.largest_patch(evidence)
    sides: list[int | None] = [None] * len(indices)
    if largest is not None:
        sides = largest.tolist()
    write_table(_part(out, "evidence", indices[0]), evidence_rows(list(indices), evidence, sides))
    write_table(_part(out, "records", indices[0]), records)
    return records


def _records(job: Job, indices: range, found: Certificate) -> pa.Table:
    weakest = found.weakest.tolist()
    boxes = [found.box(location) or (None,) * 4 for location in weakest]
    n = len(indices)
    return pa.table(
        {
            "index": list(indices),
            "sha256": [job.pictures.sha256(i) for i in indices],
            "target": job.pictures.labels[indices.start : indices.stop].tolist(),
            "label": found.label.tolist(),
            "alarm": [False] * n if found.alarm is None else found.alarm.tolist(),
            "certified": found.certified.tolist(),
            "margin": found.margin.amin(1).tolist(),
            **{
                f"weakest_{side}": [box[i] for box in boxes]
                for i, side in enumerate(("top", "left", "height", "width"))
            },
            "passes": [job.defense.forward_passes(job.image_size)] * n,
        },
        RECORD,
    )


def _timing(job: Job, images: int, seconds: float) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    probe = job.pictures.images(range(1)).to(job.device)
    with FlopCounterMode(display=False) as counter:
        job.defense.evidence(probe)
    return {
        "images_per_second": round(images / max(seconds, 1e-9), 2),
        "forward_passes_per_image": job.defense.forward_passes(job.image_size),
        "multiply_adds_per_image": counter.get_total_flops() // 2,
        "device": f"{probe.device.type}, {torch.get_num_threads()} threads",
    }
