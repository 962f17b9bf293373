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
    [
        ("index", pa.int64()),
        ("votes", pa.binary()),  # of rules that count: V·K bits
        ("scores", pa.binary()),  # of other rules: V·K numbers in float32; null beyond MAX_SCORES
        ("error", pa.float64()),  # how far a score may be off
        ("unsure", pa.binary()),  # V bits
        ("largest_patch", pa.int64()),
    ]
)
MAX_SCORES = 65_536  # stored numbers per picture; larger evidence is computed again where it is needed


def read_records(out: Path) -> pa.Table:
    """All records of a run, in the order of the pictures."""
    return _read_all(out / "records", RECORD)


def read_evidence(out: Path) -> pa.Table:
    """The evidence behind all records of a run, in the order of the pictures."""
    return _read_all(out / "evidence", EVIDENCE)


def evidence_rows(indices: list[int], evidence: Evidence, largest: list[int | None]) -> pa.Table:
    """Evidence of some pictures as rows of ``EVIDENCE``."""
    values, n = evidence.values.flatten(1).cpu(), len(indices)
    rows: dict[str, list] = {"index": indices, "largest_patch": largest}
    for name in ("votes", "scores", "error", "unsure"):
        rows[name] = [None] * n
    if values.dtype == torch.bool:
        rows["votes"] = [row.tobytes() for row in np.packbits(values.numpy(), axis=1)]
    elif values.shape[1] <= MAX_SCORES:
        rows["scores"] = [row.tobytes() for row in values.float().numpy().astype("<f4")]
    if evidence.error is not None:
        rows["error"] = evidence.error.cpu().tolist()
    if evidence.unsure is not None:
        rows["unsure"] = [row.tobytes() for row in np.packbits(evidence.unsure.cpu().numpy(), axis=1)]
    return pa.table(rows, EVIDENCE)


def stored_evidence(rows: pa.Table, views: int, classes: int, image_size: tuple[int, int]) -> Evidence | None:
    """Evidence of some pictures, from the rows of ``read_evidence``; None where it was too large to be stored."""
    columns = {name: rows[name].to_pylist() for name in ("votes", "scores", "error", "unsure")}
    if None not in columns["votes"]:
        values = torch.from_numpy(_bits(columns["votes"], views * classes)).view(-1, views, classes)
    elif None not in columns["scores"]:
        numbers = np.stack([np.frombuffer(row, "<f4") for row in columns["scores"]])
        values = torch.from_numpy(numbers.copy()).view(-1, views, classes)
    else:
        return None
    unsure = None if None in columns["unsure"] else torch.from_numpy(_bits(columns["unsure"], views))
    error = None if None in columns["error"] else torch.tensor(columns["error"], dtype=torch.float64)
    return Evidence(values, unsure, image_size, error)


def _bits(rows: list[bytes], count: int) -> np.ndarray:
    return np.stack([np.unpackbits(np.frombuffer(row, np.uint8), count=count) for row in rows]).astype(bool)


def _read_all(folder: Path, schema: pa.Schema) -> pa.Table:
    try:
        parts = [pq.read_table(path, schema=schema) for path in sorted(folder.glob("part-*.parquet"))]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {folder}: {' '.join(str(error).split())}; run evaluate again") from None
    if not parts:
        raise InputError(f"{folder} holds no records; run evaluate again")
    return pa.concat_tables(parts)
