"""Hub-layout folders: `SPLIT-00000-of-00001.parquet`, with a column of encoded images and one of labels."""

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from certipatch.data.pictures import SplitContents, check_labels, choose_split, listed
from certipatch.errors import InputError
from certipatch.plumbing.parsing import from_json

IMAGE_COLUMNS = ("image", "img")
"""Names of the column of images, first match wins."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names of the column of labels, first match wins."""
MAX_ENCODED = 8 * 2**30
"""More encoded bytes than this (8 GiB) are not taken into memory."""
MAX_ROWS = 10_000_000
"""Splits of more rows than this are refused."""

_FILE = re.compile(r"([A-Za-z0-9_.]+?)(?:-(.*))?\.parquet")
_SHARD = re.compile(r".*?(\d+)-of-(\d+)")
_BATCH = 64  # rows at a time, so that the byte budget is checked often


@dataclass(frozen=True)
class ArrowStore:
    """Encoded images in an Arrow column of bytes; `source` and `split` name them in errors."""

    column: pa.ChunkedArray
    source: str
    split: str

    def __len__(self) -> int:
        return len(self.column)

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i."""
        return self.column[i].as_py()

    def where(self, i: int) -> str:
        """Dataset, split and row of image i."""
        return f"{self.source} {self.split} picture {i}"


def parquet_splits(root: str) -> dict[str, list[str]]:
    """Split name -> its parquet files in `root`, in order; empty if the folder has none."""
    splits: dict[str, list[str]] = {}
    for name in sorted(os.listdir(root)):
        match = _FILE.fullmatch(name)
        if match and os.path.isfile(os.path.join(root, name)):
            splits.setdefault(match[1], []).append(os.path.join(root, name))
    return splits


def read_parquet(root: str, split: str | None, limit: int | None, called: str | None = None) -> SplitContents:
    """The images and labels of one split of a folder of parquet files. The images stay encoded.

    `called` is the folder's name in errors; default: its path.

    Raises InputError for a split that is missing or incomplete, damaged files, columns of other
    names or types, rows without bytes or label, labels that are no class index, and data that would fill memory.
    """
    splits = parquet_splits(root)
    called = called or root
    split = choose_split(splits, split, called)
    files = splits[split]
    _check_shards(files, called, split)
    try:
        return _read(files, called, split, limit)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot read the {split!r} parquet files in {called!r} ({reason}); fetch them again"
        ) from None


def find_columns(schema: pa.Schema, source: str) -> tuple[str, str]:
    """The names of the image and label columns. Raises InputError, naming the columns, if there are none."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        wanted = f"{' or '.join(IMAGE_COLUMNS)}" if image is None else f"{' or '.join(LABEL_COLUMNS)}"
        raise InputError(
            f"{source!r} has the columns {listed(schema.names)} but none called {wanted}; rename the column"
        )
    kind = schema.field(image).type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)):
        raise InputError(
            f"{source!r} has a column {image!r} of type {kind}, not a struct with encoded 'bytes'; save it as Image"
        )
    if not pa.types.is_integer(schema.field(label).type):
        raise InputError(
            f"{source!r} has labels {label!r} of type {schema.field(label).type}; give whole numbers (class indices)"
        )
    return image, label


def label_array(column: pa.ChunkedArray, source: str) -> np.ndarray:
    """A label column as int64 (N,). Raises InputError for nulls and for labels that are no class index."""
    if column.null_count:
        raise InputError(f"{source!r} has rows without a label; give a labelled split")
    labels = column.cast(pa.int64(), safe=False).to_numpy()
    check_labels(labels, source)
    return labels


def bytes_column(column: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    """The `bytes` of a column of image structs. Raises InputError for rows without bytes (such as mere paths)."""
    encoded = column.flatten()[column.type.get_field_index("bytes")]  # null if the struct is null
    if encoded.null_count:
        raise InputError(f"{source!r} has rows without the picture's bytes; save the pictures inside the parquet files")
    return encoded


def _read(files: list[str], called: str, split: str, limit: int | None) -> SplitContents:
    label_parts, image_parts, taken, size, rows = [], [], 0, 0, 0
    class_names = None
    for path in files:
        with pq.ParquetFile(path) as file:
            rows += file.metadata.num_rows
            if rows > MAX_ROWS:
                raise InputError(
                    f"{called!r} has more than {MAX_ROWS:,} rows in {split!r}; split it into smaller files"
                )
            image, label = find_columns(file.schema_arrow, called)
            class_names = class_names or hub_class_names(file.schema_arrow.metadata, label)
            label_parts.append(label_array(file.read(columns=[label]).column(label), called))
            for batch in file.iter_batches(_BATCH, columns=[f"{image}.bytes"]):
                if limit is not None and taken >= limit:
                    break
                part = bytes_column(pa.chunked_array([batch.column(0)]), called)
                part = part.slice(0, None if limit is None else limit - taken)
                taken, size = taken + len(part), size + part.nbytes
                if size > MAX_ENCODED:
                    raise InputError(
                        f"{called!r} {split!r} has over {MAX_ENCODED // 2**30} GiB of pictures; give a limit"
                    )
                image_parts.extend(part.chunks)
    if not taken:
        raise InputError(f"the {split!r} parquet files in {called!r} have no rows; give another split or folder")
    labels = np.concatenate(label_parts)
    if len(labels) < taken:
        raise InputError(
            f"{called!r} has {taken} pictures but {len(labels)} labels in {split!r}; fetch the files again"
        )
    column = pa.chunked_array([part.cast(pa.large_binary()) for part in image_parts])
    source = os.path.basename(os.path.abspath(called))
    return SplitContents(split, ArrowStore(column, source, split), labels[:taken], class_names, int(labels.max()) + 1)


def hub_class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """The class names that `datasets` writes in the metadata of a parquet schema; None if they are not there."""
    try:
        info: Any = from_json((metadata or {})[b"huggingface"])
        names = info["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _check_shards(files: list[str], called: str, split: str) -> None:
    """Raise InputError unless all shards are there, such as five of `SPLIT-00000-of-00005.parquet`."""
    shards = [match for path in files if (match := _SHARD.fullmatch(os.path.basename(path).removesuffix(".parquet")))]
    if shards and {int(match[2]) for match in shards} != {len(files)}:
        raise InputError(f"{called!r} has {len(files)} of {shards[-1][2]} parquet files for {split!r}; fetch all")


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
