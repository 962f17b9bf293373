"""The data of a page's script: images as sheets of tiles, numbers as base64, everything in one safe JSON text."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from certipatch.report.colours import LOSSLESS, colours, data_uri
from certipatch.report.images import STATES, ExplorerData, ReportImage, evenly
from certipatch.report.places import Places

TILE = 224  # pixels of a side; larger images are made smaller
SHEET_PIXELS = 2**22
SHARE = 0.75  # of the room, for images and maps, if there is an explorer
SCORED = 5  # classes with embedded scores; votes are embedded for all
SHADES = 24  # steps of a map's colours


def embed(shown: Sequence[ReportImage], places: Places | None, scale: float, room: int) -> tuple[str, int, int]:
    """JSON of at most about ``room`` bytes; the number of its images, and the number of images in the explorer.

    An even sample of ``shown`` is taken if not all fit. Less-than signs and ampersands are escaped, so that no name can end
    its script element.
    """
    shown, data = _sheets(shown, scale, int((SHARE if places else 0.95) * room))
    names = _Names(places.classes if places else ())
    data |= {
        "titles": [one.title for one in shown],
        "label": packed([names[one.label] if one.explored is None else one.explored.answer for one in shown], "<i4"),
        "target": packed([-1 if one.target is None else names[one.target] for one in shown], "<i4"),
        "names": names.listed,
        "state": packed([STATES.index(one.state) for one in shown], "u1"),
        "safe": packed([one.certified for one in shown], "u1"),
        "margin": packed([one.margin for one in shown], "<f8"),
        "largest": packed([-1 if one.largest_patch is None else one.largest_patch for one in shown], "<i4"),
    }
    explorer, explored = None, 0
    if places is not None and all(one.explored is not None for one in shown) and shown:
        base = _places(places, shown[0])
        left = room - len(_json(data)) - len(_json(base))
        each = max(len(_json(_explored([shown[0]], places, [0]))), len(_json(_explored([shown[-1]], places, [0]))))
        chosen = evenly(len(shown), max(0, left // each))
        if chosen:
            explorer, explored = base | _explored([shown[i] for i in chosen], places, chosen), len(chosen)
    return _json(data | {"explorer": explorer}), len(shown), explored


def packed(values: Any, dtype: str) -> str:
    """Base64 of numbers, least byte first."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


class _Names:
    """Numbers of names: those of the classes first, others as they come."""

    def __init__(self, classes: Sequence[str]):
        self.listed = list(classes)
        self._number = {name: i for i, name in enumerate(classes)}

    def __getitem__(self, name: str) -> int:
        if name not in self._number:
            self._number[name] = len(self.listed)
            self.listed.append(name)
        return self._number[name]


def _json(data: Any) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sheets(shown: Sequence[ReportImage], scale: float, room: int) -> tuple[list[ReportImage], dict[str, Any]]:
    """Images and maps as sheets of tiles, evenly thinned until they fit."""
    shown = list(shown)
    while True:
        data = _tiled(shown, scale)
        size = sum(len(uri) for sheet in data["sheets"] for uri in sheet.values() if uri)
        if size <= room or len(shown) <= 1:
            return shown, data
        shown = [shown[i] for i in evenly(len(shown), max(1, int(0.97 * len(shown) * room / size)))]


