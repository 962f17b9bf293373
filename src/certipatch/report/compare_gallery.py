"""The pictures that one run certifies and another does not, read again from where the runs had them."""

import os
from dataclasses import dataclass
from typing import final

import numpy as np

from certipatch.data import Pictures, load
from certipatch.data.known import KNOWN, SAMPLE
from certipatch.data.loading import DATA_VARIABLE
from certipatch.errors import InputError
from certipatch.report.compare import Comparison
from certipatch.report.compare_runs import Run, plain

SHOWN = 12  # pictures of one gallery
ALL_SHOWN = 120
REACH = 10_000  # pictures are shown from among the first so many, so that little is read


@final
@dataclass(frozen=True, eq=False)
class Found:
    """Pixels, uint8 (H, W, C), by row of the comparison; and why others are missing, or None."""

    pixels: dict[int, np.ndarray]
    missing: str | None


def choose(found: Comparison, winner: int, loser: int) -> list[int]:
    """Up to SHOWN rows of pictures that ``winner`` certifies and ``loser`` does not, evenly among them."""
    rows = found.only(winner, loser)
    near = rows[np.array([found.pictures[row][1] < REACH for row in rows], bool)]
    rows = near if len(near) else rows
    if not len(rows):
        return []
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int))].tolist()


def read_pictures(found: Comparison, data: str | None = None) -> Found:
    """The pictures of all galleries. Only data on this machine is read, unless ``data`` names other; a picture counts
    only if it has the recorded sha256.

    Errors: InputError where ``data`` is given and cannot be read.
    """
    wanted: dict[int, None] = {}
    for pair in found.pairs:
        if pair.certified:
            for winner, loser in ((pair.first, pair.second), (pair.second, pair.first)):
                wanted |= dict.fromkeys(choose(found, winner, loser))
    rows = list(wanted)[:ALL_SHOWN]
    pixels: dict[int, np.ndarray] = {}
    missing = None
    for i, run in enumerate(found.runs):
        place = {int(row): at for at, row in enumerate(found.row[i])}
        mine = [row for row in rows if row not in pixels and row in place]
        if not mine:
            continue
        try:
            pictures = _open(run, data, max(int(run.index[place[row]]) for row in mine) + 1)
            for row in mine:
                index = int(run.index[place[row]])
                if index >= len(pictures) or pictures.sha256(index) != run.sha256[place[row]]:
                    raise InputError(f"{plain(data or run.source)} does not hold picture {index} of {found.letters[i]}")
                pixels[row] = pictures.pixels([index])[0]
        except InputError as error:
            if data is not None:
                raise
            missing = plain(error.args[0], 300)
    return Found(pixels, missing if len(pixels) < len(rows) else None)


def _open(run: Run, data: str | None, limit: int) -> Pictures:
    source = data or run.source
    if data is None and not _here(source):
        raise InputError(f"their data, {plain(source)}, is not on this machine; tell with --data where it is")
    return load(source, run.split, limit=limit)


def _here(source: str) -> bool:
    if source in KNOWN:
        return os.path.isdir(os.path.join(os.environ.get(DATA_VARIABLE) or os.devnull, source))
    return source == SAMPLE or os.path.isdir(source)
