"""From certificates and run folders to the images and the page of a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from certipatch.certificate import Certificate
from certipatch.defenses import Evidence
from certipatch.plumbing.files import read_config, read_json
from certipatch.report.document import page
from certipatch.report.images import STATES, ExplorerData, ReportImage, evenly
from certipatch.report.places import Places, places
from certipatch.runs.evaluate import Job
from certipatch.runs.records import read_evidence, read_records
from certipatch.runs.verify import check_certificates, stored_certificate

GALLERY = 1000  # images in the report of a run, at most
PIXELS = 2**24  # of all of them together
RECOMPUTED = 60  # images if evidence was too large to be stored and needs the network again
NUMBERS = 2**22  # margins that are held at once


def of_run(job: Job, out: Path, summary: dict[str, Any]) -> str:
    """The page of a finished run, with up to GALLERY images taken evenly from it.

    Errors: InputError if records and evidence of the run do not belong together.
    """
    check_certificates(job, out)
    records, evidence = read_records(out), read_evidence(out)
    stored = evidence.slice(0, 1)
    complete = stored["votes"].null_count == 0 or stored["scores"].null_count == 0
    height, width = job.image_size
    most = min(GALLERY, max(1, PIXELS // (height * width)), GALLERY if complete else RECOMPUTED)
    chosen = evenly(len(records), most)
    shown, where, step = [], None, 1
    first = 0
    while first < len(chosen):
        part = chosen[first : first + step]
        certificate, behind = stored_certificate(job, evidence.take(part), part) or _certify_again(job, part)
        if first == 0:
            where = places(job.defense, certificate, job.image_size, job.class_names)
            step = max(1, min(250, NUMBERS // certificate.margin.shape[1]))
        shown += shown_pictures(
            job.pictures.pixels(part),
            [f"picture {index}" for index in part],
            certificate,
            behind,
            where,
            job.class_names,
            evidence["largest_patch"].take(part).to_pylist(),
            job.pictures.labels[part].tolist(),
        )
        first += len(part)
    timing = read_json(out / "timing.json") if (out / "timing.json").exists() else None
    return page(read_config(out), summary, timing, shown, where, outcomes(records))


def outcomes(records: pa.Table) -> dict[str, int]:
    """The number of images of a run in each state of ``ReportImage.state``."""
    alarm, certified = (np.asarray(records[name]) for name in ("alarm", "certified"))
    right = np.asarray(records["label"]) == np.asarray(records["target"])
    state = np.select([alarm, ~right, certified], [3, 2, 0], 1)
    return {name: int((state == i).sum()) for i, name in enumerate(STATES)}


def shown_pictures(
    images: np.ndarray,
    titles: Sequence[str],
    certificate: Certificate,
    evidence: Evidence | None,
    where: Places | None,
    classes: tuple[str, ...],
    largest: Sequence[int | None],
    targets: Sequence[int] | None,
) -> list[ReportImage]:
    """Images of a report, in the order of the certificate.

    Args:
        images: uint8 (B, H, W, C).
        titles: names of the images.
        certificate: the certificates of the images.
        evidence: the evidence for the explorer; None leaves the images out of it.
        where: the locations of the threat, from ``places``, or None.
        classes: names of the classes.
        largest: side of the largest certified square of each, or None.
        targets: true classes; None for the user's own images.
    """
    single = certificate.sees is not None and certificate.sees.choices.shape[1] == 1
    rows = counted = unsure = None
    if where is not None and evidence is not None:
        margin = certificate.margin.cpu()
        rows = margin[:, where.first]
        if not torch.equal(rows[:, where.relation.row_of], margin):
            raise RuntimeError("margins differ between places that the same views see; this is a bug, please report it")
        rows = rows.numpy()
        counted = where.counted(evidence.values)
        unsure = None if evidence.unsure is None else evidence.unsure.cpu().numpy()
    certified, shown = certificate.certified.tolist(), []
    for i, weakest in enumerate(certificate.weakest.tolist()):
        answer, target = int(certificate.label[i]), None if targets is None else targets[i]
        explored = None
        if rows is not None and counted is not None:
            explored = ExplorerData(answer, target, rows[i], counted[i], None if unsure is None else unsure[i])
        shown.append(
            ReportImage(
                image=images[i],
                title=titles[i],
                target=None if target is None else classes[target],
                label=classes[answer],
                certified=certified[i],
                margin=certificate.margin[i, weakest].item(),
                weakest=certificate.box(weakest),
                largest_patch=largest[i],
                map=certificate.map(i).numpy() if single else None,
                alarm=certificate.alarm is not None and bool(certificate.alarm[i]),
                explored=explored,
            )
        )
    return shown


def _certify_again(job: Job, index: list[int]) -> tuple[Certificate, Evidence]:
    """The certificates of some images from the network, if evidence was too large to be stored."""
    evidence = job.defense.evidence(job.pictures.images(index).to(job.device))
    return job.defense.certificate(evidence, job.threat), evidence
