"""Counts a finished run again: its files are those that were written, and its certificates follow from its evidence.

A digest finds accidents, not forgers: whoever rewrites a file can write its digest too. Certificates are therefore
computed again from the evidence, and labels are compared with the data's. Evidence itself is taken on trust.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from certipatch.certificate import Certificate
from certipatch.defenses import Evidence
from certipatch.errors import InputError
from certipatch.runs.folder import parts
from certipatch.runs.records import AGAIN, read_evidence, read_part, read_records, stored_evidence

CHUNK = 250  # pictures whose certificates are computed at once
NUMBERS = 2**22  # margins that are held at once


def check_digests(out: Path, config: dict[str, Any]) -> None:
    """InputError where a part's records or evidence are no longer what the run wrote."""
    changed = [first for first in parts(config) if read_part(out, config, first) is None]
    if changed:
        raise InputError(
            f"{out}: records, evidence or config.yaml were changed after they were written, in {len(changed)} parts, the "
            f"first from picture {changed[0]} on; {AGAIN}"
        )


def check_summary(out: Path, stored: dict[str, Any], counted: dict[str, Any]) -> None:
    """InputError where a finished run's summary does not say what its records say."""
    counted = json.loads(json.dumps(counted))
    for key in counted:
        if stored.get(key) != counted[key]:
            written, recounted = (str(values.get(key))[:60] for values in (stored, counted))
            raise InputError(f"{out}: summary.json says {key} {written}, its records {recounted}; {AGAIN}")


def check_certificates(job: Any, out: Path) -> None:
    """InputError where records do not follow from the pictures and the stored evidence of an evaluation.

    Labels, verdicts and margins of all pictures are computed again, where evidence is stored; a verdict may differ only
    where the margin is zero but for the rounding of stored scores.
    """
    records, evidence = read_records(out), read_evidence(out)
    if len(records) != len(job.pictures) or records["index"].to_pylist() != evidence["index"].to_pylist():
        raise InputError(f"{out} lacks records of some pictures; run evaluate again")
    if records["index"].to_pylist() != list(range(len(records))):
        raise InputError(f"{out}: records are not one for each picture, in order; {AGAIN}")
    wrong = np.flatnonzero(np.asarray(records["target"]) != np.asarray(job.pictures.labels[: len(records)]))
    if len(wrong):
        raise InputError(f"{out}: the target of picture {wrong[0]} is not the label that the data gives it; {AGAIN}")
    step, first = 1, 0
    while first < len(records):
        index = list(range(first, min(first + step, len(records))))
        again = stored_certificate(job, evidence.slice(first, len(index)), index)
        if again is None:
            return  # evidence was too large to be stored, of this picture and all others
        check_same(out, records.slice(first, len(index)), again[0])
        first, step = first + len(index), max(1, min(CHUNK, NUMBERS // again[0].margin.shape[1]))


def stored_certificate(job: Any, rows: pa.Table, index: list[int]) -> tuple[Certificate, Evidence] | None:
    """Certificates of some pictures from their stored evidence; None where it was too large to be stored."""
    views = job.defense.number_of_views(job.image_size)
    try:
        evidence = stored_evidence(rows, views, len(job.class_names), job.image_size)
    except (ValueError, RuntimeError):
        raise InputError(f"evidence of pictures {index[0]} to {index[-1]} is damaged; run evaluate again") from None
    return None if evidence is None else (job.defense.certificate(evidence, job.threat), evidence)


def check_same(out: Path, records: pa.Table, again: Certificate) -> None:
    """InputError where stored evidence does not give the recorded label, margin and verdict."""
    label, certified, margin = (np.asarray(records[name]) for name in ("label", "certified", "margin"))
    alarm = torch.zeros_like(again.certified) if again.alarm is None else again.alarm
    expected = again.margin.amin(1).cpu().numpy()
    with np.errstate(invalid="ignore"):
        off = np.where(margin == expected, 0.0, np.abs(margin - expected))
        close = off <= 1e-6 * (1 + np.abs(expected))
        at_zero = np.abs(expected) <= 1e-6
    fits = close & (label == again.label.cpu().numpy()) & (np.asarray(records["alarm"]) == alarm.cpu().numpy())
    fits &= (certified == again.certified.cpu().numpy()) | at_zero
    if not fits.all():
        picture = records["index"][int(np.flatnonzero(~fits)[0])].as_py()
        raise InputError(
            f"{out}: the stored evidence does not give the recorded certificates, first of picture {picture}; run "
            "evaluate again"
        )
