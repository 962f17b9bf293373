"""Files of a run folder: written whole or not at all, read with errors that propose a remedy."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from certipatch.errors import InputError
from certipatch.plumbing.parsing import from_json, from_yaml

MAX_BYTES = 64 * 2**20  # of settings, also when every value that YAML names twice is counted twice


def read_config(out: Path) -> dict[str, Any]:
    """``config.yaml`` of a run folder. InputError if it is none, or too large to be one."""
    try:
        if (out / "config.yaml").stat().st_size > MAX_BYTES:
            raise InputError(f"{out} is no run folder: config.yaml is larger than {MAX_BYTES >> 20} MiB")
        values = from_yaml((out / "config.yaml").read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "config.yaml cannot be read"
        raise InputError(f"{out} is no run folder: {reason}") from None
    if not isinstance(values, dict) or "command" not in values:
        raise InputError(f"{out} is no run folder: config.yaml holds no settings of a run")
    if not _fits(values):
        raise InputError(f"{out} is no run folder: config.yaml unfolds to more than {MAX_BYTES >> 20} MiB")
    return values


def _fits(values: Any) -> bool:
    """Return True if values, written out in full, stay below MAX_BYTES; YAML can name one value again and again."""
    stack, left = [values], MAX_BYTES
    while stack:
        value = stack.pop()
        left -= 64 + (len(value) if isinstance(value, str) else 0)
        if isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            stack += value
        if left < 64 * len(stack):
            return False
    return True


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file, whole or not at all."""
    with _whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with _whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with _whole(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. InputError if the file holds none."""
    try:
        values = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    return values


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_leftover(path: Path) -> bool:
    """Return True if a killed write left the file behind."""
    return path.name.endswith(".part")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, with a name of its own; it replaces ``path`` at the end, or is removed."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else another process of the same run was faster and has removed the temporary file
            raise
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
