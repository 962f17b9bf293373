"""Run folders: an evaluation that stops anywhere and resumes to the same summary, to the byte.

config.yaml          all settings; a folder belongs to one configuration
records/part-*.parquet    one row per picture, written atomically, part by part
evidence/part-*.parquet   the votes or scores behind each row, for re-checking
summary.json         deterministic results
timing.json          speed of this machine

Several workers share the folder. The first says which parts are missing; each takes the next one, makes it and ends
when there are none left; the first waits for the others' parts, makes those that do not come, and merges.
"""

import time
from collections import Counter
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
from certipatch.errors import InputError
from certipatch.evaluation.claim import FREE, claim, difference, parts, plain, sweep
from certipatch.evaluation.files import write_json
from certipatch.evaluation.metrics import wilson
from certipatch.evaluation.records import (
    RECORD,
    evidence_rows,
    part_path,
    read_evidence,
    read_part,
    read_records,
    write_part,
)
from certipatch.threats import Threat
from certipatch.versions import versions
from certipatch.workers import Workers

CPU = torch.device("cpu")
PART = 250  # pictures per record file; the batch that a killed run loses
PATIENCE = 120.0  # seconds without a new part, or four times the longest, after which the first worker makes it itself
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
    part: int = field(default_factory=lambda: PART)
    """Pictures per record file."""

    def config(self, dataset_sha256: str | None = None) -> dict[str, Any]:
        """All settings, as plain values; ``source``, ``model`` and ``versions`` tell where from and with what.

        ``dataset_sha256`` is computed from all pictures, unless it is given.
        """
        return configuration("evaluate", self, dataset_sha256, threat=self.threat.to_dict())


def configuration(command: str, job: Any, dataset_sha256: str | None, **own: Any) -> dict[str, Any]:
    """The settings of a job as plain values: those that all jobs have, and those of its own command."""
    return {
        "command": command,
        "defense": job.defense_name,
        "method": job.defense.name,
        "settings": job.defense.settings(),
        "model_sha256": job.model_sha256,
        "image_size": list(job.image_size),
        "classes": list(job.class_names),
        "dataset": job.pictures.name,
        "dataset_sha256": dataset_sha256 or job.pictures.fingerprint(),
        "dataset_note": job.pictures.note,
        "split": job.pictures.split,
        "images": len(job.pictures),
        **own,
        "seed": job.seed,
        "part": job.part,
        "source": job.pictures.source,
        "model": job.opened,
        "versions": versions(),
    }


@final
@dataclass(frozen=True)
class Kind:
    """What is done with the pictures of a job: part by part, then summed up.

    make: job, run folder, configuration, first picture, and what to tell when further pictures of the part are done →
    the part's records, written. counts: how many pictures of some records have which outcomes, by name. summarize:
    configuration, run folder, defense → summary. timing: job, pictures, seconds → speed.
    """

    make: Callable[[Any, Path, dict[str, Any], int, Callable[[int], None]], pa.Table]
    counts: Callable[[pa.Table], dict[str, int]]
    summarize: Callable[[dict[str, Any], Path, Any], dict[str, Any]]
    timing: Callable[[Any, int, float], dict[str, Any]]


def evaluate(
    job: Job, out: Path, progress: Progress = lambda done, total, text: None, workers: Workers | None = None
) -> dict[str, Any]:
    """Certify every picture of ``job`` into the run folder ``out``; gives the summary. As ``work``."""
    return work(job, EVALUATE, out, progress, workers)


def work(
    job: Any, kind: Kind, out: Path, progress: Progress = lambda done, total, text: None, workers: Workers | None = None
) -> dict[str, Any]:
    """Go through the pictures of a job into the run folder ``out``; gives the summary.

    Parts that are there are kept; damaged and foreign ones are made again. A finished run is left as it is. Of several
    ``workers`` the first gives the summary, shows progress and ends last; the others give an empty dictionary.

    Errors: InputError where ``out`` holds another configuration, or cannot be written.
    """
    workers = workers or Workers()
    plan = workers.share(lambda: claim(job.config(), out))
    if plan["summary"] is not None:
        return plan["summary"]
    config, missing = plan["config"], plan["missing"]
    if not workers.first:
        _same_job(job.config(config["dataset_sha256"]), config, workers)
    tally = _Tally(job, kind, out, config, progress)
    if workers.first:
        tally.within(0)
    job.defense.check(job.pictures.images(range(1)).to(job.device))  # tolerances from the same picture everywhere
    if workers.first:
        tally.look()
    started, longest = time.monotonic(), 0.0
    for ticket in workers.tickets(len(missing)):
        began = time.monotonic()
        records = kind.make(job, out, config, missing[ticket], tally.within)
        longest = max(longest, time.monotonic() - began)
        if workers.first:
            tally.add(missing[ticket], records)
            if workers.count > 1:
                tally.look()
    if not workers.first:
        return {}
    fresh = time.monotonic()
    while left := [first for first in missing if first not in tally.seen]:
        if tally.look():
            longest, fresh = max(longest, time.monotonic() - fresh), time.monotonic()
        elif time.monotonic() - fresh > max(PATIENCE, 4 * longest):
            tally.add(left[0], kind.make(job, out, config, left[0], tally.within))
        else:
            time.sleep(0.05)
    seconds = time.monotonic() - started
    summary = kind.summarize(config, out, job.defense)
    count = workers.count
    if not missing and not (out / "timing.json").exists():  # killed between the last part and here: one part once more
        started = time.monotonic()
        kind.make(job, out, config, 0, lambda done: None)
        seconds, missing, count = time.monotonic() - started, [0], 1
    if missing:
        evaluated = sum(len(_indices(config, first)) for first in missing)
        timing = kind.timing(job, evaluated, seconds)
        timing = _over_all(timing, out) if kind is EVALUATE else timing
        write_json(out / "timing.json", timing | {"workers": count})
    write_json(out / "summary.json", summary)
    sweep(out)
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


