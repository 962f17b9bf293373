"""Finished runs of ``certipatch evaluate``, read without their models.

A run folder may come from anywhere: sizes are checked before anything is read, numbers are counted again from the
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
from certipatch.runs.records import RECORD
from certipatch.threats import PatchThreat, Threat, threat_from_dict

WRONG, ALARM, RIGHT, CERTIFIED = range(4)
OUTCOMES = ("wrong", "alarm", "right", "certified")
"""What happened to a picture: ``alarm`` was raised on the clean picture, ``right`` is right but not certified."""
NOT_EVALUATED = -1
COLUMNS = ("index", "sha256", "target", "label", "alarm", "certified", "passes")
MAX_TEXT = 4 * 2**20  # bytes of config.yaml, summary.json and timing.json
MAX_PICTURES = 10_000_000
MAX_BYTES = 1024  # of records per picture
LONGEST = 100  # characters of a name
AGAIN = "delete its summary.json and run evaluate again"


@final
@dataclass(frozen=True, eq=False)
class Run:
    """What a comparison needs of one run over N pictures, in the order of their index."""

    folder: Path
    name: str
    """What it is called; unique among compared runs once ``compare.named`` has seen them."""
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
    """1, or less where certificates rest on samples."""
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
    """Certified accuracy by side of a square patch placed anywhere, in pixels; empty where the run has none."""

    @property
    def n(self) -> int:
        return len(self.outcome)

    @property
    def clean(self) -> int:
        """How many answers are right, without an alarm."""
        return int((self.outcome >= RIGHT).sum())

    @property
    def certified(self) -> int:
        """How many of these are certified too."""
        return int((self.outcome == CERTIFIED).sum())

    @property
    def data(self) -> str:
        return f"{self.dataset} {self.split}"

    def interval(self, count: int) -> tuple[float, float]:
        """Wilson's 95 % interval of a share of its pictures."""
        return wilson(count, self.n)

    @property
    def side(self) -> int | None:
        """Side in pixels of the threat's square, where that is one square placed anywhere; else None."""
        threat = self.threat
        if not isinstance(threat, PatchThreat) or threat.count != 1 or threat.where != "anywhere":
            return None
        if threat.shape not in (None, "square"):
            return None
        mask, *others = threat.masks(self.image_size)
        square = not others and len(mask) == len(mask[0]) and all(map(all, mask))
        return len(mask) if square else None


def read_run(folder: Path) -> Run:
    """A finished run of ``certipatch evaluate``. InputError, in one line, for anything else."""
    try:
        return _read(folder)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{folder} is a damaged run folder ({plain(what, 200)}); {AGAIN}") from None


def plain(value: Any, longest: int = LONGEST) -> str:
    """A text or number in one printable line of at most ``longest`` characters; of other things the type."""
    if not isinstance(value, str | int | float | None):
        value = f"({type(value).__name__})"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _read(folder: Path) -> Run:
    _small(folder / "config.yaml")
    config = read_config(folder)
    if config["command"] != "evaluate":
        raise InputError(f"{folder} is a run of {plain(config['command'])}; compare takes runs of evaluate")
    if not (folder / "summary.json").exists():
        raise InputError(f"{folder} is not finished ({_progress(folder, config)}); run its evaluate again to go on")
    _small(folder / "summary.json")
    summary, timing = read_json(folder / "summary.json"), _timing(folder)
    image_size = _image_size(config["image_size"])
    records = _records(folder, summary["images"])
    outcome = _outcomes(records)
    for key, which in (("clean", outcome >= RIGHT), ("certified", outcome == CERTIFIED)):
        said, counted = float(summary[f"{key}_accuracy"]), which.mean()
        if not abs(said - counted) < 1e-9:
            raise InputError(f"{folder}: summary.json says {said:.2%} {key}, its records {counted:.2%}; {AGAIN}")
    return Run(
        folder=folder,
        name=plain(summary["defense"]),
        dataset=plain(summary["dataset"]),
        split=plain(summary["split"]),
        note=plain(config["dataset_note"], 300) if config.get("dataset_note") else None,
        source=plain(config.get("source"), 4096),
        classes=tuple(plain(name) for name in _list(config.get("classes"))),
        image_size=image_size,
        threat=_threat(summary["threat"], image_size),
        notion=plain(summary["notion"]),
        theorem=plain(summary["theorem"], 300),
        confidence=_share(summary.get("confidence", 1.0)),
        settings=_settings(config),
        index=records["index"],
        sha256=records["sha256"],
        target=records["target"],
        label=records["label"],
        outcome=outcome,
        passes=_passes(records["passes"], timing),
        multiply_adds=_positive(timing.get("multiply_adds_per_image")),
        milliseconds=1000 / rate if (rate := _positive(timing.get("images_per_second"))) else None,
        device=plain(timing["device"]) if "device" in timing else None,
        by_patch=_by_patch(summary.get("certified_by_patch", {}), min(image_size)),
    )


def _small(path: Path) -> None:
    status = path.stat() if path.exists() else None
    if status and (not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TEXT):
        raise InputError(f"{path} is no file of at most {MAX_TEXT // 2**20} MB; it is not one that evaluate wrote")


