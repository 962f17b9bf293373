"""Whose a run folder is, and what is left to do in it."""

from pathlib import Path
from typing import Any

import yaml

from certipatch.errors import InputError
from certipatch.evaluation.records import read_part
from certipatch.plumbing.files import is_leftover, read_config, read_json, write_text

FREE = {"source", "model"}
"""Settings that may differ between starts, and between hosts: where the same things are found."""


def claim(asked: dict[str, Any], out: Path) -> dict[str, Any]:
    """Make the run folder, or see that it is this run's: ``config``, ``summary`` or None, ``missing`` parts.

    ``config`` is the configuration as it comes back from the file. Parts are named by their first picture; damaged and
    foreign ones are missing.

    Errors: InputError where ``out`` holds something else.
    """
    asked = plain(asked)
    if (out / "config.yaml").exists():
        config = read_config(out)
        summary = _summary(out, config)
        free = FREE | ({"versions"} if summary else set())
        if key := difference(config, asked, free):
            raise InputError(f"{out} holds another run: {_apart(key, config, asked)}; give a new --out")
        if summary:
            return {"config": config, "summary": summary, "missing": []}
    else:
        if out.exists() and any(not is_leftover(path) for path in out.iterdir()):
            raise InputError(f"{out} exists and is no run folder; give a new or empty --out")
        config = asked
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    for folder in ("records", "evidence"):
        (out / folder).mkdir(exist_ok=True)
    missing = [first for first in parts(config) if read_part(out, config, first) is None]
    return {"config": config, "summary": None, "missing": missing}


def parts(config: dict[str, Any]) -> range:
    """The first pictures of all parts."""
    return range(0, config["images"], config["part"])


def difference(one: dict[str, Any], other: dict[str, Any], free: set[str]) -> str | None:
    """The first key, of those that are not ``free``, whose values differ."""
    keys = sorted((one.keys() | other.keys()) - free, key=lambda key: (key != "command", key != "images", key))
    return next((key for key in keys if one.get(key) != other.get(key)), None)


def _apart(key: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """How two configurations differ in ``key``; of two mappings, where the first of their own keys does."""
    old, new = there.get(key), here.get(key)
    if isinstance(old, dict) and isinstance(new, dict) and (inner := difference(old, new, set())):
        return f"{key}: {_apart(inner, old, new)}"
    words = ["absent" if value is None else str(value)[:60] for value in (old, new)]
    return f"{key} is {words[0]} there, {words[1]} here"


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it comes back from its file."""
    return yaml.safe_load(yaml.safe_dump(config))


def sweep(out: Path) -> None:
    """Remove what killed writes left behind."""
    for folder in (out, out / "records", out / "evidence"):
        for path in folder.glob("*.part"):
            path.unlink(missing_ok=True)


def _summary(out: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The run's summary; None where there is none, or a damaged or foreign one: the records give it again."""
    try:
        found = read_json(out / "summary.json")
    except InputError:
        return None
    own = ("defense", "model_sha256", "dataset", "split", "images", "threat", "seed", "versions")
    fits = "certified_accuracy" in found and all(found.get(key) == config.get(key) for key in own)
    return found if fits else None
