"""Runs side by side, and paired where they evaluated the same pictures."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Bool, Int8

from certipatch.errors import InputError
from certipatch.evaluation.paired import Paired, paired
from certipatch.report.compare_runs import CERTIFIED, NOT_EVALUATED, RIGHT, Run, plain, read_run
from certipatch.threats import PatchThreat

ALL_PAIRS = 4  # runs up to which every pair is compared; beyond, each with the first
MAX_RUNS = 26
METHOD = (
    "Differences are in percentage points, over the pictures that both runs evaluated, with Tango's 95 % score interval "
    "for paired proportions (Statistics in Medicine 17, 1998); p is McNemar's exact two-sided test. "
    "Intervals of single accuracies are Wilson's, 95 %."
)


@final
@dataclass(frozen=True)
class Pair:
    """Run ``second`` minus run ``first``, on ``n`` pictures that both evaluated."""

    first: int
    second: int
    n: int
    clean: Paired | None
    """None where the runs share no picture."""
    certified: Paired | None
    """None where the certificates are not of one kind too."""
    apart: Literal["pictures", "notion", "threat"] | None = None
    """What keeps the runs from being compared in certified accuracy."""
    reason: str | None = None
    """The same in a sentence."""


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """Two or more runs over P different pictures in all."""

    runs: tuple[Run, ...]
    pictures: tuple[tuple[str, int], ...]
    """(sha256, index in the first run that has it) of every picture."""
    outcomes: Int8[np.ndarray, "P R"]
    """Per picture and run a code of ``OUTCOMES``, or NOT_EVALUATED."""
    row: tuple[np.ndarray, ...]
    """Per run, the row of each of its pictures."""
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def letters(self) -> tuple[str, ...]:
        """A, B, C …: what runs are called for short."""
        return tuple(chr(ord("A") + i) for i in range(len(self.runs)))

    def common(self, i: int, j: int) -> Bool[np.ndarray, " P"]:
        """Which pictures both runs evaluated."""
        return (self.outcomes[:, [i, j]] != NOT_EVALUATED).all(1)

    def only(self, i: int, j: int) -> np.ndarray:
        """Rows of the pictures that run i certifies and run j, which evaluated them too, does not."""
        certified = self.outcomes == CERTIFIED
        return np.flatnonzero(self.common(i, j) & certified[:, i] & ~certified[:, j])

    def title(self) -> str:
        data = list(dict.fromkeys(run.data for run in self.runs))
        return f"{len(self.runs)} runs on " + " and ".join(data if len(data) < 4 else [*data[:2], "others"])

    def together(self) -> dict[str, int] | None:
        """Of the runs whose certificates are comparable with the first's, if three or more: how many pictures all
        certify, none does, or one alone."""
        members = [0, *(pair.second for pair in self.pairs if pair.first == 0 and pair.certified)]
        outcomes = self.outcomes[:, members]
        outcomes = outcomes[(outcomes != NOT_EVALUATED).all(1)]
        if len(members) < 3 or not len(outcomes):
            return None
        certified = outcomes == CERTIFIED
        count = certified.sum(1)
        found = {"pictures": len(outcomes), "all": int((count == len(members)).sum()), "none": int((count == 0).sum())}
        return found | {
            f"only {self.letters[member]}": int((certified[:, i] & (count == 1)).sum())
            for i, member in enumerate(members)
        }


def compare(folders: Sequence[Path]) -> Comparison:
    """Read and compare finished runs of ``evaluate``. InputError for one run alone, a run given twice, or no run."""
    if len(folders) < 2:
        raise InputError("compare needs two or more run folders; give another")
    if len(folders) > MAX_RUNS:
        raise InputError(f"compare takes at most {MAX_RUNS} runs, not {len(folders)}")
    for path, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise InputError(f"{path} is given {count} times; give different runs")
    return of_runs([read_run(folder) for folder in folders])


def of_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs that were read."""
    runs = named(runs)
    pictures, row = _align(runs)
    outcomes = np.full((len(pictures), len(runs)), NOT_EVALUATED, np.int8)
    for i, run in enumerate(runs):
        outcomes[row[i], i] = run.outcome
    which = [(i, j) for i, j in combinations(range(len(runs)), 2) if i == 0 or len(runs) <= ALL_PAIRS]
    pairs = tuple(_pair(runs, outcomes, i, j) for i, j in which)
    found = Comparison(tuple(runs), tuple(pictures), outcomes, tuple(row), pairs, ())
    return dataclasses.replace(found, notes=tuple(_notes(found)))


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that differ: where a defense occurs twice, what sets its runs apart is added."""
    found = list(runs)
    for name in {run.name for run in runs}:
        group = [i for i, run in enumerate(runs) if run.name == name]
        for part in _parts([runs[i] for i in group]):
            if len({found[i].name for i in group}) == len(group):
                break
            if len(set(part)) > 1:
                for i, words in zip(group, part, strict=True):
                    found[i] = dataclasses.replace(found[i], name=plain(f"{found[i].name}, {words}", 200))
    for i, run in enumerate(found):  # whatever names hold, in the end they differ
        if run.name in {other.name for other in found[:i]}:
            found[i] = dataclasses.replace(run, name=f"{run.name} ({i + 1})")
    return found


def same_attacker(a: Run, b: Run) -> bool:
    """Whether two runs have one threat, on pictures of one size; ``2%`` may be ``4x4``."""
    if a.image_size != b.image_size or a.threat == b.threat:
        return a.image_size == b.image_size
    if (
        not isinstance(a.threat, PatchThreat)
        or not isinstance(b.threat, PatchThreat)
        or a.threat.shape
        or b.threat.shape
    ):
        return False
    (count, where), others = (a.threat.count, a.threat.where), (b.threat.count, b.threat.where)
    return (count, where) == others and a.threat.masks(a.image_size) == b.threat.masks(b.image_size)


def to_dict(found: Comparison) -> dict[str, Any]:
    """Plain JSON values; accuracies and differences are fractions."""
    runs = [
        {
            "run": plain(str(run.folder), 4096),
            "letter": letter,
            "name": run.name,
            "dataset": run.dataset,
            "split": run.split,
            "images": run.n,
            "threat": run.threat.to_dict(),
            "notion": run.notion,
            "clean_accuracy": run.clean / run.n,
            "clean_ci95": run.interval(run.clean),
            "certified_accuracy": run.certified / run.n,
            "certified_ci95": run.interval(run.certified),
            "forward_passes_per_image": run.passes,
            "multiply_adds_per_image": run.multiply_adds,
            "milliseconds_per_image": run.milliseconds,
            "device": run.device,
            "certified_by_patch": {str(side): share for side, share in run.by_patch.items()} or None,
        }
        for letter, run in zip(found.letters, found.runs, strict=True)
    ]
    pairs = [
        {
            "first": found.letters[pair.first],
            "second": found.letters[pair.second],
            "images": pair.n,
            "clean": _counts(pair.clean),
            "certified": _counts(pair.certified),
            "reason": pair.reason,
        }
        for pair in found.pairs
    ]
    return {"runs": runs, "pairs": pairs, "together": found.together(), "method": METHOD, "notes": list(found.notes)}


def _counts(one: Paired | None) -> dict[str, Any] | None:
    if one is None:
        return None
    counts = dataclasses.asdict(one)
    return {"difference": one.difference, "ci95": one.ci95, "p_value": one.p_value} | counts


def _align(runs: Sequence[Run]) -> tuple[list[tuple[str, int]], list[np.ndarray]]:
    """The different pictures of all runs, and per run the row of each of its own.

    One picture is one sha256 with one true class; of identical ones, the k-th of one run is the k-th of another.
    """
    known: dict[tuple[str, int, int], int] = {}
    pictures, row = [], []
    for run in runs:
        seen: Counter[tuple[str, int]] = Counter()
        mine = np.empty(run.n, np.int64)
        for i, key in enumerate(zip(run.sha256, run.target.tolist(), strict=True)):
            place = known.setdefault((*key, seen[key]), len(known))
            seen[key] += 1
            mine[i] = place
            if place == len(pictures):
                pictures.append((key[0], int(run.index[i])))
        row.append(mine)
    return pictures, row


def _pair(runs: Sequence[Run], outcomes: Int8[np.ndarray, "P R"], i: int, j: int) -> Pair:
    both = outcomes[:, [i, j]]
    both = both[(both != NOT_EVALUATED).all(1)]
    a, b = (f"{chr(ord('A') + k)} ({{}})" for k in (i, j))
    if not len(both):
        one, two = a.format(runs[i].data), b.format(runs[j].data)
        return Pair(i, j, 0, None, None, "pictures", f"{one} and {two} share no picture: not paired")
    clean = paired(both[:, 0] >= RIGHT, both[:, 1] >= RIGHT)
    if runs[i].notion != runs[j].notion:
        one, two = a.format(runs[i].notion), b.format(runs[j].notion)
        reason = f"{one} and {two} promise different things: certified accuracies are not subtracted"
        return Pair(i, j, len(both), clean, None, "notion", reason)
    if not same_attacker(runs[i], runs[j]):
        sized = runs[i].image_size != runs[j].image_size
        one, two = (text.format(attacker(run, sized)) for text, run in ((a, runs[i]), (b, runs[j])))
        reason = f"{one} and {two} face different threats: certified accuracies are not subtracted"
        return Pair(i, j, len(both), clean, None, "threat", reason)
    return Pair(i, j, len(both), clean, paired(both[:, 0] == CERTIFIED, both[:, 1] == CERTIFIED))


def attacker(run: Run, sized: bool) -> str:
    """The threat, with the pictures' size where that matters."""
    height, width = run.image_size
    return f"{run.threat}, on pictures of {height}x{width}" if sized else str(run.threat)