def _same_job(own: dict[str, Any], config: dict[str, Any], workers: Workers) -> None:
    """InputError unless this worker would do what the first one does."""
    if key := difference(config, plain(own), FREE):
        first, here = (str(values.get(key))[:60] for values in (config, own))
        raise InputError(f"workers differ: {key} is {first} for the first, {here} for worker {workers.rank}")


def _indices(config: dict[str, Any], first: int) -> range:
    return range(first, min(first + config["part"], config["images"]))


@final
class _Tally:
    """The parts that are there, and the outcomes of their pictures."""

    def __init__(self, job: Any, kind: Kind, out: Path, config: dict[str, Any], progress: Progress):
        self.seen: set[int] = set()
        self._job, self._kind, self._out, self._config, self._progress = job, kind, out, config, progress
        self._images, self._counts, self._text = 0, Counter(), ""

    def add(self, first: int, records: pa.Table) -> None:
        """Count the records of the part that begins with picture ``first``, and show how far the run is."""
        self.seen.add(first)
        self._images += len(records)
        self._counts.update(self._kind.counts(records))
        self._text = ", ".join(f"{name} {number / self._images:.1%}" for name, number in self._counts.items())
        self._progress(self._images, self._config["images"], self._text)

    def within(self, done: int) -> None:
        """Show that ``done`` pictures of the part at work are done."""
        self._progress(min(self._images + done, self._config["images"]), self._config["images"], self._text)

    def look(self) -> bool:
        """Count the parts that are there and not yet counted; whether there were any.

        Errors: InputError where another worker read other pictures than this one.
        """
        names, before = {path.name for path in (self._out / "records").iterdir()}, len(self.seen)
        for first in parts(self._config):
            if first in self.seen or part_path(self._out, "records", first).name not in names:
                continue
            records = read_part(self._out, self._config, first)
            if records is not None:
                self._check_pictures(records)
                self.add(first, records)
        return len(self.seen) > before

    def _check_pictures(self, records: pa.Table) -> None:
        pictures = self._job.pictures
        for index, sha256 in zip(records["index"].to_pylist(), records["sha256"].to_pylist(), strict=True):
            if pictures.sha256(index) != sha256:
                raise InputError(
                    f"picture {index} of {pictures.name} is not the same on all hosts; give all the same data"
                )


def part_of(job: Any, config: dict[str, Any], first: int) -> tuple[range, torch.Tensor]:
    """Numbers and pictures of a part, on the job's device. InputError where they do not have its size."""
    indices = _indices(config, first)
    images = job.pictures.images(indices)
    if tuple(images.shape[2:]) != tuple(job.image_size):
        raise InputError(
            f"{job.pictures.name} has pictures of {images.shape[2]}x{images.shape[3]} pixels, but {job.defense_name} "
            f"reads {job.image_size[0]}x{job.image_size[1]}"
        )
    return indices, images.to(job.device)


def _make(job: Job, out: Path, config: dict[str, Any], first: int, notify: Callable[[int], None]) -> pa.Table:
    """Evaluate a part, and write it."""
    indices, images = part_of(job, config, first)
    evidence = job.defense.evidence(images)
    found, largest = job.defense.certificate(evidence, job.threat), job.defense.largest_patch(evidence)
    return store(
        job, out, config, indices, evidence, found, [None] * len(indices) if largest is None else largest.tolist()
    )


def store(
    job: Job,
    out: Path,
    config: dict[str, Any],
    indices: range,
    evidence: Evidence,
    found: Certificate,
    largest: list[int | None],
) -> pa.Table:
    """Write a part; gives its records."""
    records = _records(job, indices, found, evidence)
    write_part(out, config, records, evidence_rows(list(indices), evidence, largest))
    return records


def _records(job: Job, indices: range, found: Certificate, evidence: Evidence) -> pa.Table:
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
            "passes": [job.defense.forward_passes(job.image_size)] * n
            if evidence.passes is None
            else evidence.passes.tolist(),
        },
        RECORD,
    )


def _counts(records: pa.Table) -> dict[str, int]:
    right = (np.asarray(records["label"]) == np.asarray(records["target"])) & ~np.asarray(records["alarm"])
    return {"clean": int(right.sum()), "certified": int((right & np.asarray(records["certified"])).sum())}


def _over_all(timing: dict[str, Any], out: Path) -> dict[str, Any]:
    """Speed with the mean number of passes over all pictures, where pictures differ in that."""
    mean = float(np.mean(np.asarray(read_records(out)["passes"])))
    if (one := timing["forward_passes_per_image"]) == mean:
        return timing
    adds = round(timing["multiply_adds_per_image"] * mean / one)
    return timing | {"forward_passes_per_image": round(mean, 2), "multiply_adds_per_image": adds}


def _timing(job: Job, images: int, seconds: float) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    probe = job.pictures.images(range(1)).to(job.device)
    with FlopCounterMode(display=False) as counter, job.defense.as_given():
        evidence = job.defense.evidence(probe)
    passes = job.defense.forward_passes(job.image_size) if evidence.passes is None else int(evidence.passes.sum())
    return {
        "images_per_second": round(images / max(seconds, 1e-9), 2),
        "forward_passes_per_image": passes,
        "multiply_adds_per_image": counter.get_total_flops() // 2,
        "device": f"{probe.device.type}, {torch.get_num_threads()} threads",
    }


EVALUATE = Kind(_make, _counts, summarize, _timing)
