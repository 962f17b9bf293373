"""What ``attack`` does, once its options are read. Imports torch."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from certipatch import attacks
from certipatch.cli.work import seen_in, with_classes
from certipatch.data import Pictures, load
from certipatch.data.known import SAMPLE, names
from certipatch.data.loading import DATA_VARIABLE
from certipatch.errors import InputError
from certipatch.evaluation import attack as attacking
from certipatch.evaluation.attack_campaign import Cell, as_text, campaign
from certipatch.evaluation.claim import difference, plain, sweep
from certipatch.evidence import PIXELS
from certipatch.plumbing import devices, files
from certipatch.plumbing.versions import versions
from certipatch.report.attack_page import of_attack
from certipatch.saved import Card, zoo
from certipatch.saved.open import DefenseRef, check_shape, open_named
from certipatch.threats import PatchThreat, SparseThreat, Threat, threat_from_dict

Progress = Callable[[int, int, str], None]


def attack_into(
    out: Path,
    defense_name: str,
    data: str,
    threat: Threat | None,
    attack_name: str,
    split: str | None,
    limit: int | None,
    progress: Progress,
    model_name: str | None = None,
    changes: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Attack into a run folder, with its report; gives the summary. A finished run is left as it is.

    Args:
        options: fields of ``AttackJob``; those that are None get the attack's or the job's default.
    """
    attack = attacks.find(attack_name)
    attack.check(threat)
    device, crew = devices.worker()
    defense, card, name = open_named(
        DefenseRef(defense_name, model_name, changes), threat or PatchThreat(1), lambda: seen_in(data, split)
    )
    pictures = load(data, split, size=card.image_size if card.resize else None, channels=card.channels, limit=limit)
    pictures = with_classes(pictures, card.classes, name)
    check_shape(pictures.pixels([0])[0].shape, card, pictures.name)
    defense.to(device)
    usual: dict[str, Any] = {"starts": attack.starts, "steps": attack.steps, "batch": rows_of(card.image_size)}
    given = {key: value for key, value in (options or {}).items() if value is not None}
    job = attacking.AttackJob(
        defense=defense,
        defense_name=name,
        model_sha256=card.sha256,
        image_size=card.image_size,
        class_names=card.classes,
        pictures=pictures,
        threat=threat,
        attack=attack,
        device=device,
        opened=model_name or defense_name,
        **(usual | given),
    )
    summary = attacking.attack(job, out, progress, crew)
    if crew.first and not (out / "report.html").exists():
        files.write_text(out / "report.html", of_attack(pictures, out, summary))
    if crew.first:
        sweep(out)
    return summary


def rows_of(image_size: tuple[int, int]) -> int:
    """Attacked pictures that one gradient takes by default."""
    return max(1, min(256, PIXELS // (image_size[0] * image_size[1])))


def campaign_into(out: Path, minutes: float, seed: int, progress: Progress) -> dict[str, Any]:
    """Attack every shipped model with every attack that fits; gives the table, and writes it. Stops and resumes, and
    goes on where more minutes are given than before.

    Pictures are those of the model's own test split where they are at hand ($CERTIPATCH_DATA), else the shipped sample,
    made to fit: certificates are claims about any picture.
    """
    cards = zoo()
    config = {
        "command": "campaign",
        "minutes": minutes,
        "seed": seed,
        "models": {name: card.sha256 for name, card in cards.items()},
        "versions": versions(),
    }
    if (out / "config.yaml").exists():
        if key := difference(files.read_config(out), plain(config), {"versions", "minutes"}):
            raise InputError(f"{out} holds another campaign: {key} differs; give a new --out")
    elif out.exists() and any(not files.is_leftover(path) for path in out.iterdir()):
        raise InputError(f"{out} exists and is no run folder; give a new or empty --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        files.write_text(out / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    if (out / "summary.json").exists() and (table := files.read_json(out / "summary.json"))["minutes"] >= minutes:
        return table
    opened = cache(lambda name, threat: _opened(name, cards[name], threat))
    cells = [
        Cell(name, attack, threat, partial(opened, name, threat))
        for name in cards
        for attack in attacks.ATTACKS.values()
        if (threat := _fitting(attack)) is not None
    ]
    rows = campaign(cells, out, 60 * minutes, seed, progress)
    table = {
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 2),
        "certified_pairs": sum(row["certified_pairs"] for row in rows),
        "broken_certificates": sum(row["broken_certificates"] for row in rows),
        "changed_by_chance": sum(row["changed_by_chance"] for row in rows),
        "rows": rows,
        "text": as_text(rows),
        "seed": seed,
        "versions": config["versions"],
    }
    files.write_text(out / "campaign.md", table["text"] + "\n")
    files.write_json(out / "summary.json", table)
    return table


def _fitting(attack: attacks.Attack) -> Threat | None:
    """The threat of a campaign that an attack fits; None for the L∞ attack, against which nothing is certified."""
    for threat in (PatchThreat(5), SparseThreat(1)):
        try:
            attack.check(threat)
        except InputError:
            continue
        return threat
    return None


def _opened(name: str, card: Card, threat: Threat) -> tuple[Any, Pictures]:
    defense = open_named(DefenseRef(name), threat)[0]
    own = str(card.data.get("name"))
    here = own in names() and Path(os.environ.get(DATA_VARIABLE, ""), own).is_dir() and DATA_VARIABLE in os.environ
    return defense, load(own if here else SAMPLE, size=card.image_size, channels=card.channels)


def summary_lines(summary: dict[str, Any], out: Path) -> list[str]:
    """The result in a few lines."""

    def share(key: str) -> str:
        low, high = summary[f"{key}_ci95"]
        return f"{summary[f'{key}_accuracy']:7.2%}  (95 % interval {low:.2%} to {high:.2%})"

    used, broken = summary["attack_settings"], summary["broken_certificates"]
    note = f" ({summary['dataset_note']})" if "dataset_note" in summary else ""
    how = f"{summary['attack']}, {used['starts']} starts x {used['steps']} steps{'' if used['adaptive'] else ', plain'}"
    lines = [
        f"{summary['defense']} on {summary['images']} pictures of {summary['dataset']} {summary['split']}{note}",
        f"clean      {share('clean')}",
        f"attacked   {share('attacked')}  {how}, against {words_of(summary['threat'])}",
        f"certified  {share('certified')}",
        f"broken     {broken} certificates, in {summary['attacked_certified_places']} attacked pairs of picture and "
        "certified place",
    ]
    if "changed_sampled_answers" in summary:
        lines.append(
            f"           {summary['changed_sampled_answers']} sampled answers changed, which each do with a probability "
            f"of up to {1 - summary['confidence']:g}; not counted as broken"
        )
    if broken:
        lines.append(f"           the pictures and patches are in {out / 'broken'}")
    return [*lines, f"report     {out / 'report.html'}"]


def words_of(threat: dict[str, Any]) -> str:
    """A threat in words."""
    if threat["kind"] == "linf":
        return f"changes of every value by up to {threat['epsilon']:.4g}"
    return str(threat_from_dict(threat))
