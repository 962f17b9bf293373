"""Evaluation: a resumable run in which every image of a dataset is certified."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch

from certipatch.certificate import Certificate
from certipatch.data import Pictures
from certipatch.defenses.base import Defense, Evidence
from certipatch.plumbing import files
from certipatch.plumbing.distributed import Workers
from certipatch.runs import run
from certipatch.runs.experiment import DataRef, open_experiment, warn_if_trained_on
from certipatch.runs.folder import remove_temporaries, write_report
from certipatch.runs.metrics import wilson
from certipatch.runs.records import RECORD, evidence_rows, read_evidence, read_records, write_part
from certipatch.runs.run import Progress, RunType, configuration, part_of, run_shards
from certipatch.runs.verify import check_certificates
from certipatch.saved import DefenseRef
from certipatch.threats import Threat

CPU = torch.device("cpu")


@final
@dataclass(frozen=True)
class Job:
    """A defense with its identity, the images to certify, and a threat."""

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
    """The user's name for the model: a zoo name or a folder."""
    part: int = field(default_factory=lambda: run.PART)
    """Images per record file."""
    engine: str | None = None
    """The backend of the network, if the defense has a choice."""

    def config(self, dataset_sha256: str | None = None) -> dict[str, Any]:
        """All settings, as plain values; ``source``, ``model`` and ``versions`` name their origin.

        ``dataset_sha256`` is computed from all images, unless it is given.
        """
        engine = {} if self.engine is None else {"engine": self.engine}
        return configuration("evaluate", self, dataset_sha256, threat=self.threat.to_dict(), **engine)


