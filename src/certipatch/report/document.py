"""The page: fills the template. Every name and setting is untrusted and is escaped there."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from certipatch.report import formatting
from certipatch.report.chart import Chart, chart
from certipatch.report.colours import colours, common_scale, gradient, picture, png
from certipatch.report.embed import embed
from certipatch.report.images import ReportImage, evenly
from certipatch.report.places import Places
from certipatch.threats import threat_from_dict

if TYPE_CHECKING:
    from jinja2 import Template

PIXELATED = 160  # pixels of a side up to which an image is shown with its pixels as squares
LIMIT = 4_900_000  # bytes of a page
CARDS, OWN_CARDS = 24, 100  # images of a page without JavaScript
BADGES = {
    "certified": "✓ certified",
    "open": "○ correct, not certified",
    "wrong": "✕ wrong",
    "alarm": "! false alarm",
}


def page(
    config: dict[str, Any],
    summary: dict[str, Any],
    timing: dict[str, Any] | None,
    shown: Sequence[ReportImage],
    places: Places | None = None,
    outcomes: dict[str, int] | None = None,
) -> str:
    """A self-contained HTML page of less than 5 MB: no network, no other file. The same input gives the same text.

    Args:
        config: settings of the run; ``config["command"] == "certify"`` for the user's own images.
        summary: results of the run; accuracies, or ``certified``, the number of certified predictions.
        timing: speed of the machine, or None.
        shown: images, in the order of the data; an even sample if not all fit.
        places: the places of the threat, for the explorer.
        outcomes: number of images in each state (``ReportImage.state``), over the whole run.
    """
    from markupsafe import Markup

    own = "certified_accuracy" not in summary
    scale = common_scale(one.map for one in shown if one.map is not None)
    drawn = _cards(shown, own, scale)
    identity = {"model_sha256": summary["model_sha256"], "seed": summary["seed"]}
    settings = {key: value for key, value in (identity | config).items() if key != "versions"}
    script = _file("explorer.js")
    values = {
        "style": Markup(_file("style.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "own": own,
        "summary": summary,
        "heading": _heading(summary, own),
        "headline": [] if own else _headline(summary),
        "threat": str(threat_from_dict(summary["threat"])),
        "attack": formatting.attack(summary["threat"]),
        "certified": summary["certified"] if own else round(summary["certified_accuracy"] * summary["images"]),
        "notion": formatting.NOTIONS.get(summary["notion"], summary["notion"]),
        "plain": formatting.plain(str(config.get("method")), summary["theorem"], places and places.layout["words"]),
        "shares": [] if own else _shares(summary, outcomes),
        "chart": _chart(summary),
        "cards": drawn,
        "alarms": any(one.alarm for one in shown),
        "outlined": any(card["weakest"] for card in drawn),
        "mapped": any(card["map"] for card in drawn),
        "unreached": any("unreached" in card["flags"] for card in drawn),
        "scale": formatting.margin(scale).lstrip("+"),
        "choices": _choices(shown, own, summary["notion"]),
        "votes": bool(places and shown and shown[0].explored and shown[0].explored.evidence.dtype == bool),
        "bounded": bool(places and places.bounds),
        "views": places and places.layout["words"],
        "one": places and places.layout["one"],
        "pixelated": bool(shown) and max(shown[0].image.shape[:2]) <= PIXELATED,
        "gradient": gradient(),
        "tables": [
            ("Settings", formatting.rows(settings)),
            ("Speed of this machine", formatting.rows(timing or {})),
            ("Versions", formatting.rows(summary["versions"])),
        ],
    }
    template = _template()
    bare = template.render(values, data=" ", fitting=len(shown), explored=max(1, len(shown) - 1))
    data, fitting, explored = embed(shown, places, scale, LIMIT - len(bare.encode()) - 4096)
    return template.render(values, data=Markup(data) if shown else None, fitting=fitting, explored=explored)


def _file(name: str) -> str:
    return (files("certipatch.report") / name).read_text(encoding="utf-8")


def _template() -> "Template":
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = formatting.percent
    return environment.from_string(_file("page.html.j2"))


def _heading(summary: dict[str, Any], own: bool) -> str:
    return f"{summary['defense']} on " + ("your own pictures" if own else f"{summary['dataset']}, {summary['split']}")


def _headline(summary: dict[str, Any]) -> list[dict[str, str]]:
    images = summary["images"]
    return [
        {
            "name": f"{kind} accuracy",
            "value": formatting.percent(summary[f"{kind}_accuracy"], images),
            "interval": formatting.interval(summary[f"{kind}_ci95"], images),
            "what": what,
        }
        for kind, what in (("certified", "right, and no patch can change it"), ("clean", "right without an attack"))
    ]


def _shares(summary: dict[str, Any], outcomes: dict[str, int] | None) -> list[dict[str, Any]]:
    clean, certified, n = summary["clean_accuracy"], summary["certified_accuracy"], summary["images"]
    if outcomes is None:
        shares = {"certified": certified, "open": max(0.0, clean - certified), "wrong": 1 - clean}
    else:
        shares = {state: count / n for state, count in outcomes.items()}
    text = {
        "certified": "✓ right and certified",
        "open": "○ right, not certified",
        "wrong": "✕ wrong",
        "alarm": "! false alarm, counts as wrong",
    }
    return [
        {"state": state, "text": text[state], "value": formatting.percent(value, n), "width": round(100 * value, 3)}
        for state, value in shares.items()
        if state != "alarm" or value > 0 or summary["notion"] == "detection"
    ]


def _choices(shown: Sequence[ReportImage], own: bool, notion: str) -> list[tuple[str, str]]:
    """The outcomes by which the gallery can be filtered."""
    choices = [
        ("all", "all"),
        ("certified", "✓ certified"),
        ("open", "○ not certified" if own else "○ right, not certified"),
    ]
    if not own:
        choices.append(("wrong", "✕ wrong"))
    if notion == "detection" or any(one.alarm for one in shown):
        choices.append(("alarm", "! false alarm"))
    return choices


def _chart(summary: dict[str, Any]) -> Chart | None:
    if "certified_by_patch" not in summary:
        return None
    return chart(summary["certified_by_patch"], summary["clean_accuracy"], summary["threat"])


def _cards(shown: Sequence[ReportImage], own: bool, scale: float) -> list[dict[str, Any]]:
    """The images of a page without JavaScript; they take at most a quarter of the page."""
    count = OWN_CARDS if own else CARDS
    while True:
        chosen = [shown[i] for i in evenly(len(shown), count)]
        cards = [_card(one, own, scale) for one in (chosen if own else sorted(chosen, key=lambda one: -one.margin))]
        if count == 1 or sum(len(card["image"]) + len(card["map"] or "") for card in cards) <= LIMIT // 4:
            return cards
        count //= 2


def _card(one: ReportImage, own: bool, scale: float) -> dict[str, Any]:
    height, width = one.image.shape[:2]
    badge = "○ not certified" if one.state == "open" and one.target is None else BADGES[one.state]
    facts = [("answer", one.label)]
    if one.target is not None:
        facts.append(("true class", one.target))
    facts.append(("smallest margin", formatting.margin(one.margin)))
    if one.largest_patch is not None:
        side = one.largest_patch
        facts.append(("largest certified patch", f"{side}×{side} pixels" if side > 0 else "none"))
    drawn = None if one.map is None else png(colours(one.map, scale), smooth=False)
    red = 0.0 if one.map is None else 1 - float((one.map > 0).mean())
    flags = ["pixelated"] if max(height, width) <= PIXELATED else []
    if one.map is not None and (one.map == float("inf")).any():
        flags.append("unreached")
    return {
        "title": one.title,
        "state": one.state,
        "badge": badge,
        "remark": "No such patch can change this wrong answer." if one.state == "wrong" and one.certified else "",
        "facts": facts,
        "image": picture(one.image),
        "map": drawn,
        "alt": f"{one.title}, answered {one.label}",
        "map_alt": f"vulnerability map of {one.title}: red on {formatting.percent(red, 1)} of the pixels",
        "size": (height, width),
        "weakest": one.weakest,
        "flags": flags,
    }
