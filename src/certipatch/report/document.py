"""The page: fills the template. Every name and setting is untrusted and is escaped there."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

from certipatch.report import words
from certipatch.report.chart import Chart, chart
from certipatch.report.colours import colours, common_scale, gradient, png
from certipatch.report.shown import Shown
from certipatch.threats import threat_from_dict

PIXELATED = 160  # pixels of a side up to which a picture is shown with its pixels as squares
BADGES = {"certified": "✓ certified", "open": "○ correct, not certified", "wrong": "✕ wrong"}


def page(config: dict[str, Any], summary: dict[str, Any], timing: dict[str, Any] | None, shown: Sequence[Shown]) -> str:
    """A self-contained HTML page: no network, no other file, no script. The same input gives the same text.

    Args:
        config: settings of the run; ``config["command"] == "certify"`` for the user's own pictures.
        summary: what the run found; accuracies, or ``certified``, the number of certified answers.
        timing: speed of the machine, or None.
        shown: pictures for the gallery, in this order.
    """
    own = "certified_accuracy" not in summary
    scale = common_scale(one.map for one in shown if one.map is not None)
    cards = [_card(one, own, scale) for one in shown]
    identity = {"model_sha256": summary["model_sha256"], "seed": summary["seed"]}
    settings = {key: value for key, value in (identity | config).items() if key != "versions"}
    return _template().render(
        own=own,
        summary=summary,
        heading=_heading(summary, own),
        headline=[] if own else _headline(summary),
        threat=str(threat_from_dict(summary["threat"])),
        attack=words.attack(summary["threat"]),
        certified=summary["certified"] if own else round(summary["certified_accuracy"] * summary["images"]),
        notion=words.NOTIONS.get(summary["notion"], summary["notion"]),
        shares=[] if own else _shares(summary),
        chart=_chart(summary),
        cards=cards,
        outlined=any(card["weakest"] for card in cards),
        mapped=any(card["map"] for card in cards),
        unreached=any("unreached" in card["flags"] for card in cards),
        scale=words.margin(scale)[1:],
        gradient=gradient(),
        tables=[
            ("Settings", words.rows(settings)),
            ("Speed of this machine", words.rows(timing or {})),
            ("Versions", words.rows(summary["versions"])),
        ],
    )


def _template() -> jinja2.Template:
    source = (files("certipatch.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = words.percent
    return environment.from_string(source)


def _heading(summary: dict[str, Any], own: bool) -> str:
    return f"{summary['defense']} on " + ("your own pictures" if own else f"{summary['dataset']}, {summary['split']}")


def _headline(summary: dict[str, Any]) -> list[dict[str, str]]:
    images = summary["images"]
    return [
        {
            "name": f"{kind} accuracy",
            "value": words.percent(summary[f"{kind}_accuracy"], images),
            "interval": words.interval(summary[f"{kind}_ci95"], images),
            "what": what,
        }
        for kind, what in (("certified", "right, and no patch can change it"), ("clean", "right without an attack"))
    ]


def _shares(summary: dict[str, Any]) -> list[dict[str, Any]]:
    clean, certified = summary["clean_accuracy"], summary["certified_accuracy"]
    shares = (
        ("certified", "✓ right and certified", certified),
        ("open", "○ right, not certified", max(0.0, clean - certified)),
        ("wrong", "✕ wrong", 1 - clean),
    )
    return [
        {"state": state, "text": text, "value": words.percent(value, summary["images"]), "width": round(100 * value, 3)}
        for state, text, value in shares
    ]


def _chart(summary: dict[str, Any]) -> Chart | None:
    if "certified_by_patch" not in summary:
        return None
    return chart(summary["certified_by_patch"], summary["clean_accuracy"], summary["threat"])


def _card(one: Shown, own: bool, scale: float) -> dict[str, Any]:
    height, width = one.image.shape[:2]
    badge = "○ not certified" if one.state == "open" and one.target is None else BADGES[one.state]
    facts = [("answer", one.label)]
    if one.target is not None:
        facts.append(("true class", one.target))
    facts.append(("smallest margin", words.margin(one.margin)))
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
        "image": png(one.image),
        "map": drawn,
        "alt": f"{one.title}, answered {one.label}",
        "map_alt": f"vulnerability map of {one.title}: red on {words.percent(red, 1)} of the pixels",
        "size": (height, width),
        "weakest": one.weakest,
        "flags": flags,
    }
