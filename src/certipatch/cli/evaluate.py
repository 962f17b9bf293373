"""``certipatch evaluate``: clean and certified accuracy of a defense on data."""

from pathlib import Path
from typing import Annotated

import typer

from certipatch.cli.options import (
    CountOption,
    DataOption,
    DefenseOption,
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


def evaluate(
    defense: DefenseOption,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Run folder: written here, resumed from here.")],
    model: ModelOption = None,
    settings: SetOption = None,
    patch: PatchOption = None,
    shape: ShapeOption = None,
    count: CountOption = 1,
    where: WhereOption = "anywhere",
    sparse: SparseOption = None,
    split: SplitOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N pictures.", metavar="N")] = None,
    part: Annotated[
        int | None,
        typer.Option(
            "--part",
            help="Pictures per record file; a killed worker loses at most one file. Default: 250.",
            min=1,
            metavar="N",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Certify every image of a dataset. Stops and resumes; shows its progress.

    Examples:

      certipatch evaluate --defense fashion-columns --data fashion-sample --patch 5 --out runs/fashion

      certipatch evaluate --defense patchguard --model fashion-columns --data fashion-sample --patch 5 --out runs/mask-ds

      certipatch evaluate --defense models/m --data path/to/mnist --split test --patch 2% --out runs/m

      certipatch evaluate --defense randomized-ablation --model fashion-columns --data fashion-sample --patch 5 --out runs/r

      certipatch evaluate --defense interval-bounds --model models/mlp --data path/to/mnist --sparse 4 --out runs/ibp

      certipatch evaluate --defense patchcleanser --model onnx:net.onnx --data cifar10 --patch 5 --limit 500 --out runs/net

      torchrun --nproc-per-node 2 -m certipatch evaluate --defense models/m --data path/to/mnist --patch 5 --out runs/m
    """
    import json

    from certipatch.cli.progress import progress_bar

    threat = threat_from(patch, shape, count, where, sparse)
    from certipatch.report import of_run
    from certipatch.runs.evaluate import evaluate_into
    from certipatch.runs.experiment import DataRef
    from certipatch.saved import DefenseRef

    with progress_bar("evaluate") as progress:
        ref = DefenseRef(defense, model, changes_from(settings))
        summary = evaluate_into(out, ref, DataRef(data, split, limit), threat, progress, part, of_run)
    if not summary:  # another worker than the first
        return
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    for line in summary_lines(summary, out):
        typer.echo(line)


def summary_lines(summary: dict, out: Path) -> list[str]:
    """The result in three lines."""
    from certipatch.threats import threat_from_dict

    confidence = summary.get("confidence", 1.0)
    by = ", by detection" if summary.get("notion") == "detection" else ""
    sampled = f", each with confidence {confidence:g}" if confidence < 1 else ""
    note = f" ({summary['dataset_note']})" if "dataset_note" in summary else ""
    threat = threat_from_dict(summary["threat"])
    return [
        f"{summary['defense']} on {summary['images']} pictures of {summary['dataset']} {summary['split']}{note}",
        f"clean      {accuracy_with_interval(summary, 'clean')}",
        f"certified  {accuracy_with_interval(summary, 'certified')}  against {threat}{by}{sampled}",
        f"report     {out / 'report.html'}",
    ]
