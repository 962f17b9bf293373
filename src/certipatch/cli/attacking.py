"""What ``attack`` does, once its options are read. Imports torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from certipatch import attacks, devices
from certipatch.cli.work import check_shape, open_named
from certipatch.data import load
from certipatch.errors import InputError
from certipatch.evaluation import attack as attacking
from certipatch.evaluation import files
from certipatch.evaluation.claim import sweep
from certipatch.report.attack_page import of_attack
from certipatch.threats import PatchThreat, Threat, threat_from_dict

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
    defense, card, name = open_named(defense_name, model_name, threat or PatchThreat(1), changes)
    pictures = load(data, split, size=card.image_size if card.resize else None, limit=limit)
    if len(pictures.class_names) != len(card.classes):
        raise InputError(
            f"{pictures.name} has {len(pictures.class_names)} classes, but {name} knows {len(card.classes)}"
        )
    check_shape(pictures.pixels([0])[0].shape, card, pictures.name)
    defense.to(device)
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
        **({"starts": attack.starts, "steps": attack.steps} | given),
    )
    summary = attacking.attack(job, out, progress, crew)
    if crew.first and not (out / "report.html").exists():
        files.write_text(out / "report.html", of_attack(pictures, out, summary))
    if crew.first:
        sweep(out)
    return summary


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
