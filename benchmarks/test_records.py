"""The cost of storing records: one part of 250 pictures of the shipped sample, 28x28, 28 column bands, 5x5 patches.

Certifying is all that a result needs: decoding, the network, margins for 576 places, the largest certified square.
Storing is all that a run folder adds: hashes of the pictures, rows, evidence, digests, and two files forced to the disk.
"""

from pathlib import Path

import pytest

import certipatch as cp
from certipatch.runs.evaluate import Job, store
from certipatch.runs.folder import prepare_run_folder
from certipatch.runs.run import PART
from certipatch.saved import open_defense

GROUP = "certify 250 pictures, and store what was found"


@pytest.fixture(scope="module")
def job() -> Job:
    defense, card = open_defense("fashion-columns")
    pictures = cp.data.load("fashion-sample", limit=PART)
    return Job(defense, card.name, card.sha256, card.image_size, card.classes, pictures, cp.PatchThreat(5))


def certify(job: Job) -> tuple:
    evidence = job.defense.evidence(job.pictures.images(range(PART)))
    found, largest = job.defense.certificate(evidence, job.threat), job.defense.largest_patch(evidence)
    assert largest is not None
    return evidence, found, largest.tolist()


@pytest.mark.benchmark(group=GROUP)
def test_certify(benchmark, job: Job) -> None:
    _, found, _ = benchmark(lambda: certify(job))
    assert found.certified.any()


@pytest.mark.benchmark(group=GROUP)
def teststore(benchmark, job: Job, tmp_path: Path) -> None:
    config = prepare_run_folder(job.config(), tmp_path / "run")["config"]
    found = certify(job)
    rows = benchmark(lambda: store(job, tmp_path / "run", config, range(PART), *found))
    assert len(rows) == PART
