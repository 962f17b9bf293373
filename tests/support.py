"""Small real things for tests: a folder of parquet pictures, a recipe that trains in seconds, a trained defense."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

RECIPE = {
    "name": "tiny",
    "data": "given on the command line",
    "holdout": 20,
    "views": {"name": "columns", "width": 3},
    "model": {"name": "strip", "widths": [8, 8]},
    "objective": {"views_per_step": "all", "cross_entropy_weight": 0.5, "vote_margin_weight": 1.0, "patch": 2},
    "augment": {"max_shift": 1, "flip": True},
    "epochs": 2,
    "batch_size": 16,
}


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def stripes(count: int, seed: int, size: tuple[int, int] = (12, 12), colour: bool = False) -> list[tuple[bytes, int]]:
    """Pictures of three classes that a column can tell apart: bright at the top, in the middle, at the bottom."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        target = number % 3
        pixels = generator.integers(0, 80, size, dtype=np.uint8)
        third = size[0] // 3
        pixels[target * third : (target + 1) * third] += 150
        if colour:
            pixels = np.stack([pixels, pixels // 2, pixels], 2)
        found.append((png(pixels), target))
    return found


def write_parquet(folder: Path, size: tuple[int, int] = (12, 12), colour: bool = False) -> Path:
    """A Hub-layout folder with 100 training and 40 test pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", 100, 0), ("test", 40, 1)):
        rows = stripes(count, seed, size, colour)
        images = [{"bytes": encoded, "path": None} for encoded, _ in rows]
        table = pa.table({"image": images, "label": [target for _, target in rows]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_recipe(path: Path, **changes: object) -> Path:
    """The tiny recipe as a YAML file."""
    path.write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")
    return path
