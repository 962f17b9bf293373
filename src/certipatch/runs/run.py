"""Run folders: an evaluation that stops anywhere and resumes to the same summary, to the byte.

config.yaml          all settings; a folder belongs to one configuration
records/part-*.parquet    one row per image, written atomically, part by part
evidence/part-*.parquet   the votes or scores behind each row, for re-checking
summary.json         deterministic results
timing.json          speed of this machine

Several workers share the folder. The first lists the missing parts. Each worker takes the next part, makes it, and ends
when none is left. The first waits for the others' parts, makes the parts that do not come, and merges.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import torch

from certipatch.errors import InputError
from certipatch.plumbing.distributed import Workers
from certipatch.plumbing.files import write_json
from certipatch.plumbing.versions import versions
from certipatch.runs.folder import (
    IGNORED_KEYS,
    difference,
    parts,
    prepare_run_folder,
    remove_temporaries,
    yaml_round_trip,
)
from certipatch.runs.records import part_path, read_part
from certipatch.runs.verify import check_digests, check_summary

PART = 250  # images per record file; a killed run loses at most one file
PATIENCE = 120.0  # seconds without a new part, or four times the longest, after which the first worker makes it itself
Progress = Callable[[int, int, str], None]


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
class RunType:
    """A kind of run over the images of a job: part by part, then summed up."""

    process_shard: Callable[[Any, Path, dict[str, Any], int, Callable[[int], None]], pa.Table]
    """Job, run folder, configuration, first image, and a function to tell how many images of the part are done → the
    part's records, written."""
    counts: Callable[[pa.Table], dict[str, int]]
    """Records → the number of images with each outcome, by name."""
    summarize: Callable[[dict[str, Any], Path, Any], dict[str, Any]]
    """Configuration, run folder, defense → summary."""
    timing: Callable[[Any, Path, int, float], dict[str, Any]]
    """Job, run folder, images, seconds → speed."""
    check: Callable[[Any, Path], None] | None = None
    """Job, run folder → InputError if records of a finished run do not follow from its evidence."""


def run_shards(
    job: Any,
    run_type: RunType,
    out: Path,
    progress: Progress = lambda done, total, text: None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Go through the images of a job into the run folder ``out``; gives the summary.

    Parts that are there are kept; damaged and foreign ones are made again. A finished run is left as it is. Of several
    ``workers`` the first gives the summary, shows progress and ends last; the others give an empty dictionary.

    Errors: InputError if ``out`` holds another configuration, or cannot be written.
    """
    workers = workers or Workers()
    plan = workers.share(lambda: prepare_run_folder(job.config(), out))
    if plan["summary"] is not None:
        if workers.first:
            _check_finished(job, run_type, out, plan)
        return plan["summary"]
    config, missing = plan["config"], plan["missing"]
    if not workers.first:
        _same_job(job.config(config["dataset_sha256"]), config, workers)
    shard_progress = _ShardProgress(job, run_type, out, config, progress)
    if workers.first:
        shard_progress.show_progress(0)
    job.defense.check(job.pictures.images(range(1)).to(job.device))  # tolerances from the same image everywhere
    if workers.first:
        shard_progress.count_new_shards()
    started, longest = time.monotonic(), 0.0
    for ticket in workers.tickets(len(missing)):
        began = time.monotonic()
        records = run_type.process_shard(job, out, config, missing[ticket], shard_progress.show_progress)
        longest = max(longest, time.monotonic() - began)
        if workers.first:
            shard_progress.add(missing[ticket], records)
            if workers.count > 1:
                shard_progress.count_new_shards()
    if not workers.first:
        return {}
    fresh = time.monotonic()
    while left := [first for first in missing if first not in shard_progress.seen]:
        if shard_progress.count_new_shards():
            longest, fresh = max(longest, time.monotonic() - fresh), time.monotonic()
        elif time.monotonic() - fresh > max(PATIENCE, 4 * longest):
            shard_progress.add(left[0], run_type.process_shard(job, out, config, left[0], shard_progress.show_progress))
        else:
            time.sleep(0.05)
    seconds = time.monotonic() - started
    summary = run_type.summarize(config, out, job.defense)
    count = workers.count
    if not missing and not (out / "timing.json").exists():  # killed between the last part and here: one part once more
        started = time.monotonic()
        run_type.process_shard(job, out, config, 0, lambda done: None)
        seconds, missing, count = time.monotonic() - started, [0], 1
    if missing:
        evaluated = sum(len(_indices(config, first)) for first in missing)
        timing = run_type.timing(job, out, evaluated, seconds)
        write_json(out / "timing.json", timing | {"workers": count})
    write_json(out / "summary.json", summary)
    remove_temporaries(out)
    return summary


def _check_finished(job: Any, run_type: RunType, out: Path, plan: dict[str, Any]) -> None:
    """InputError if a finished run's files were changed, or disagree with its summary."""
    check_digests(out, plan["config"])
    if run_type.check is not None:
        run_type.check(job, out)
    check_summary(out, plan["summary"], run_type.summarize(plan["config"], out, job.defense))


def _same_job(own: dict[str, Any], config: dict[str, Any], workers: Workers) -> None:
    """InputError unless this worker has the same configuration as the first."""
    if key := difference(config, yaml_round_trip(own), IGNORED_KEYS):
        first, here = (str(values.get(key))[:60] for values in (config, own))
        raise InputError(f"workers differ: {key} is {first} for the first, {here} for worker {workers.rank}")


def _indices(config: dict[str, Any], first: int) -> range:
    return range(first, min(first + config["part"], config["images"]))


@final
class _ShardProgress:
    """The parts that are there, and the outcomes of their images."""

    def __init__(self, job: Any, run_type: RunType, out: Path, config: dict[str, Any], progress: Progress):
        self.seen: set[int] = set()
        self._job, self._run_type, self._out, self._config, self._progress = job, run_type, out, config, progress
        self._images, self._counts, self._text = 0, Counter(), ""

    def add(self, first: int, records: pa.Table) -> None:
        """Count the records of the part that begins with image ``first``, and show how far the run is."""
        self.seen.add(first)
        self._images += len(records)
        self._counts.update(self._run_type.counts(records))
        self._text = ", ".join(f"{name} {number / self._images:.1%}" for name, number in self._counts.items())
        self._progress(self._images, self._config["images"], self._text)

    def show_progress(self, done: int) -> None:
        """Show that ``done`` images of the part at work are done."""
        self._progress(min(self._images + done, self._config["images"]), self._config["images"], self._text)

    def count_new_shards(self) -> bool:
        """Count the parts that are there and not yet counted; True if there were any.

        Errors: InputError if another worker read other images than this one.
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
    """Numbers and images of a part, on the job's device. InputError if the images do not have the job's size."""
    indices = _indices(config, first)
    images = job.pictures.images(indices)
    if tuple(images.shape[2:]) != tuple(job.image_size):
        raise InputError(
            f"{job.pictures.name} has pictures of {images.shape[2]}x{images.shape[3]} pixels, but {job.defense_name} "
            f"reads {job.image_size[0]}x{job.image_size[1]}"
        )
    return indices, images.to(job.device)
