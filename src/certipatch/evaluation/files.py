"""Files of a run folder: written whole or not at all, read with errors that say what to do."""

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
import yaml

from certipatch.errors import InputError


def read_config(out: Path) -> dict[str, Any]:
    """``config.yaml`` of a run folder. InputError if it is none."""
    try:
        values = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "config.yaml cannot be read"
        raise InputError(f"{out} is no run folder: {reason}") from None
    if not isinstance(values, dict) or "command" not in values:
        raise InputError(f"{out} is no run folder: config.yaml holds no settings of a run")
    return values


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file, whole or not at all."""
    with _whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with _whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. InputError where the file holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
    """Whether a file is what a killed write left behind."""
    return path.name.endswith(".part")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file of its own beside ``path`` (others may write the same one), which then takes its place, or goes."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else another process, at the same run, was faster and has swept up
            raise
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
