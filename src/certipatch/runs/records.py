"""Records: one row per evaluated picture, and the evidence behind it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from certipatch.defenses.base import Evidence
from certipatch.errors import InputError
from certipatch.plumbing.files import read_config, sha256, write_table

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
        ("scores", pa.binary()),  # of other rules: V·K numbers in float32; null beyond MAX_SCORES, or if not all
        ("error", pa.float64()),  # how far a score may be off
        ("unsure", pa.binary()),  # V bits
        ("largest_patch", pa.int64()),
    ]
)
ATTACK_RECORD = pa.schema(
    [
        *(RECORD.field(name) for name in ("index", "sha256", "target", "label", "alarm", "certified", "margin")),
        ("attacked", pa.bool_()),  # false where the answer was wrong and nothing certified
        ("broken", pa.bool_()),
        ("attacked_label", pa.int64()),
        ("attacked_alarm", pa.bool_()),
        ("loss", pa.float64()),  # the largest lead of a wrong class that was found
        ("top", pa.int64()),  # where the patch of the attack is; null where it has no place
        ("left", pa.int64()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("places", pa.int64()),  # places that were attacked to the end
        ("certified_places", pa.int64()),  # of these, places with a margin > 0
        ("violated", pa.int64()),  # places with a margin > 0 at which the answer changed
    ]
)
ATTACK_EVIDENCE = pa.schema(
    [
        ("index", pa.int64()),
        ("pixels", pa.binary()),  # int32, changed pixels y·W + x; null where there are more than MAX_SCORES
        ("values", pa.binary()),  # float32, their channels
        ("tried", pa.binary()),  # int32, places attacked to the end, numbered as in the threat's locations
    ]
)
SCHEMAS = {"evaluate": (RECORD, EVIDENCE), "attack": (ATTACK_RECORD, ATTACK_EVIDENCE)}
MAX_ROW = 4096  # bytes of a record; larger ones are not ours
MAX_READ = 4 * 2**30  # of a run's records, or of its evidence
AGAIN = "delete its summary.json and run evaluate again"
MAX_SCORES = 65_536  # stored numbers per picture; larger evidence is computed again where it is needed


def part_path(out: Path, folder: str, first: int) -> Path:
    """The file in ``records`` or ``evidence`` of the part that begins with picture ``first``."""
    return out / folder / f"part-{first:08d}.parquet"


def write_part(out: Path, config: dict[str, Any], records: pa.Table, evidence: pa.Table) -> None:
    """Write a part: its evidence, then its records with a digest of both and of the run's configuration."""
    first = records["index"][0].as_py()
    path = part_path(out, "evidence", first)
    write_table(path, evidence)
    digest = _digest(config, records, sha256(path))
    write_table(part_path(out, "records", first), records.replace_schema_metadata({"digest": digest}))


def read_part(out: Path, config: dict[str, Any], first: int) -> pa.Table | None:
    """The records of a part; None where it is missing, damaged, or not what this run wrote."""
    count = min(config["part"], config["images"] - first)
    try:
        with pq.ParquetFile(part_path(out, "records", first)) as file:
            about = file.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows != count or size > MAX_ROW * count or not file.schema_arrow.equals(_schemas(config)[0]):
                return None
            table, digest = file.read(), (file.schema_arrow.metadata or {}).get(b"digest", b"").decode()
        right = digest == _digest(config, table, sha256(part_path(out, "evidence", first)))
    except (OSError, ValueError, pa.ArrowException):
        return None
    return table.replace_schema_metadata(None) if right else None


def read_records(out: Path) -> pa.Table:
    """All records of a run, in the order of the pictures."""
    return _read_all(out, "records")


def read_evidence(out: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The evidence behind all records of a run, in the order of the pictures; only some columns where asked."""
    return _read_all(out, "evidence", columns)


def evidence_rows(indices: list[int], evidence: Evidence, largest: list[int | None]) -> pa.Table:
    """Evidence of some pictures as rows of ``EVIDENCE``."""
    values, n = evidence.values.flatten(1).cpu(), len(indices)
    rows: dict[str, list] = {"index": indices, "largest_patch": largest}
    for name in ("votes", "scores", "error", "unsure"):
        rows[name] = [None] * n
    if values.dtype == torch.bool:
        rows["votes"] = [row.tobytes() for row in np.packbits(values.numpy(), axis=1)]
    elif evidence.images is None and values.shape[1] <= MAX_SCORES:
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


def _digest(config: dict[str, Any], records: pa.Table, evidence: str) -> str:
    values = [config, records.to_pydict(), evidence]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _schemas(config: dict[str, Any]) -> tuple[pa.Schema, pa.Schema]:
    """Columns of the records and of the evidence, by the command that wrote them."""
    command = config.get("command")
    return SCHEMAS.get(command if isinstance(command, str) else "", (RECORD, EVIDENCE))


def _read(path: Path, schema: pa.Schema, most: int, each: int) -> pa.Table:
    """The columns of ``schema``. ValueError before they take more than ``most`` bytes, or some ``each`` for a row.

    One text may stand for many rows: a file is much smaller then than what it says.
    """
    texts = [field.name for field in schema if field.type in (pa.string(), pa.binary())]
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        columns = [(c.path, c.physical_type) for c in map(file.schema.column, range(len(file.schema)))]
        if lacking := set(schema.names) - {name for name, _ in columns}:  # of a list, too: its path is longer
            raise ValueError(f"{path.name} lacks the columns {', '.join(sorted(lacking))}")
        bytes_ = {(name, kind) for name, kind in columns if name in schema.names and "BYTE_ARRAY" in kind}
        if strange := bytes_ - {(name, "BYTE_ARRAY") for name in texts}:  # it would be read unfolded
            raise ValueError(f"{path.name} holds text in the column {min(strange)[0]}")
        stored = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        size = max(stored, 8 * len(schema) * file.metadata.num_rows)
        most = min(most, 2**20 + each * file.metadata.num_rows)
        table = file.read(columns=schema.names) if size <= most else None
    size += 0 if table is None else sum(_unfolded(table[name]) for name in texts)
    if table is None or size > most:
        raise ValueError(f"{path.name} is too large: it unfolds to {size >> 20:,} MiB, which is far too much")
    return table.cast(schema)


def _unfolded(column: pa.ChunkedArray) -> int:
    """The bytes of texts that are stored once each, counted as often as they stand there."""
    folded = [chunk for chunk in column.chunks if pa.types.is_dictionary(chunk.type)]
    lengths = [pc.call_function("binary_length", [chunk.dictionary]).take(chunk.indices) for chunk in folded]
    return sum(pc.call_function("sum", [each]).as_py() or 0 for each in lengths)


def _read_all(out: Path, folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    config, tables = read_config(out), []
    schema = _schemas(config)[0 if folder == "records" else 1]
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        if "part" in config:  # other files there are none of this run's
            paths = (part_path(out, folder, first) for first in range(0, config["images"], config["part"]))
        else:
            paths = sorted((out / folder).glob("part-*.parquet"))
        left, each = MAX_READ, MAX_ROW if folder == "records" else MAX_READ
        for path in paths:
            table = _read(path, wanted, left, each)
            left -= table.nbytes
            tables.append(table)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the {folder} in {out}: {reason}; {AGAIN}") from None
    if not tables:
        raise InputError(f"{out / folder} holds no records; run evaluate again")
    return pa.concat_tables(tables)
