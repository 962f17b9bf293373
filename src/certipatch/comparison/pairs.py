"""Runs paired over the images that both evaluated."""

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, final

import numpy as np
from jaxtyping import Bool, Int8

from certipatch.comparison.names import name_runs
from certipatch.comparison.paired import Paired, paired
from certipatch.comparison.runs import CERTIFIED, NOT_EVALUATED, RIGHT, Run, read_run
from certipatch.errors import InputError
from certipatch.threats import PatchThreat

MAX_ALL_PAIRS = 4  # runs up to which every pair is compared; beyond, each with the first
LETTERS = string.ascii_uppercase
MAX_RUNS = len(LETTERS)


@final
@dataclass(frozen=True)
class Pair:
    """Run ``second`` minus run ``first``, on ``n`` images that both evaluated."""

    first: int
    second: int
    n: int
    clean: Paired | None = None
    """None if the runs share no image."""
    certified: Paired | None = None
    """None if certified accuracies are ``incomparable``."""
    incomparable: Literal["pictures", "notion", "threat"] | None = None
    """The difference that keeps certified accuracies from being compared."""
    reason: str | None = None
    """The difference in a sentence."""


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """Two or more runs over P different images in all."""

    runs: tuple[Run, ...]
    pictures: tuple[tuple[str, int], ...]
    """(sha256, index in the first run that has it) of every image."""
    outcomes: Int8[np.ndarray, "P R"]
    """Per image and run a code of ``OUTCOMES``, or NOT_EVALUATED."""
    rows: tuple[np.ndarray, ...]
    """Per run, the row of each of its images."""
    pairs: tuple[Pair, ...]

    @property
    def letters(self) -> str:
        """Short names of the runs: ABC…"""
        return LETTERS[: len(self.runs)]

    def named_runs(self) -> Iterator[tuple[str, Run]]:
        """Every run with its letter."""
        return zip(self.letters, self.runs, strict=True)

    def certified_only_by(self, i: int, j: int) -> np.ndarray:
        """Rows of the images that runs i and j both evaluated and only run i certifies."""
        one, other = self.outcomes[:, i], self.outcomes[:, j]
        return np.flatnonzero((one == CERTIFIED) & (other != CERTIFIED) & (other != NOT_EVALUATED))

    def title(self) -> str:
        data = list(dict.fromkeys(run.data for run in self.runs))
        return f"{len(self.runs)} runs on " + " and ".join(data if len(data) < 4 else [*data[:2], "others"])

    def agreement(self) -> dict[str, int] | None:
        """Numbers of images that all runs certify, none does, or one alone; None for fewer than three runs.

        Counted over the runs whose certificates are comparable with the first's.
        """
        members = [0, *(pair.second for pair in self.pairs if pair.first == 0 and pair.certified)]
        outcomes = self.outcomes[:, members]
        outcomes = outcomes[(outcomes != NOT_EVALUATED).all(1)]
        if len(members) < 3 or not len(outcomes):
            return None
        certified = outcomes == CERTIFIED
        count = certified.sum(1)
        counts = {"pictures": len(outcomes), "all": int((count == len(members)).sum()), "none": int((count == 0).sum())}
        alone = certified[count == 1].sum(0).tolist()
        return counts | {f"only {self.letters[i]}": number for i, number in zip(members, alone, strict=True)}


def compare(folders: Sequence[Path]) -> Comparison:
    """Read and compare finished runs of ``evaluate``. InputError for one run alone, a run given twice, or no run."""
    if len(folders) < 2:
        raise InputError("compare needs two or more run folders; give another")
    if len(folders) > MAX_RUNS:
        raise InputError(f"compare takes at most {MAX_RUNS} runs, not {len(folders)}")
    for path, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise InputError(f"{path} is given {count} times; give different runs")
    return compare_runs([read_run(folder) for folder in folders])


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs that were read."""
    runs = name_runs(runs)
    pictures, rows = _align(runs)
    outcomes = np.full((len(pictures), len(runs)), NOT_EVALUATED, np.int8)
    for i, run in enumerate(runs):
        outcomes[rows[i], i] = run.outcome
    chosen = [(i, j) for i, j in combinations(range(len(runs)), 2) if i == 0 or len(runs) <= MAX_ALL_PAIRS]
    pairs = tuple(_pair(runs, outcomes, i, j) for i, j in chosen)
    return Comparison(tuple(runs), tuple(pictures), outcomes, tuple(rows), pairs)


def same_attacker(a: Run, b: Run) -> bool:
    """Return True if two runs have one threat on images of one size; ``2%`` may be ``4x4``."""
    if a.image_size != b.image_size or a.threat == b.threat:
        return a.image_size == b.image_size
    one, other = a.threat, b.threat
    if not isinstance(one, PatchThreat) or not isinstance(other, PatchThreat) or one.shape or other.shape:
        return False
    same_places = (one.count, one.where) == (other.count, other.where)
    return same_places and one.masks(a.image_size) == other.masks(b.image_size)


def _align(runs: Sequence[Run]) -> tuple[list[tuple[str, int]], list[np.ndarray]]:
    """The different images of all runs, and per run the row of each of its own.

    One image is one sha256 with one true class; of identical ones, the k-th of one run is the k-th of another.
    """
    row_of: dict[tuple[str, int, int], int] = {}
    pictures, rows = [], []
    for run in runs:
        seen: Counter[tuple[str, int]] = Counter()
        own = np.empty(run.n, np.int64)
        for i, key in enumerate(zip(run.sha256, run.target.tolist(), strict=True)):
            own[i] = row_of.setdefault((*key, seen[key]), len(row_of))
            seen[key] += 1
            if own[i] == len(pictures):
                pictures.append((key[0], int(run.index[i])))
        rows.append(own)
    return pictures, rows


def _pair(runs: Sequence[Run], outcomes: Int8[np.ndarray, "P R"], i: int, j: int) -> Pair:
    a, b = runs[i], runs[j]
    both = outcomes[:, [i, j]]
    both = both[(both != NOT_EVALUATED).all(1)]

    def reason(one: str, other: str, verb: str, consequence: str) -> str:
        return f"{LETTERS[i]} ({one}) and {LETTERS[j]} ({other}) {verb}: {consequence}"

    if not len(both):
        return Pair(i, j, 0, None, None, "pictures", reason(a.data, b.data, "share no picture", "not paired"))
    clean, unlike = _paired(both >= RIGHT), "certified accuracies are not subtracted"
    if a.notion != b.notion:
        words = reason(a.notion, b.notion, "promise different things", unlike)
        return Pair(i, j, len(both), clean, None, "notion", words)
    if not same_attacker(a, b):
        sizes = ["", ""]
        if a.image_size != b.image_size:
            sizes = [f", on pictures of {height}x{width}" for height, width in (a.image_size, b.image_size)]
        words = reason(f"{a.threat}{sizes[0]}", f"{b.threat}{sizes[1]}", "face different threats", unlike)
        return Pair(i, j, len(both), clean, None, "threat", words)
    return Pair(i, j, len(both), clean, _paired(both == CERTIFIED))


def _paired(succeeded: Bool[np.ndarray, "N 2"]) -> Paired:
    return paired(succeeded[:, 0], succeeded[:, 1])
