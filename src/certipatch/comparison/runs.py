"""Finished runs of ``certipatch evaluate``, read without their models.

A run folder may come from anywhere: sizes are checked before anything is read, accuracies are counted again from the
records, and every text is made printable and short.
"""

import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int8, Int64

from certipatch.errors import InputError
from certipatch.plumbing.files import read_config, read_json
from certipatch.runs.metrics import wilson
from certipatch.runs.records import AGAIN, read_records
from certipatch.runs.verify import check_digests
from certipatch.threats import PatchThreat, Threat, threat_from_dict

WRONG, ALARM, RIGHT, CERTIFIED = range(4)
OUTCOMES = ("wrong", "alarm", "right", "certified")
"""Fates of an image: ``alarm`` was raised on the clean image, ``right`` is right but not certified."""
NOT_EVALUATED = -1
MAX_TEXT = 4 * 2**20  # bytes of config.yaml, summary.json and timing.json
MAX_IMAGES = 10_000_000
MAX_NAME, MAX_REMARK, MAX_PATH = 100, 300, 4096  # characters
SETTINGS = ("defense", "method", "model_sha256", "dataset", "split", "images", "dataset_sha256", "seed")


@final
@dataclass(frozen=True, eq=False)
class Run:
    """The part of one run that a comparison needs: N images in the order of their index."""

    folder: Path
    name: str
    """The name; unique among compared runs after ``name_runs``."""
    dataset: str
    split: str
    note: str | None
    """A remark about the data."""
    source: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    threat: Threat
    notion: str
    theorem: str
    confidence: float
    """1, or less if certificates rest on samples."""
    settings: dict[str, str]
    index: Int64[np.ndarray, " N"]
    sha256: list[str]
    target: Int64[np.ndarray, " N"]
    label: Int64[np.ndarray, " N"]
    outcome: Int8[np.ndarray, " N"]
    passes: float | None
    multiply_adds: float | None
    milliseconds: float | None
    device: str | None
    by_patch: dict[int, float]
    """Certified accuracy by side of a square patch placed anywhere, in pixels; empty if the run has none."""

    @property
    def n(self) -> int:
        return len(self.outcome)

    @property
    def clean(self) -> int:
        """The number of right predictions without an alarm."""
        return int((self.outcome >= RIGHT).sum())

    @property
    def certified(self) -> int:
        """The number of right predictions that are certified too."""
        return int((self.outcome == CERTIFIED).sum())

    @property
    def data(self) -> str:
        return f"{self.dataset} {self.split}"

    def interval(self, count: int) -> tuple[float, float]:
        """Wilson's 95 % interval of a share of the run's images."""
        return wilson(count, self.n)

    @property
    def side(self) -> int | None:
        """Side in pixels of the threat's square, if the threat is one square placed anywhere; else None."""
        threat = self.threat
        if not isinstance(threat, PatchThreat) or threat.count != 1 or threat.where != "anywhere":
            return None
        if threat.shape not in (None, "square"):
            return None
        mask, *others = threat.masks(self.image_size)
        return len(mask) if not others and len(mask) == len(mask[0]) and all(map(all, mask)) else None


def printable(value: Any, longest: int = MAX_NAME) -> str:
    """A text or number in one printable line of at most ``longest`` characters; the name of the type for any other value."""
    if not isinstance(value, str | int | float | None):
        value = f"({type(value).__name__})"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 1] + "…"


def read_run(folder: Path) -> Run:
    """Read a finished run of ``certipatch evaluate``. InputError, in one line, for anything else."""
    try:
        return _read(folder)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        reason = printable(f"there is no {error}" if isinstance(error, KeyError) else str(error), 200)
        raise InputError(f"{folder} is a damaged run folder ({reason}); {AGAIN}") from None


