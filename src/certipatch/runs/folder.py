"""Create or resume a run folder: check that it belongs to this configuration, and list the missing parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from certipatch.errors import InputError
from certipatch.plumbing.files import is_leftover, read_config, read_json, write_text
from certipatch.runs.records import read_part

IGNORED_KEYS = {"source", "model"}
"""Settings that may differ between starts and between hosts: paths of the same data and models."""


def prepare_run_folder(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Make the run folder, or check that it is this run's; gives ``config``, ``summary`` or None, ``missing`` parts.

    ``config`` is the configuration as it comes back from the file. Parts are named by their first image; damaged and
    foreign ones are missing.

    Errors: InputError if ``out`` holds something else.
    """
    summary = _summary(out) if (out / "config.yaml").exists() else None
    config = own_folder(config, out, IGNORED_KEYS | ({"versions"} if summary else set()))
    if summary:
        return {"config": config, "summary": summary, "missing": []}
    for folder in ("records", "evidence"):
        (out / folder).mkdir(exist_ok=True)
    missing = [first for first in parts(config) if read_part(out, config, first) is None]
    return {"config": config, "summary": None, "missing": missing}


def own_folder(config: dict[str, Any], out: Path, ignored: set[str], kind: str = "run") -> dict[str, Any]:
    """Make the folder of a configuration, or check that it is there; gives the configuration in the folder.

    Errors: InputError if ``out`` holds something else, or if a key that is not ``ignored`` differs.
    """
    config = yaml_round_trip(config)
    if (out / "config.yaml").exists():
        stored = read_config(out)
        if key := difference(stored, config, ignored):
            raise InputError(
                f"{out} holds another {kind}: {_describe_difference(key, stored, config)}; give a new --out"
            )
        return stored
    if out.exists() and any(not is_leftover(path) for path in out.iterdir()):
        raise InputError(f"{out} exists and is no run folder; give a new or empty --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return config


def write_report(out: Path, page: Callable[[], str]) -> None:
    """Write ``report.html`` unless it is there."""
    if not (out / "report.html").exists():
        write_text(out / "report.html", page())


def parts(config: dict[str, Any]) -> range:
    """The first images of all parts."""
    return range(0, config["images"], config["part"])


def difference(one: dict[str, Any], other: dict[str, Any], ignored: set[str]) -> str | None:
    """The first key with different values among those that are not ``ignored``."""
    keys = sorted((one.keys() | other.keys()) - ignored, key=lambda key: (key != "command", key != "images", key))
    return next((key for key in keys if one.get(key) != other.get(key)), None)


def _describe_difference(key: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """The two values of ``key``; for two mappings, the values of their first different key."""
    old, new = there.get(key), here.get(key)
    if isinstance(old, dict) and isinstance(new, dict) and (inner := difference(old, new, set())):
        return f"{key}: {_describe_difference(inner, old, new)}"
    words = ["absent" if value is None else str(value)[:60] for value in (old, new)]
    return f"{key} is {words[0]} there, {words[1]} here"


def yaml_round_trip(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it comes back from its file."""
    return yaml.safe_load(yaml.safe_dump(config))


def remove_temporaries(out: Path) -> None:
    """Remove the temporary files of killed writes."""
    for folder in (out, out / "records", out / "evidence"):
        for path in folder.glob("*.part"):
            path.unlink(missing_ok=True)


def _summary(out: Path) -> dict[str, Any] | None:
    """The run's summary; None if it is missing, damaged or foreign: the records give it again."""
    config = read_config(out)
    try:
        summary = read_json(out / "summary.json")
    except InputError:
        return None
    own = ("defense", "model_sha256", "dataset", "split", "images", "threat", "seed", "versions")
    fits = "certified_accuracy" in summary and all(summary.get(key) == config.get(key) for key in own)
    return summary if fits else None
