"""Numbers, threats and settings in words."""

import json
import math
from collections.abc import Sequence
from typing import Any

NOTIONS = {
    "recovery": "Recovery: no attack within the threat changes the answer.",
    "detection": "Detection: an attack within the threat leaves the answer as it is, or raises an alarm.",
}


PLAIN = {
    "derandomized-smoothing": "The network never sees the whole picture. It looks at {views}, and each casts its vote; the "
    "class with most votes is the answer. A patch can only change those views that show one of its pixels. The "
    "certificate gives all of them to the attacker, as votes for whichever rival he likes. Where the answer still wins "
    "with the votes of the other views, nothing painted there can change it.",
    "patchguard": "The network looks at {views}, and says for each how much it speaks for every class. Before adding up, "
    "every class loses the region that speaks loudest for it, a region as large as the patch can reach. The certificate "
    "compares, place by place, the least that the answer can be left with against the most that any rival can reach.",
    "clipped-bagnet": "The network looks at {views}. Each adds a score between two fixed limits to every class; the class "
    "with the largest sum is the answer. A patch can only change the scores of those views that show one of its pixels, "
    "and only up to the limits. Where the answer still wins when all of them are at their worst, nothing painted there "
    "can change it.",
    "bagcert": "The network looks at {views}. Each counts for every class that it is sure enough of; the class with the "
    "largest count is the answer. A patch can only change those views that show one of its pixels. Where the answer "
    "still wins when all of them count against it, nothing painted there can change it.",
    "patchguard-plus-plus": "The network looks at {views}. The defense hides region after region of them; if another class "
    "then wins with a high score, it raises an alarm. A patch that lies in a hidden region has no say in what is left. "
    "Where what is left says the same as the whole, an attacker can change the answer only at the price of an alarm.",
    "randomized-ablation": "The network never sees the whole picture. It looks at views drawn at random, and each votes for "
    "one class. A patch can only change votes of views that show one of its pixels, and what share of all possible views "
    "those are is known exactly. Where the answer keeps more than half of all votes without that share, nothing painted "
    "there can take it from the class that most views vote for. The votes are estimated from a sample, so each "
    "certificate holds with the stated confidence only.",
    "patchcleanser": "The network looks at the picture with each of many masks over it, and with every two of them. The "
    "answer is that of most masks, or, where that is asked for, the one to the whole picture; a mask that dissents is believed "
    "instead if it stays with its answer under every second mask. Wherever the patch lies, some mask hides it. Where such a "
    "mask says the same alone and together with every second mask, nothing painted under it can change the answer.",
    "patchcure": "A first part of the network looks at small windows of the picture, once. A second part answers with each of "
    "many masks over what the first one found, and with every two of them; the answer is chosen from these as by double masking. "
    "Wherever the patch lies, some mask hides every window that sees it. Where such a mask says the same alone and together "
    "with every second mask, nothing painted under it can change the answer.",
    "minority-reports": "The network looks at the picture, and at it with each of many masks over it. If under some mask it is "
    "sure of another class, it raises an alarm. Wherever the patch lies, some mask hides it. Where the network is sure of "
    "the answer under such a mask, an attacker can change the answer only at the price of an alarm.",
    "undefended": "A plain network that looks at the whole picture: any patch may change its answer, nothing is proven.",
}


def plain(method: str, views: str | None) -> str:
    """The theorem of a defense in plain words; nothing for one that is not known."""
    return PLAIN.get(method, "").format(views=f"partial pictures ({views})" if views else "partial pictures")


def percent(fraction: float, images: int) -> str:
    """61.3 %, with a second decimal from 10,000 pictures on."""
    return f"{100 * fraction:.{2 if images >= 10_000 else 1}f}\u202f%"


def interval(bounds: Sequence[float], images: int) -> str:
    """58.2–64.3 %."""
    low, high = (percent(bound, images) for bound in bounds)
    return f"{low[:-2]}–{high}"


def margin(value: float) -> str:
    """A margin with its sign: +3, 0, −0.25, −∞; in words where it is too close to zero to be written."""
    if math.isnan(value):
        return "unknown"
    if 0 < abs(value) < 1e-6:
        return "just above 0" if value > 0 else "just below 0"
    size = "∞" if math.isinf(value) else f"{abs(value):.3g}" if value % 1 else f"{abs(value):,.0f}"
    return size if value == 0 else ("+" if value > 0 else "−") + size


def attack(threat: dict[str, Any]) -> str:
    """What the attacker cannot do, as the subject of a sentence: "no 5×5-pixel patch, placed anywhere and …"."""
    if threat["kind"] == "sparse":
        return f"no repainting of any {_count(threat['pixels'], 'pixel')}, wherever they lie,"
    one, count = _patch(threat["size"], threat["shape"]), threat["count"]
    what = f"no {one}" if count == 1 else f"no {count} patches at once, each a {one},"
    return f"{what}{',' if count == 1 else ''} {_place(threat['where'])} and painted in any way,"


def rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (name, value) in plain words; a setting within a setting is named "outer · inner"."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = prefix + str(key).replace("_", " ")
        found += rows(value, name + " · ") if isinstance(value, dict) else [(name, _value(value))]
    return found


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
