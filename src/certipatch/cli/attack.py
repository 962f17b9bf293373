"""``certipatch attack``: the accuracy that an attack leaves, and the certificates that it breaks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from certipatch.cli.options import (
    CountOption,
    ModelOption,
    PatchOption,
    SetOption,
    ShapeOption,
    SparseOption,
    SplitOption,
    WhereOption,
    accuracy_with_interval,
    changes_from,
    threat_from,
)
from certipatch.errors import InputError


def attack(
    out: Annotated[Path, typer.Option("--out", help="Run folder: written here, resumed from here.")],
    defense: Annotated[
        str | None, typer.Option("--defense", help="A zoo model, a trained folder, or with --model a method.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="A dataset name or folder, as for evaluate.")] = None,
    name: Annotated[
        str,
        typer.Option("--attack", help="patch-pgd, lavan, universal, square, sparse or linf (certipatch list attacks)."),
    ] = "patch-pgd",
    model: ModelOption = None,
    settings: SetOption = None,
    patch: PatchOption = None,
    shape: ShapeOption = None,
    count: CountOption = 1,
    where: WhereOption = "anywhere",
    sparse: SparseOption = None,
    epsilon: Annotated[
        str | None, typer.Option("--epsilon", help="For linf, instead of a patch: the largest change, as 8/255.")
    ] = None,
    split: SplitOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N pictures.", metavar="N")] = None,
    starts: Annotated[
        int | None, typer.Option("--starts", help="Restarts per picture. Default: the attack's.", min=1, metavar="N")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Iterations of each restart. Default: the attack's.", min=0, metavar="N"),
    ] = None,
    step: Annotated[float, typer.Option("--step", help="Size of a step.", min=0.0, max=1.0)] = 0.05,
    search: Annotated[
        str,
        typer.Option("--search", help="Places: auto, random, exhaustive, gradient, margin or certified (those only)."),
    ] = "auto",
    target: Annotated[
        int | None, typer.Option("--target", help="Only this class counts as success.", metavar="CLASS")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Attack the bare network: know nothing of the defense.")
    ] = False,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Gradients in bfloat16: faster if the machine has it. Predictions stay exact."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all random draws.", min=0)] = 0,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", help="Attacked pictures per gradient. Default: 2^20 pixels, at most 256.", min=1, metavar="N"
        ),
    ] = None,
    part: Annotated[
        int | None, typer.Option("--part", help="Pictures per record file. Default: 50.", min=1, metavar="N")
    ] = None,
    all_zoo: Annotated[bool, typer.Option("--all-zoo", help="Every shipped model, every attack that fits.")] = False,
    minutes: Annotated[
        float, typer.Option("--minutes", help="With --all-zoo: the time to attack.", min=0.01, metavar="N")
    ] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Attack every image, those with a certificate too. A broken certificate is exit code 1. Stops and resumes.

    Examples:

      certipatch attack --defense fashion-columns --data fashion-sample --patch 5 --attack patch-pgd --limit 100 --out runs/a

      certipatch attack --defense lgs --model mnist-plain --data path/to/mnist --patch 5 --where corners --out runs/lgs

      certipatch attack --defense mnist-plain --data path/to/mnist --attack linf --epsilon 0.1 --out runs/linf

      certipatch attack --defense fashion-columns --data fashion-sample --sparse 4 --attack sparse --out runs/sparse

      certipatch attack --all-zoo --minutes 10 --out runs/soundness
    """
    import json

    from certipatch.cli.progress import progress_bar

    if all_zoo:
        if defense or model or data or patch or sparse or epsilon:
            raise InputError("--all-zoo attacks every shipped model; leave --defense, --data and the threat out")
        from certipatch.runs.campaign import campaign_into

        with progress_bar("campaign") as progress:
            table = campaign_into(out, minutes, seed, progress)
        print(json.dumps(table, ensure_ascii=False) if as_json else table["text"])
        raise typer.Exit(1 if table["broken_certificates"] else 0)
    if defense is None or data is None:
        raise InputError("give --defense and --data, or --all-zoo")
    threat = None
    if epsilon is None:
        if name == "linf":
            raise InputError("linf needs --epsilon, as 8/255, in place of a patch")
        threat = threat_from(patch, shape, count, where, sparse)
    elif name != "linf" or patch or sparse:
        raise InputError("--epsilon is the threat of --attack linf; give it alone")
    from certipatch.report import of_attack
    from certipatch.runs.attack import attack_into
    from certipatch.runs.experiment import DataRef
    from certipatch.saved import DefenseRef

    options = {
        "starts": starts,
        "steps": steps,
        "step": step,
        "search": search,
        "target": target,
        "adaptive": not plain,
        "bf16": bf16,
        "seed": seed,
        "batch": batch,
        "part": part,
        "epsilon": _fraction(epsilon),
    }
    with progress_bar("attack") as progress:
        ref = DefenseRef(defense, model, changes_from(settings))
        summary = attack_into(out, ref, DataRef(data, split, limit), threat, name, progress, options, of_attack)
    if not summary:  # another worker than the first
        return
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        for line in summary_lines(summary, out):
            typer.echo(line)
    if summary["broken_certificates"]:
        raise typer.Exit(1)


def summary_lines(summary: dict[str, Any], out: Path) -> list[str]:
    """The result in a few lines."""

    used, broken = summary["attack_settings"], summary["broken_certificates"]
    note = f" ({summary['dataset_note']})" if "dataset_note" in summary else ""
    how = f"{summary['attack']}, {used['starts']} starts x {used['steps']} steps{'' if used['adaptive'] else ', plain'}"
    lines = [
        f"{summary['defense']} on {summary['images']} pictures of {summary['dataset']} {summary['split']}{note}",
        f"clean      {accuracy_with_interval(summary, 'clean')}",
        f"attacked   {accuracy_with_interval(summary, 'attacked')}  {how}, against {words_of(summary['threat'])}",
        f"certified  {accuracy_with_interval(summary, 'certified')}",
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
    from certipatch.threats import threat_from_dict

    if threat["kind"] == "linf":
        return f"changes of every value by up to {threat['epsilon']:.4g}"
    return str(threat_from_dict(threat))


def _fraction(text: str | None) -> float:
    """A number such as 0.1 or 8/255, above 0 and up to 1."""
    if text is None:
        return 0.0
    try:
        over, _, under = text.partition("/")
        value = float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value <= 1:
        raise InputError(f"--epsilon {text!r} is not understood; write a number above 0 and up to 1, as 0.1 or 8/255")
    return value
