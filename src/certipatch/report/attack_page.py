"""The page of an attack: three numbers, a map of its successes, and the worst patches on their images."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from certipatch.data import Pictures
from certipatch.errors import InputError
from certipatch.plumbing.files import read_config, read_json
from certipatch.report import formatting
from certipatch.report.colours import picture, png
from certipatch.report.images import evenly
from certipatch.runs.attack_records import attacked_picture
from certipatch.runs.records import read_evidence, read_records
from certipatch.threats import PatchThreat, threat_from_dict

LIMIT = 4_500_000  # bytes of a page
CARDS = 48
WIDTH = 400  # of the bars' drawing


def of_attack(pictures: Pictures, out: Path, summary: dict[str, Any]) -> str:
    """A self-contained HTML page of less than 5 MB, without a script. The same run gives the same text.

    Errors: InputError if records and evidence of the run do not belong together.
    """
    import jinja2
    from markupsafe import Markup

    records, evidence = read_records(out), read_evidence(out)
    if len(records) != len(pictures) or records["index"].to_pylist() != evidence["index"].to_pylist():
        raise InputError(f"{out} lacks records of some pictures; run attack again")
    config = read_config(out)
    timing = read_json(out / "timing.json") if (out / "timing.json").exists() else {}
    cards = _cards(pictures, records, evidence, config["classes"], summary["images"])
    values = {
        "style": Markup((files("certipatch.report") / "style.css").read_text(encoding="utf-8")),
        "summary": summary,
        "heading": f"{summary['attack']} against {summary['defense']} on {summary['dataset']}, {summary['split']}",
        "threat": threat_words(summary["threat"]),
        "bars": _bars(summary),
        "heat": _heat(config, records, evidence),
        "cards": cards,
        "pixelated": max(config["image_size"]) <= 160,
        "tables": [
            ("Settings", formatting.rows({key: value for key, value in config.items() if key != "versions"})),
            ("Speed of this machine", formatting.rows(timing)),
            ("Versions", formatting.rows(summary["versions"])),
        ],
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("certipatch.report") / "attack.html.j2").read_text(encoding="utf-8"))
    while len(text := template.render(values)) > LIMIT and len(values["cards"]) > 1:
        values["cards"] = values["cards"][: len(values["cards"]) // 2]
    return text


def threat_words(threat: dict[str, Any]) -> str:
    """A threat in words, including the threat of the L∞ attack."""
    if threat["kind"] == "linf":
        return f"every value changed by up to {threat['epsilon']:.4g}"
    return str(threat_from_dict(threat))


def _bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    proves = not summary["theorem"].startswith("none")
    what = {
        "clean": "right without an attack",
        "attacked": "still right after it",
        "certified": "proven: no attack within the threat can succeed"
        if proves
        else "nothing is proven by this defense",
    }
    images = summary["images"]
    return [
        {
            "name": f"{kind} accuracy",
            "value": formatting.percent(summary[f"{kind}_accuracy"], images),
            "interval": formatting.interval(summary[f"{kind}_ci95"], images),
            "what": text,
            "width": round(WIDTH * summary[f"{kind}_accuracy"], 2),
            "low": round(WIDTH * summary[f"{kind}_ci95"][0], 2),
            "high": round(WIDTH * summary[f"{kind}_ci95"][1], 2),
        }
        for kind, text in what.items()
    ]


def _heat(config: dict[str, Any], records: pa.Table, evidence: pa.Table) -> dict[str, Any] | None:
    """Success per pixel: the share of broken images among those on which a patch was tried over the pixel."""
    if config["threat"]["kind"] != "patch" or config["threat"]["count"] != 1:
        return None
    threat = threat_from_dict(config["threat"])
    assert isinstance(threat, PatchThreat)
    height, width = config["image_size"]
    locations = threat.locations((height, width))
    tried, hit = np.zeros((height, width)), np.zeros((height, width))
    columns = {name: records[name].to_pylist() for name in ("broken", "top", "left", "height", "width")}
    for i, numbers in enumerate(evidence["tried"].to_pylist()):
        places = set() if numbers is None else set(np.frombuffer(numbers, "<i4").tolist())
        boxes = {locations.box(place) for place in places if 0 <= place < len(locations)}
        if columns["broken"][i] and columns["top"][i] is not None:
            top, left, high, wide = (columns[name][i] for name in ("top", "left", "height", "width"))
            boxes.add((top, left, high, wide))
            hit[top : top + high, left : left + wide] += 1
        for top, left, high, wide in boxes:
            tried[top : top + high, left : left + wide] += 1
    if not tried.any():
        return None
    share = np.divide(hit, tried, out=np.full_like(hit, np.nan), where=tried > 0)
    most = float(np.nanmax(share)) or 1.0
    strength = np.nan_to_num(share / most)[..., None]
    ramp = np.array([250, 245, 240]) * (1 - strength) + np.array([150, 10, 25]) * strength
    colours = np.where(np.isnan(share)[..., None], 150, ramp).round().astype(np.uint8)
    return {
        "image": png(colours, smooth=False),
        "most": formatting.percent(most, 1),
        "missing": bool(np.isnan(share).any()),
    }


def _cards(
    pictures: Pictures, records: pa.Table, evidence: pa.Table, classes: list[str], images: int
) -> list[dict[str, Any]]:
    """The rows to show: broken certificates first, then images that fell, then an even sample of images that stood."""
    rows = records.to_pylist()
    broken = [i for i, row in enumerate(rows) if row["violated"] or (row["broken"] and row["certified"])]
    fell = [i for i, row in enumerate(rows) if row["broken"] and i not in set(broken)]
    stood = [i for i, row in enumerate(rows) if row["attacked"] and not row["broken"]]
    chosen = (
        broken[:CARDS] + [fell[i] for i in evenly(len(fell), CARDS)] + [stood[i] for i in evenly(len(stood), CARDS)]
    )
    if len(fell) + len(broken) >= CARDS // 2:
        chosen = broken[:CARDS] + [fell[i] for i in evenly(len(fell), CARDS - CARDS // 4)]
        chosen += [stood[i] for i in evenly(len(stood), CARDS // 4)]
    cards = []
    for i in chosen[: 2 * CARDS]:
        row, stored = rows[i], evidence.slice(i, 1).to_pylist()[0]
        clean = pictures.pixels([i])[0]
        attacked = attacked_picture(clean, stored)
        if attacked is None:
            continue
        state = "broken" if row["violated"] else "fell" if row["broken"] else "stood"
        before, after = classes[row["label"]], classes[row["attacked_label"]]
        facts = [("before", before), ("after", after + (", alarm" if row["attacked_alarm"] else ""))]
        if row["label"] != row["target"]:
            facts.append(("true class", classes[row["target"]]))
        facts.append(("certified", "yes" if row["certified"] else "no"))
        if row["certified_places"]:
            facts.append(("certified places attacked", f"{row['certified_places']:,}"))
        box = None if row["top"] is None else [row[name] for name in ("top", "left", "height", "width")]
        if box is not None:
            facts.append(("patch", f"{box[2]}×{box[3]} at row {box[0]}, column {box[1]}"))
        cards.append(
            {
                "state": {"broken": "alarm", "fell": "open", "stood": "certified"}[state],
                "badge": {"broken": "! certificate broken", "fell": "✕ changed", "stood": "✓ stood"}[state],
                "title": f"picture {row['index']}",
                "size": clean.shape[:2],
                "clean": picture(clean),
                "attacked": picture(attacked),
                "box": box,
                "facts": facts,
            }
        )
    return cards
