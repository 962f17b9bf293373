"""A soundness campaign: for a given time, every attack that fits a defense looks for a false certificate of it.

A *cell* is a defense and an attack. Each round attacks the next images in two ways. The first is the way of ``attack``.
The second attacks certified locations only, with few steps at many locations or with many steps at few. The universal
patch is learned in a few steps and is put on up to EVERYWHERE locations of an image. Certificates are claims about any
image and about each location, so an image needs no true label. An image that is uncertified at some locations is attacked
at its certified ones, and only there if time is short. A round of a cell is written before the next begins, so a campaign
stops and resumes.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from certipatch import attacks
from certipatch.attacks import Attack, Task, Victim, certifies
from certipatch.attacks.universal import Universal
from certipatch.data import Pictures, load
from certipatch.data.known import SAMPLE, dataset_names
from certipatch.data.loading import DATA_VARIABLE
from certipatch.errors import InputError
from certipatch.plumbing.files import read_json, write_json, write_text
from certipatch.plumbing.versions import versions
from certipatch.runs.attack import default_batch, sampled
from certipatch.runs.attack_records import save_break
from certipatch.runs.folder import own_folder
from certipatch.saved import Card, DefenseRef, zoo
from certipatch.saved.open import open_named
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views.render import image_size

COUNTS = ("pictures", "certified_pairs", "other_pairs", "changed_elsewhere", "changed_by_chance", "broken_certificates")
SMALL, LARGE = 2, 16  # images per round: in the first round and for slow defenses; otherwise
EVERYWHERE = 1024  # locations per image for the universal patch
SEARCH = 60  # forward and backward passes of a search for weak locations, about
Progress = Callable[[int, int, str], None]


@final
@dataclass(frozen=True)
class Cell:
    """A defense under an attack. ``open`` gives the defense and its images; it is called when the cell's turn comes."""

    name: str
    attack: Attack
    threat: Threat
    open: Callable[[], tuple[Any, Pictures]]


@final
@dataclass(frozen=True)
class Claim:
    """The predictions of a defense on B images.

    label: (B,). margins: (B, L), or None if the defense certifies nothing. usable: bool (B,), images without an alarm.
    seconds: the time that the labels alone took.
    """

    label: Tensor
    margins: Tensor | None
    usable: Tensor
    seconds: float


Claims = dict[tuple[str, Threat, range], Claim]


def campaign_into(out: Path, minutes: float, seed: int, progress: Progress) -> dict[str, Any]:
    """Attack every shipped model with every attack that fits; gives the table, and writes it. Stops and resumes; more
    minutes continue a finished campaign.

    Images are those of the model's own test split if $CERTIPATCH_DATA has it, else the shipped sample, made to fit:
    certificates are claims about any image.
    """
    cards = zoo()
    config = {
        "command": "campaign",
        "minutes": minutes,
        "seed": seed,
        "models": {name: card.sha256 for name, card in cards.items()},
        "versions": versions(),
    }
    own_folder(config, out, {"versions", "minutes"}, "campaign")
    if (out / "summary.json").exists() and (table := read_json(out / "summary.json"))["minutes"] >= minutes:
        return table
    opened = cache(lambda name, threat: _open_shipped(name, cards[name], threat))
    cells = [
        Cell(name, attack, threat, partial(opened, name, threat))
        for name in cards
        for attack in attacks.ATTACKS.values()
        if (threat := _fitting_threat(attack)) is not None
    ]
    rows = campaign(cells, out, 60 * minutes, seed, progress)
    table = {
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 2),
        **{
            key: sum(row[key] for row in rows)
            for key in ("certified_pairs", "broken_certificates", "changed_by_chance")
        },
        "rows": rows,
        "text": as_text(rows),
        "seed": seed,
        "versions": config["versions"],
    }
    write_text(out / "campaign.md", table["text"] + "\n")
    write_json(out / "summary.json", table)
    return table


def _fitting_threat(attack: Attack) -> Threat | None:
    """The first threat of a campaign that the attack fits; None for the L∞ attack: no defense certifies against it."""
    for threat in (PatchThreat(5), SparseThreat(1)):
        try:
            attack.check(threat)
        except InputError:
            continue
        return threat
    return None