def _tiled(shown: list[ReportImage], scale: float) -> dict[str, Any]:
    height, width = shown[0].image.shape[:2] if shown else (1, 1)
    shrink = min(1.0, TILE / max(height, width))
    tile = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    photo = max(tile) > LOSSLESS
    pitch = tuple(-(-side // 8) * 8 for side in tile) if photo else tile  # JPEG mixes within 8x8 pixels
    columns = 32 if not photo else 8
    per = max(columns, SHEET_PIXELS // (pitch[0] * pitch[1]) // columns * columns)
    sheets = []
    for first in range(0, len(shown), per):
        part = shown[first : first + per]
        pictures = _sheet([_fitted(one.image, tile, Image.Resampling.LANCZOS) for one in part], pitch, columns)
        maps = [colours(_steps(one.map, scale), scale) for one in part if one.map is not None]
        drawn = None
        if len(maps) == len(part):
            drawn = _sheet([_fitted(map_image, tile, Image.Resampling.NEAREST) for map_image in maps], pitch, columns)
        sheets.append({"pictures": data_uri(pictures, photo=photo), "maps": drawn and _palette(drawn)})
    return {"size": [height, width], "tile": tile, "pitch": pitch, "columns": columns, "per": per, "sheets": sheets}


def _steps(margins: np.ndarray, scale: float) -> np.ndarray:
    """Margins rounded to a few steps, so that maps stay small; the sign, and so the colour's meaning, is kept."""
    with np.errstate(invalid="ignore"):
        steps = np.sign(margins) * np.clip(np.ceil(np.abs(margins) / scale * SHADES), 1, None) * scale / SHADES
    return np.where(np.isfinite(margins), np.where(margins == 0, 0.0, steps), margins)


def _fitted(pixels: np.ndarray, tile: tuple[int, int], how: Image.Resampling) -> Image.Image:
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    height, width = tile
    return picture if picture.size == (width, height) else picture.resize((width, height), how)


def _sheet(tiles: list[Image.Image], pitch: tuple[int, ...], columns: int) -> Image.Image:
    rows = -(-len(tiles) // columns)
    sheet = Image.new(tiles[0].mode, (min(columns, len(tiles)) * pitch[1], rows * pitch[0]))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * pitch[1], i // columns * pitch[0]))
    return sheet


def _palette(sheet: Image.Image) -> str:
    """An image of at most 256 colours as PNG, every colour kept."""
    red, green, blue = np.asarray(sheet).astype(np.int32).transpose(2, 0, 1)
    colour, index = np.unique((red << 16) + (green << 8) + blue, return_inverse=True)
    small = Image.fromarray(index.reshape(sheet.size[::-1]).astype(np.uint8))
    small.putpalette(np.stack([colour >> 16, colour >> 8 & 255, colour & 255], 1).astype(np.uint8).tobytes())
    return data_uri(small)


def _places(places: Places, example: ReportImage) -> dict[str, Any]:
    """The explorer's data for the entire page: locations, rows of ``sees``, and the layout of the views."""
    locations = places.relation.locations
    assert example.explored is not None
    return {
        "masks": [["".join("1" if pixel else "0" for pixel in row) for row in mask] for mask in locations.masks],
        "shape": packed(locations.shape, "<u2"),
        "top": packed(locations.top, "<u2"),
        "left": packed(locations.left, "<u2"),
        "rowOf": packed(places.relation.row_of, "<i4"),
        "sees": packed(places.relation.packed, "u1"),
        "rows": places.relation.number_of_rows,
        "views": places.relation.number_of_views,
        "classes": len(places.classes),
        "layout": places.layout,
        "rule": places.rule,
        "notion": places.notion,
        "bounds": places.bounds,
        "kind": "votes" if example.explored.evidence.dtype == bool else "scores",
    }


def _explored(shown: Sequence[ReportImage], places: Places, index: list[int]) -> dict[str, Any]:
    """The explorer's data per image. Margins are whole numbers if ``Vote`` counted them, else float32."""
    explored = [one.explored for one in shown if one.explored is not None]
    margins = np.stack([one.margins for one in explored])
    whole = bool((margins == np.clip(margins.round(), -(2**15), 2**15 - 1)).all())
    data: dict[str, Any] = {
        "index": packed(index, "<i4"),
        "margins": packed(margins if whole else _signed(margins), "<i2" if whole else "<f4"),
        "whole": whole,
    }
    if explored[0].evidence.dtype == bool:
        data["votes"] = packed([np.packbits(one.evidence.reshape(-1)) for one in explored], "u1")
    else:
        kept = np.stack([_kept(one) for one in explored])
        scores = np.stack([one.evidence[:, classes] for one, classes in zip(explored, kept, strict=True)])
        data |= {"scores": packed(scores, "<f4"), "kept": packed(kept, "<i4"), "scored": kept.shape[1]}
    if any(one.unsure is not None and one.unsure.any() for one in explored):
        views = places.relation.number_of_views
        nobody = np.zeros(views, bool)
        data["unsure"] = packed([np.packbits(nobody if one.unsure is None else one.unsure) for one in explored], "u1")
    return data


def _kept(one: ExplorerData) -> np.ndarray:
    """The answer, the true class, and the classes of largest sums."""
    order = np.argsort(-one.evidence.sum(0, dtype=np.float64), kind="stable").tolist()
    first = [one.answer] if one.target is None else [one.answer, one.target]
    return np.array(list(dict.fromkeys(first + order))[:SCORED])


def _signed(margins: np.ndarray) -> np.ndarray:
    """Margins in float32; positive margins stay positive, others do not become positive."""
    small = margins.astype(np.float32)
    return np.where((margins > 0) & (small <= 0), np.finfo(np.float32).tiny, small)
