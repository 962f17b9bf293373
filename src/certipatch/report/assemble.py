"""From certificates and run folders to the pictures and the page of a report."""

from pathlib import Path
from typing import Any

import numpy as np

from certipatch.certificate import Certificate
from certipatch.evaluation.files import read_config, read_json
from certipatch.evaluation.records import read_evidence, read_records, stored_evidence
from certipatch.evaluation.run import Job
from certipatch.report.document import page
from certipatch.report.shown import Shown

GALLERY = 40  # pictures in the report of a run


def of_run(job: Job, out: Path, summary: dict[str, Any]) -> str:
    """The page of a finished run, with pictures taken evenly from it, those of largest margin first."""
    records, evidence = read_records(out), read_evidence(out)
    chosen = np.unique(np.linspace(0, len(records) - 1, min(GALLERY, len(records))).round().astype(int))
    views = job.defense.number_of_views(job.image_size)
    stored = stored_evidence(evidence.take(chosen), views, len(job.class_names), job.image_size)
    if stored is None:
        stored = job.defense.evidence(job.pictures.images(chosen.tolist()).to(job.device))
    found = job.defense.certificate(stored, job.threat)
    largest = evidence["largest_patch"].take(chosen).to_pylist()
    pixels = job.pictures.pixels(chosen.tolist())
    shown = [
        shown_picture(
            pixels[i], f"picture {index}", found, i, job.class_names, largest[i], int(job.pictures.labels[index])
        )
        for i, index in enumerate(chosen.tolist())
    ]
    shown.sort(key=lambda picture: -picture.margin)
    timing = read_json(out / "timing.json") if (out / "timing.json").exists() else None
    return page(read_config(out), summary, timing, shown)


def shown_picture(
    image: np.ndarray,
    title: str,
    found: Certificate,
    i: int,
    classes: tuple[str, ...],
    largest: int | None,
    target: int | None,
) -> Shown:
    """One picture of a report's gallery."""
    location = int(found.weakest[i])
    single = found.sees is not None and found.sees.choices.shape[1] == 1
    return Shown(
        image=image,
        title=title,
        target=None if target is None else classes[target],
        label=classes[int(found.label[i])],
        certified=bool(found.certified[i]),
        margin=found.margin[i, location].item(),
        weakest=found.box(location),
        largest_patch=largest,
        map=found.map(i).numpy() if single else None,
    )
