"""The images that one run certifies and another does not, read again from the data of the runs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from certipatch.comparison.pairs import Comparison
from certipatch.comparison.runs import MAX_REMARK, Run, printable
from certipatch.data import Pictures, load
from certipatch.data.known import KNOWN, SAMPLE
from certipatch.data.loading import DATA_VARIABLE
from certipatch.errors import InputError

MAX_SHOWN = 12  # images of one gallery
MAX_ALL_SHOWN = 120
MAX_INDEX = 10_000  # images come from the first so many of the data, so that little is read


@final
@dataclass(frozen=True, eq=False)
class GalleryPictures:
    """Pixels, uint8 (H, W, C), by row of the comparison; and the reason why others are missing, or None."""

    pixels: dict[int, np.ndarray]
    missing: str | None


def galleries(comparison: Comparison) -> Iterator[tuple[int, int, int, list[int]]]:
    """(winner, loser, number of images that only the winner certifies, up to MAX_SHOWN rows of them, evenly chosen)."""
    for pair in comparison.pairs:
        for winner, loser in ((pair.first, pair.second), (pair.second, pair.first)) if pair.certified else ():
            rows = comparison.certified_only_by(winner, loser)
            near = rows[np.array([comparison.pictures[row][1] < MAX_INDEX for row in rows], bool)]
            chosen = near if len(near) else rows
            if len(rows):
                evenly = np.linspace(0, len(chosen) - 1, min(MAX_SHOWN, len(chosen))).round().astype(int)
                yield winner, loser, len(rows), chosen[evenly].tolist()


def read_pictures(comparison: Comparison, data: str | None = None) -> GalleryPictures:
    """Read the images of all galleries.

    Only data on this machine is read, unless ``data`` names other data; an image counts only if it has the recorded
    sha256.

    Errors: InputError if ``data`` is given and cannot be read.
    """
    rows = list(dict.fromkeys(row for *_, chosen in galleries(comparison) for row in chosen))[:MAX_ALL_SHOWN]
    pixels: dict[int, np.ndarray] = {}
    missing = None
    for letter, run, own_rows in zip(comparison.letters, comparison.runs, comparison.rows, strict=True):
        position = {int(row): i for i, row in enumerate(own_rows)}
        wanted = {row: position[row] for row in rows if row not in pixels and row in position}
        if not wanted:
            continue
        try:
            pictures = _open(run, data, max(int(run.index[i]) for i in wanted.values()) + 1)
            for row, i in wanted.items():
                index = int(run.index[i])
                if index >= len(pictures) or pictures.sha256(index) != run.sha256[i]:
                    raise InputError(f"{printable(data or run.source)} does not hold picture {index} of {letter}")
                pixels[row] = pictures.pixels([index])[0]
        except InputError as error:
            if data is not None:
                raise
            missing = printable(error.args[0], MAX_REMARK)
    return GalleryPictures(pixels, missing if len(pixels) < len(rows) else None)


def _open(run: Run, data: str | None, limit: int) -> Pictures:
    source = data or run.source
    if data is None and not _is_local(source):
        raise InputError(f"their data, {printable(source)}, is not on this machine; name its place with --data")
    return load(source, run.split, limit=limit)


def _is_local(source: str) -> bool:
    if source in KNOWN:
        return os.path.isdir(os.path.join(os.environ.get(DATA_VARIABLE) or os.devnull, source))
    return source == SAMPLE or os.path.isdir(source)