def _open_shipped(name: str, card: Card, threat: Threat) -> tuple[Any, Pictures]:
    """A shipped model, and images that fit it."""
    defense = open_named(DefenseRef(name), threat)[0]
    own = str(card.data.get("name"))
    here = (
        own in dataset_names() and Path(os.environ.get(DATA_VARIABLE, ""), own).is_dir() and DATA_VARIABLE in os.environ
    )
    return defense, load(own if here else SAMPLE, size=card.image_size, channels=card.channels)


def campaign(cells: list[Cell], out: Path, seconds: float, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Attack until the time is used up, always the cell with the least time so far; gives one row per cell.

    Each cell gets at least one round. A cell that cannot be attacked at all has ``skipped``, the reason.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    rows = [_stored(out, cell) for cell in cells]
    total = sum(row["seconds"] for row in rows)
    claims: Claims = {}
    progress(int(min(total, seconds)), int(seconds), "")
    while True:
        ready = [i for i, row in enumerate(rows) if "skipped" not in row]
        fresh = [i for i in ready if rows[i]["rounds"] == 0]
        if not ready or (not fresh and total >= seconds):
            break
        i = fresh[0] if fresh else min(ready, key=lambda i: rows[i]["seconds"])
        started = time.monotonic()
        try:
            share = seconds / max(1, len(ready))
            pace = rows[i]["seconds"] / max(1, rows[i]["pictures"])
            size = LARGE if rows[i]["rounds"] and (share >= 20 or 2 * LARGE * pace <= share) else SMALL
            counts = attack_round(cells[i], out, seed, rows[i]["rounds"], share, claims, size)
        except InputError as error:
            rows[i]["skipped"] = str(error)
            counts = dict.fromkeys(COUNTS, 0)
        for key in COUNTS:
            rows[i][key] += counts[key]
        spent = time.monotonic() - started
        rows[i]["rounds"] += 1
        rows[i]["seconds"] = round(rows[i]["seconds"] + spent, 3)
        write_json(_path(out, cells[i]), rows[i])
        total = sum(row["seconds"] for row in rows)
        pairs, broken = (sum(row[key] for row in rows) for key in ("certified_pairs", "broken_certificates"))
        progress(int(min(total, seconds)), int(seconds), f"{pairs:,} certified pairs attacked, {broken} broken")
    return rows


def claimed(defense: Any, images: Tensor, threat: Threat) -> Claim:
    """The labels, margins and alarms of a defense on images."""
    started = time.monotonic()
    label, margins = Victim(defense).answer(images).label, None
    seconds = time.monotonic() - started
    usable = torch.ones_like(label, dtype=torch.bool)
    if certifies(defense):
        certificate = defense.certify(images, threat)
        label, margins = certificate.label, certificate.margin.cpu()
        usable = usable if certificate.alarm is None else ~certificate.alarm
    return Claim(label, margins, usable.cpu(), seconds)


def attack_round(
    cell: Cell, out: Path, seed: int, number: int, share: float, claims: Claims, size: int = SMALL
) -> dict[str, int]:
    """One round of a cell on its next ``size`` images; gives its counts. Slow defenses get fewer starts and steps.

    ``claims`` keeps the predictions on the last images for the other attacks on the same defense.
    """
    defense, pictures = cell.open()
    cell.attack.check(cell.threat)
    first = (max(0, number - 1) * LARGE + (SMALL if number else 0)) % max(1, len(pictures) - size)
    indices = range(first, first + size)
    images = pictures.images(indices)
    victim, key = Victim(defense), (cell.name, cell.threat, indices)
    if key not in claims:
        claims.clear()
        claims[key] = claimed(defense, images, cell.threat)
    label, margins, usable = claims[key].label, claims[key].margins, claims[key].usable
    units = share / (2 * 3 * max(1e-6, claims[key].seconds))  # a step costs about three passes, and there are two tasks
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    many = number % 2 == 1 and size > SMALL
    starts, steps = affordable(2, min(cell.attack.steps, 20), units)
    base = Task(
        images=images,
        label=label,
        threat=cell.threat,
        numbers=list(indices),
        starts=starts,
        steps=steps,
        search="auto" if units >= SEARCH else "random",
        margins=margins,
        seed=seed + number,
        batch=default_batch(image_size(images)),
    )
    tasks = [base]
    single = isinstance(cell.threat, PatchThreat) and cell.threat.count == 1
    if margins is not None and single and bool((margins > 0).any()):
        if isinstance(cell.attack, Universal):  # its steps are shared; a location costs two passes in all
            starts, steps = max(1, min(4 if size == SMALL else EVERYWHERE if many else 64, int(1.5 * units))), steps
        else:
            starts, steps = affordable(
                4 if size == SMALL else 64 if many else 8, min(cell.attack.steps, 2 if many else 40), units
            )
        certified = replace(base, starts=starts, steps=steps, step=0.5 if many else 0.05, search="certified")
        tasks = [base, certified] if units >= 1 else [certified]
    for task in tasks:
        chosen = usable
        if task.search == "certified" and margins is not None:
            chosen = usable & (margins > 0).any(1)
        rows = chosen.nonzero().flatten()
        if not len(rows):
            continue
        part = replace(
            task,
            images=images[rows],
            label=label[rows],
            numbers=[indices[i] for i in rows.tolist()],
            margins=None if margins is None else margins[rows],
        )
        outcome = cell.attack.run(victim, part)
        counts["pictures"] += len(rows)
        for at, i in enumerate(rows.tolist()):
            own = None if margins is None else margins[i]
            tried = [place for place in outcome.tried[at] if place >= 0]
            sure = own is not None and bool((own > 0).all())
            if single and own is not None:
                covered = int((own[tried] > 0).sum())
            else:
                covered = int(sure) * min(1, len(outcome.tried[at]))
            counts["certified_pairs"] += covered
            counts["other_pairs"] += max(0, len(outcome.tried[at]) - covered)
            violated = bool(outcome.violated[at]) or (sure and bool(outcome.broken[at]))
            if violated and sampled(defense):
                counts["changed_by_chance"] += 1
            elif violated:
                counts["broken_certificates"] += 1
                (out / "broken").mkdir(exist_ok=True)
                row = {"index": indices[i], "label": int(label[i]), "attacked_label": int(outcome.label[at])}
                row |= {"margin": own, "top": None, "left": None, "height": None, "width": None, "cell": cell.name}
                save_break(out, indices[i], images[i].cpu(), outcome.attacked[at].cpu(), row)
            elif bool(outcome.broken[at]):
                counts["changed_elsewhere"] += 1
    return counts


def affordable(starts: int, steps: int, units: float) -> tuple[int, int]:
    """Starts and steps, at most the given ones; ``units`` pay for their product. Starts of two steps come first."""
    starts = max(1, min(starts, int(units / 2)))
    return starts, max(min(steps, 2), min(steps, int(units / starts)))


def _path(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name.replace('/', '_')}--{cell.attack.name}.json"


def _stored(out: Path, cell: Cell) -> dict[str, Any]:
    """A cell's row from an earlier start, or an empty one."""
    empty = {"defense": cell.name, "attack": cell.attack.name, "threat": str(cell.threat), "rounds": 0, "seconds": 0.0}
    empty |= dict.fromkeys(COUNTS, 0)
    try:
        stored = read_json(_path(out, cell))
    except InputError:
        return empty
    whole = all(isinstance(stored.get(key), int | float) and stored[key] >= 0 for key in (*COUNTS, "rounds", "seconds"))
    return stored if whole and stored.keys() >= empty.keys() else empty


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with their sums."""
    titles = ("defense", "attack", "pictures", "certified pairs", "broken", "other pairs", "changed there", "seconds")
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join(["---"] * 2 + ["---:"] * 6) + " |"]
    keys = ("pictures", "certified_pairs", "broken_certificates", "other_pairs", "changed_elsewhere")
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['defense']} | {row['attack']} | does not fit: {row['skipped']} | | | | | |")
            continue
        chance = f" ({row['changed_by_chance']} by chance)" if row["changed_by_chance"] else ""
        cells = [f"{row[key]:,}" for key in keys]
        cells[2] += chance
        lines.append(f"| {row['defense']} | {row['attack']} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    sums = [f"{sum(row[key] for row in rows):,}" for key in keys]
    lines.append(f"| all | | {' | '.join(sums)} | {sum(row['seconds'] for row in rows):.0f} |")
    return "\n".join(lines)