def evaluate_into(
    out: Path,
    defense: DefenseRef,
    data: DataRef,
    threat: Threat,
    progress: Progress = lambda done, total, text: None,
    part: int | None = None,
    report: Callable[[Job, Path, dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Evaluate into a run folder; gives the summary. A finished run is left as it is.

    Under torchrun this process is one of several workers; all but the first give an empty dictionary.

    Args:
        part: images per record file; None for ``run.PART``.
        report: makes the text of ``report.html`` from the job, the run folder and the summary; None for no page.
    """
    opened = open_experiment(defense, data, threat, certified=True)
    warn_if_trained_on(opened.pictures, opened.card, opened.name)
    engine = choose_engine(opened.defense, opened.pictures, out, opened.device, opened.workers)
    job = Job(**opened.job(), threat=threat, seed=opened.card.seed, part=part or run.PART, engine=engine)
    summary = evaluate(job, out, progress, opened.workers)
    if opened.workers.first:
        if report is not None:
            write_report(out, lambda: report(job, out, summary))
        remove_temporaries(out)
    return summary


def choose_engine(
    defense: Defense, pictures: Pictures, out: Path, device: torch.device, workers: Workers
) -> str | None:
    """The backend of all workers: the one of an earlier start of this run, else the fastest available one.

    Collective: the first worker chooses, the others receive its choice. It measures nothing for a finished run.
    """
    images, each = pictures.images(range(1)).to(device), -(-len(pictures) // workers.count)

    def first() -> str | None:
        begun = files.read_config(out).get("engine") if (out / "config.yaml").exists() else None
        if (out / "summary.json").exists():
            return begun
        return defense.select_backend(images, each, begun)

    engine = workers.share(first)
    if not workers.first and engine is not None:
        defense.select_backend(images, each, engine)
    return engine


def evaluate(
    job: Job, out: Path, progress: Progress = lambda done, total, text: None, workers: Workers | None = None
) -> dict[str, Any]:
    """Certify every image of ``job`` into the run folder ``out``; gives the summary. As ``run_shards``."""
    return run_shards(job, EVALUATE, out, progress, workers)


def summarize(config: dict[str, Any], out: Path, defense: Defense) -> dict[str, Any]:
    """The summary of a run with complete records. The same records give the same bytes."""
    records = read_records(out)
    right = np.asarray(records["label"]) == np.asarray(records["target"])
    right &= ~np.asarray(records["alarm"])
    robust = right & np.asarray(records["certified"])
    n = len(right)
    summary = {key: config[key] for key in ("defense", "model_sha256", "dataset", "split", "images", "threat")}
    summary |= {
        "notion": defense.notion,
        "theorem": defense.theorem,
        "confidence": defense.confidence,
        "clean_accuracy": int(right.sum()) / n,
        "clean_ci95": wilson(int(right.sum()), n),
        "certified_accuracy": int(robust.sum()) / n,
        "certified_ci95": wilson(int(robust.sum()), n),
        "seed": config["seed"],
        "versions": config["versions"],
    }
    if config["dataset_note"]:
        summary["dataset_note"] = config["dataset_note"]
    sides = read_evidence(out, ["largest_patch"])["largest_patch"].to_pylist()
    largest = np.array([-1 if side is None else side for side in sides])
    if (largest >= 0).all():
        sides = range(1, min(config["image_size"]) + 1)
        summary["certified_by_patch"] = {str(side): int((right & (largest >= side)).sum()) / n for side in sides}
    return summary


def _process_shard(job: Job, out: Path, config: dict[str, Any], first: int, notify: Callable[[int], None]) -> pa.Table:
    """Evaluate a part, and write it."""
    indices, images = part_of(job, config, first)
    evidence = job.defense.evidence(images)
    certificate, largest = job.defense.certificate(evidence, job.threat), job.defense.largest_patch(evidence)
    return store(
        job, out, config, indices, evidence, certificate, [None] * len(indices) if largest is None else largest.tolist()
    )


def store(
    job: Job,
    out: Path,
    config: dict[str, Any],
    indices: range,
    evidence: Evidence,
    certificate: Certificate,
    largest: list[int | None],
) -> pa.Table:
    """Write a part; gives its records."""
    records = _records(job, indices, certificate, evidence)
    write_part(out, config, records, evidence_rows(list(indices), evidence, largest))
    return records


def _records(job: Job, indices: range, certificate: Certificate, evidence: Evidence) -> pa.Table:
    weakest = certificate.weakest.tolist()
    boxes = [certificate.box(location) or (None,) * 4 for location in weakest]
    n = len(indices)
    return pa.table(
        {
            "index": list(indices),
            "sha256": [job.pictures.sha256(i) for i in indices],
            "target": job.pictures.labels[indices.start : indices.stop].tolist(),
            "label": certificate.label.tolist(),
            "alarm": [False] * n if certificate.alarm is None else certificate.alarm.tolist(),
            "certified": certificate.certified.tolist(),
            "margin": certificate.margin.amin(1).tolist(),
            **{
                f"weakest_{side}": [box[i] for box in boxes]
                for i, side in enumerate(("top", "left", "height", "width"))
            },
            "passes": [job.defense.forward_passes(job.image_size)] * n
            if evidence.passes is None
            else evidence.passes.tolist(),
        },
        RECORD,
    )


def _counts(records: pa.Table) -> dict[str, int]:
    right = (np.asarray(records["label"]) == np.asarray(records["target"])) & ~np.asarray(records["alarm"])
    return {"clean": int(right.sum()), "certified": int((right & np.asarray(records["certified"])).sum())}


def _timing(job: Job, out: Path, images: int, seconds: float) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    probe = job.pictures.images(range(1)).to(job.device)
    with FlopCounterMode(display=False) as counter, job.defense.reference_backend():
        evidence = job.defense.evidence(probe)
    passes = job.defense.forward_passes(job.image_size) if evidence.passes is None else int(evidence.passes.sum())
    timing = {
        "images_per_second": round(images / max(seconds, 1e-9), 2),
        "forward_passes_per_image": passes,
        "multiply_adds_per_image": counter.get_total_flops() // 2,
        "device": f"{probe.device.type}, {torch.get_num_threads()} threads",
    }
    return _over_all(timing, out)


def _over_all(timing: dict[str, Any], out: Path) -> dict[str, Any]:
    """Speed, with the mean number of passes over all images if images differ in it."""
    mean = float(np.mean(np.asarray(read_records(out)["passes"])))
    if (one := timing["forward_passes_per_image"]) == mean:
        return timing
    adds = round(timing["multiply_adds_per_image"] * mean / one)
    return timing | {"forward_passes_per_image": round(mean, 2), "multiply_adds_per_image": adds}


EVALUATE = RunType(_process_shard, _counts, summarize, _timing, check_certificates)
