"""Records: one row per evaluated picture, and the evidence behind it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from certipatch.defenses.base import Evidence
from certipatch.errors import InputError

RECORD = pa.schema(
    [
        ("index", pa.int64()),
        ("sha256", pa.string()),
        ("target", pa.int64()),
        ("label", pa.int64()),
        ("alarm", pa.bool_()),
        ("certified", pa.bool_()),
        ("margin", pa.float64()),
        ("weakest_top", pa.int64()),
        ("weakest_left", pa.int64()),
        ("weakest_height", pa.int64()),
        ("weakest_width", pa.int64()),
        ("passes", pa.int64()),
    ]
)
EVIDENCE = pa.schema(
    [("index", pa.int64()), ("votes", pa.binary()), ("unsure", pa.binary()), ("largest_patch", pa.int64())]
)


def read_records(out: Path) -> pa.Table:
    """All records of a run, in the order of the pictures."""
    return _read_all(out / "records", RECORD)


def read_evidence(out: Path) -> pa.Table:
    """The evidence behind all records of a run, in the order of the pictures."""
    return _read_all(out / "evidence", EVIDENCE)


def stored_evidence(rows: pa.Table, views: int, classes: int, image_size: tuple[int, int]) -> Evidence:
    """Evidence of some pictures, from the rows of ``read_evidence``."""
    bits = [np.unpackbits(np.frombuffer(row, np.uint8), count=views * classes) for row in rows["votes"].to_pylist()]
    unsure = [np.unpackbits(np.frombuffer(row, np.uint8), count=views) for row in rows["unsure"].to_pylist()]
    votes = torch.from_numpy(np.stack(bits).reshape(-1, views, classes).astype(bool))
    return Evidence(votes, torch.from_numpy(np.stack(unsure).astype(bool)), image_size)


def _read_all(folder: Path, schema: pa.Schema) -> pa.Table:
    try:
        parts = [pq.read_table(path, schema=schema) for path in sorted(folder.glob("part-*.parquet"))]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {folder}: {' '.join(str(error).split())}; run evaluate again") from None
    if not parts:
        raise InputError(f"{folder} holds no records; run evaluate again")
    return pa.concat_tables(parts)
