"""Numbers, threats and settings in words."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from certipatch.defenses.registry import METHODS
from certipatch.errors import InputError

NOTIONS = {
    "recovery": "Recovery: no attack within the threat changes the answer.",
    "detection": "Detection: an attack within the threat leaves the answer as it is, or raises an alarm.",
}


def plain(method: str, theorem: str, views: str | None) -> str:
    """The theorem of a defense in plain words; the theorem itself if the defense has no such words or is unknown here."""
    with suppress(KeyError, InputError):
        if words := METHODS[method].in_words:
            return words.format(views=f"partial pictures ({views})" if views else "partial pictures")
    return f"It is certified if the theorem holds: {theorem}."


def percent(fraction: float, images: int) -> str:
    """61.3 %, with a second decimal from 10,000 images on."""
    return f"{100 * fraction:.{2 if images >= 10_000 else 1}f}\u202f%"


def interval(bounds: Sequence[float], images: int) -> str:
    """58.2–64.3 %."""
    low, high = (percent(bound, images) for bound in bounds)
    return f"{low[:-2]}–{high}"


def margin(value: float) -> str:
    """A margin with its sign: +3, 0, −0.25, −∞; in words if it is too close to zero to be written."""
    if math.isnan(value):
        return "unknown"
    if 0 < abs(value) < 1e-6:
        return "just above 0" if value > 0 else "just below 0"
    size = "∞" if math.isinf(value) else f"{abs(value):.3g}" if value % 1 else f"{abs(value):,.0f}"
    return size if value == 0 else ("+" if value > 0 else "−") + size


def attack(threat: dict[str, Any]) -> str:
    """The excluded attack as the subject of a sentence: "no 5×5-pixel patch, placed anywhere and …"."""
    if threat["kind"] == "sparse":
        return f"no repainting of any {_count(threat['pixels'], 'pixel')}, wherever they lie,"
    one, count = _patch(threat["size"], threat["shape"]), threat["count"]
    what = f"no {one}" if count == 1 else f"no {count} patches at once, each a {one},"
    return f"{what}{',' if count == 1 else ''} {_place(threat['where'])} and painted in any way,"


def rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (name, value) in plain words; a setting within a setting is named "outer · inner"."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = prefix + str(key).replace("_", " ")
        pairs += rows(value, name + " · ") if isinstance(value, dict) else [(name, _value(value))]
    return pairs


def _patch(size: Any, shape: str | None) -> str:
    if shape is not None:
        area = f"{size} of the picture's area" if isinstance(size, str) else _count(size, "pixel")
        return f"{shape} patch of {area}"
    if isinstance(size, str):
        return f"square patch of {size} of the picture's area"
    if isinstance(size[0], list):
        return f"patch of the given shape ({_count(sum(map(sum, size)), 'pixel')})"
    return f"{size[0]}×{size[1]}-pixel patch"


def _place(where: Any) -> str:
    if where == "anywhere":
        return "placed anywhere"
    return "placed in a corner" if where == "corners" else f"placed at {_count(len(where), 'given place')}"


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def _value(value: Any) -> str:
    if value is None or value in ("", [], ()):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, list | tuple):
        more = f", … ({len(value):,} in all)" if len(value) > 60 else ""
        return ", ".join(_item(item) for item in value[:60]) + more
    return str(value)


def _item(value: Any) -> str:
    nested = isinstance(value, list | tuple | dict)
    return json.dumps(value, ensure_ascii=False, default=str) if nested else str(value)