def _progress(folder: Path, config: dict[str, Any]) -> str:
    try:
        done = sum(pq.read_metadata(path).num_rows for path in (folder / "records").glob("part-*.parquet"))
    except (OSError, pa.ArrowException):
        return "some of its records cannot be read"
    return f"{done:,} of {plain(config.get('images', '?'))} pictures"


def _records(folder: Path, images: Any) -> dict[str, Any]:
    """Columns of the records in the order of their index. Nothing is read before its size is known."""
    parts = sorted((folder / "records").glob("part-*.parquet"))
    try:
        metadata = [pq.read_metadata(path) for path in parts]
        rows = sum(part.num_rows for part in metadata)
        if rows != images or not 0 < rows <= MAX_PICTURES:
            raise InputError(
                f"{folder} has records of {rows:,} pictures, but its summary.json tells of {plain(images)}; {AGAIN}"
            )
        if not all(set(COLUMNS) <= set(part.schema.names) for part in metadata):
            raise InputError(f"the records in {folder} lack columns; they need {', '.join(COLUMNS)}")
        size = sum(part.row_group(i).total_byte_size for part in metadata for i in range(part.num_row_groups))
        if size > 2**20 + MAX_BYTES * rows:
            raise InputError(f"the records in {folder} are far too large for {rows:,} pictures; {AGAIN}")
        names = list(COLUMNS)
        tables = [pq.read_table(path, columns=names, read_dictionary=["sha256"]) for path in parts]
        for table in tables:
            hashes = [text for chunk in table["sha256"].chunks for text in chunk.dictionary.to_pylist()]
            if not all(isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for text in hashes):
                raise InputError(f"the records in {folder} hold a sha256 that is none; {AGAIN}")
        schema = pa.schema([RECORD.field(name) for name in names])
        whole = pa.concat_tables([table.select(names).cast(schema) for table in tables]).sort_by("index")
    except InputError:
        raise
    except (OSError, pa.ArrowException, AttributeError) as error:
        raise InputError(f"cannot read the records in {folder} ({plain(str(error), 200)}); {AGAIN}") from None
    if any(whole[name].null_count for name in names if name != "passes"):
        raise InputError(f"the records in {folder} have gaps; {AGAIN}")
    found = {name: whole[name].to_numpy() for name in names if name not in ("sha256", "passes")}
    if (np.diff(found["index"]) < 1).any():
        raise InputError(f"the records in {folder} name a picture twice; {AGAIN}")
    return found | {"sha256": whole["sha256"].to_pylist(), "passes": whole["passes"].drop_null().to_numpy()}


def _outcomes(records: dict[str, Any]) -> Int8[np.ndarray, " N"]:
    right = (records["label"] == records["target"]) & ~records["alarm"]
    outcome = np.where(right, np.where(records["certified"], CERTIFIED, RIGHT), WRONG)
    return np.where(records["alarm"], ALARM, outcome).astype(np.int8)


def _image_size(value: Any) -> tuple[int, int]:
    height, width = (int(side) for side in value)
    if not (1 <= height <= 8192 and 1 <= width <= 8192):
        raise ValueError(f"pictures of {height}x{width} pixels")
    return height, width


def _threat(values: dict[str, Any], image_size: tuple[int, int]) -> Threat:
    """A threat that is no larger than the picture, so that it is cheap to look at."""
    size = values.get("size")
    height, width = image_size
    if isinstance(size, list) and isinstance(size[0], int) and not (size[0] <= height and size[1] <= width):
        raise ValueError(f"a patch of {size[0]}x{size[1]} pixels on pictures of {height}x{width}")
    if isinstance(size, int) and size > height * width:
        raise ValueError(f"a patch of {size} pixels on pictures of {height}x{width}")
    return threat_from_dict(values)


def _by_patch(values: dict[str, Any], largest: int) -> dict[int, float]:
    found = {int(side): _share(share) for side, share in values.items()}
    if not all(1 <= side <= largest for side in found):
        raise ValueError(f"certified_by_patch knows patches that are not of 1 to {largest} pixels")
    return dict(sorted(found.items()))


def _share(value: Any) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{value} is no share")
    return float(value)


def _timing(folder: Path) -> dict[str, Any]:
    _small(folder / "timing.json")
    return read_json(folder / "timing.json") if (folder / "timing.json").exists() else {}


def _passes(passes: np.ndarray, timing: dict[str, Any]) -> float | None:
    return float(passes.mean()) if len(passes) else _positive(timing.get("forward_passes_per_image"))


def _positive(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value < math.inf else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Settings that tell runs apart, as short texts; a setting within a setting is named "outer · inner"."""
    keys = ("defense", "method", "model_sha256", "dataset", "split", "images", "dataset_sha256", "seed")
    found = {key.replace("_", " "): plain(config[key]) for key in keys if key in config}
    for group in ("settings", "versions"):
        values = config.get(group)
        for key, value in list(values.items())[:50] if isinstance(values, dict) else []:
            inner = value.items() if isinstance(value, dict) else [(None, value)]
            for name, one in list(inner)[:20]:
                outer = plain(key).replace("_", " ")
                words = ", ".join(plain(item) for item in one[:20]) if isinstance(one, list) else plain(one)
                found[f"{group} · {outer}" if name is None else f"{group} · {outer} · {plain(name)}"] = words
    return found