def _read(folder: Path) -> Run:
    for path in (folder / "config.yaml", folder / "summary.json", folder / "timing.json"):
        status = path.stat() if path.exists() else None
        if status and (not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TEXT):
            raise InputError(f"{path} is no file of at most {MAX_TEXT >> 20} MB; it is not one that evaluate wrote")
    config = read_config(folder)
    if config["command"] != "evaluate":
        raise InputError(f"{folder} is a run of {printable(config['command'])}; compare takes runs of evaluate")
    if not (folder / "summary.json").exists():
        raise InputError(f"{folder} is not finished ({_progress(folder, config)}); run its evaluate again to go on")
    summary = read_json(folder / "summary.json")
    timing = read_json(folder / "timing.json") if (folder / "timing.json").exists() else {}
    image_size = _image_size(config["image_size"])
    if "part" in config:
        check_digests(folder, config)
    records = _records(folder, summary["images"])
    outcome = _outcomes(records)
    for key, counted in (("clean", (outcome >= RIGHT).mean()), ("certified", (outcome == CERTIFIED).mean())):
        claimed = float(summary[f"{key}_accuracy"])
        if not abs(claimed - counted) < 1e-9:
            raise InputError(f"{folder}: summary.json says {claimed:.2%} {key}, its records {counted:.2%}; {AGAIN}")
    passes, rate = records["passes"].drop_null(), _positive(timing.get("images_per_second"))
    classes = config.get("classes")
    return Run(
        folder=folder,
        name=printable(summary["defense"]),
        dataset=printable(summary["dataset"]),
        split=printable(summary["split"]),
        note=printable(config["dataset_note"], MAX_REMARK) if config.get("dataset_note") else None,
        source=printable(config.get("source"), MAX_PATH),
        classes=tuple(printable(name) for name in (classes if isinstance(classes, list) else ())),
        image_size=image_size,
        threat=_threat(summary["threat"], image_size),
        notion=printable(summary["notion"]),
        theorem=printable(summary["theorem"], MAX_REMARK),
        confidence=_fraction(summary.get("confidence", 1.0)),
        settings=_settings(config),
        index=records["index"].to_numpy(),
        sha256=records["sha256"].to_pylist(),
        target=records["target"].to_numpy(),
        label=records["label"].to_numpy(),
        outcome=outcome,
        passes=float(np.mean(passes)) if len(passes) else _positive(timing.get("forward_passes_per_image")),
        multiply_adds=_positive(timing.get("multiply_adds_per_image")),
        milliseconds=1000 / rate if rate else None,
        device=printable(timing["device"]) if "device" in timing else None,
        by_patch=_by_patch(summary.get("certified_by_patch", {}), min(image_size)),
    )


def _progress(folder: Path, config: dict[str, Any]) -> str:
    try:
        done = sum(pq.read_metadata(path).num_rows for path in (folder / "records").glob("part-*.parquet"))
    except (OSError, pa.ArrowException):
        return "some of its records cannot be read"
    return f"{done:,} of {printable(config.get('images', '?'))} pictures"


def _records(folder: Path, images: Any) -> pa.Table:
    """The records in the order of their index, one for each of ``images`` images."""
    records = read_records(folder)
    if len(records) != images or len(records) > MAX_IMAGES:
        raise InputError(
            f"{folder} has records of {len(records):,} pictures, but its summary.json tells of {printable(images)}; {AGAIN}"
        )
    records = records.sort_by("index")
    if any(records[name].null_count for name in ("index", "sha256", "target", "label", "alarm", "certified")):
        reason = "they have gaps"
    elif not all(re.fullmatch("[0-9a-f]{64}", text) for text in records["sha256"].to_pylist()):
        reason = "they hold a sha256 that is none"
    elif (np.diff(records["index"].to_numpy()) < 1).any():
        reason = "they name a picture twice"
    else:
        return records
    raise InputError(f"cannot read the records in {folder}: {reason}; {AGAIN}")


def _outcomes(records: pa.Table) -> Int8[np.ndarray, " N"]:
    label, target, alarm, certified = (records[name].to_numpy() for name in ("label", "target", "alarm", "certified"))
    outcome = np.select([alarm, label != target, ~certified], [ALARM, WRONG, RIGHT], CERTIFIED)
    return outcome.astype(np.int8)


def _image_size(value: Any) -> tuple[int, int]:
    height, width = (int(side) for side in value)
    if not (1 <= height <= 8192 and 1 <= width <= 8192):
        raise ValueError(f"pictures of {height}x{width} pixels")
    return height, width


def _threat(values: dict[str, Any], image_size: tuple[int, int]) -> Threat:
    """A threat no larger than the image, so that a check of it is cheap."""
    size = values.get("size")
    height, width = image_size
    if isinstance(size, list) and isinstance(size[0], int) and not (size[0] <= height and size[1] <= width):
        raise ValueError(f"a patch of {size[0]}x{size[1]} pixels on pictures of {height}x{width}")
    if isinstance(size, int) and size > height * width:
        raise ValueError(f"a patch of {size} pixels on pictures of {height}x{width}")
    return threat_from_dict(values)


def _by_patch(values: dict[str, Any], largest: int) -> dict[int, float]:
    accuracies = {int(side): _fraction(accuracy) for side, accuracy in values.items()}
    if not all(1 <= side <= largest for side in accuracies):
        raise ValueError(f"certified_by_patch knows patches that are not of 1 to {largest} pixels")
    return dict(sorted(accuracies.items()))


def _fraction(value: Any) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{value} is no share")
    return float(value)


def _positive(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value < math.inf else None


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Settings that distinguish runs, as short texts; a setting within a setting is named "outer · inner"."""
    texts = {key.replace("_", " "): printable(config[key]) for key in SETTINGS if key in config}
    for group in ("settings", "versions"):
        values = config.get(group)
        for key, value in list(values.items())[:50] if isinstance(values, dict) else []:
            outer = f"{group} · {printable(key).replace('_', ' ')}"
            inner = list(value.items())[:20] if isinstance(value, dict) else [(None, value)]
            for name, one in inner:
                words = ", ".join(map(printable, one[:20])) if isinstance(one, list) else printable(one)
                texts[outer if name is None else f"{outer} · {printable(name)}"] = words
    return texts