def _notes(found: Comparison) -> list[str]:
    runs, letters = found.runs, found.letters

    def those(which: Callable[[Run], bool]) -> str:
        names = [letter for letter, run in zip(letters, runs, strict=True) if which(run)]
        return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

    notions = {run.notion for run in runs}
    told = notions <= {"recovery", "detection"}  # by the next note
    notes = [pair.reason for pair in found.pairs if pair.reason and not (told and pair.apart == "notion")]
    if "detection" in notions:
        notes.append(
            f"{those(lambda run: run.notion == 'detection')}: certified by detection: an attack leaves the answer right or "
            "raises an alarm. That is less than recovery, where the answer stays right, and is not subtracted from it. An "
            "alarm on a clean picture counts as wrong"
        )
    notes += [
        f"{those(lambda run, chance=chance: run.confidence == chance)}: certificates rest on samples; each may be wrong "
        f"with a chance of up to {1 - chance:.2g}"
        for chance in dict.fromkeys(run.confidence for run in runs if run.confidence < 1)
    ]
    for pair in found.pairs:
        larger = max(runs[pair.first].n, runs[pair.second].n)
        if 0 < pair.n < larger:
            names = f"{letters[pair.first]} and {letters[pair.second]}"
            notes.append(f"{names} are paired on the {pair.n:,} pictures that both evaluated, of up to {larger:,}")
    notes += [
        f"about the data of {those(lambda run, remark=remark: run.note == remark)}: {remark}"
        for remark in dict.fromkeys(run.note for run in runs if run.note)
    ]
    if any(run.milliseconds is None for run in runs):
        notes.append(f"{those(lambda run: run.milliseconds is None)}: no time was measured (no timing.json)")
    devices = dict.fromkeys(run.device for run in runs if run.device)
    if devices:
        apart = "; times of different devices do not compare" if len(devices) > 1 else ""
        notes.append("times: measured by each run when it ran, on " + " and ".join(devices) + apart)
    if len(found.pairs) > 1:
        notes.append(f"{len(found.pairs)} pairs are compared; neither intervals nor p are adjusted for that")
    return notes


def _parts(group: list[Run]) -> list[list[str]]:
    """What may set runs of one defense apart, in the order in which it is added to their names."""
    parts = [[str(run.threat) for run in group], [run.data for run in group]]
    keys = dict.fromkeys(key for run in group for key in run.settings if key.startswith("settings · "))
    for key in keys:
        if not key.startswith("settings · threat"):
            short = key.removeprefix("settings · ")
            parts.append([f"{short} {run.settings.get(key, '–')}" for run in group])
    parts.append([f"seed {run.settings.get('seed', '–')}" for run in group])
    parts.append([f"model {run.settings.get('model sha256', '–')[:8]}" for run in group])
    parts.append([f"{run.n:,} pictures" for run in group])
    parts.append([plain(run.folder.resolve().name) for run in group])
    parts.append([plain(str(run.folder)) for run in group])
    return parts
