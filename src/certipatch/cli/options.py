"""Options of several commands, and a line that several commands print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from certipatch.errors import InputError

if TYPE_CHECKING:
    from certipatch.threats import Threat

DefenseOption = Annotated[
    str,
    typer.Option(
        "--defense",
        help="A zoo model (certipatch list models), the folder that train wrote, or with --model a method "
        "(certipatch list defenses).",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The network of the method: a zoo model, a trained folder, or with patchcleanser, "
        "minority-reports, interval-bounds, undefended, lgs or dw any classifier: imagenet-lite, timm:NAME, "
        "torchvision:NAME, hf:NAME, onnx:FILE, package.module:function.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the defense: threshold=0.2 (repeatable).", metavar="KEY=VALUE"),
]
DataOption = Annotated[
    str,
    typer.Option("--data", help="A dataset name, a Hub dataset, a folder of class folders, or of parquet files."),
]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="Default: test, else validation or val, else the only one.")
]
PatchOption = Annotated[
    str | None, typer.Option("--patch", help="Patch size: 5, 3x8 (rows x columns), or 2% of the picture's area.")
]
ShapeOption = Annotated[
    str | None,
    typer.Option("--shape", help="square, rectangle, line, diamond or parallelogram; --patch is then its pixel count."),
]
CountOption = Annotated[int, typer.Option("--count", help="Number of patches.")]
WhereOption = Annotated[str, typer.Option("--where", help="anywhere, corners, or TOP,LEFT;TOP,LEFT;…")]
SparseOption = Annotated[int | None, typer.Option("--sparse", help="Any K pixels instead of a patch.", metavar="K")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]


def threat_from(patch: str | None, shape: str | None, count: int, where: str, sparse: int | None) -> "Threat":
    """The threat that the options describe. InputError unless it is exactly one."""
    from certipatch.threats import PatchThreat, SparseThreat, parse_patch, parse_where

    if (patch is None) == (sparse is None):
        raise InputError("give a threat: either --patch (5, 3x8 or 2%) or --sparse K")
    if patch is None:
        assert sparse is not None
        if shape is not None or count != 1 or where != "anywhere":
            raise InputError("--shape, --count and --where belong to --patch, not to --sparse")
        return SparseThreat(sparse)
    return PatchThreat(parse_patch(patch), shape=shape, count=count, where=parse_where(where))


def changes_from(settings: list[str] | None) -> dict:
    """Settings of a defense from ``key=value`` texts. InputError on anything else."""
    from certipatch.plumbing.parsing import from_yaml

    changes = {}
    for text in settings or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text!r} is not understood; write key=value, as threshold=0.2")
        try:
            changes[key] = from_yaml(value)
        except ValueError:
            raise InputError(f"--set {text!r}: {value!r} is not a value") from None
    return changes


def accuracy_with_interval(summary: dict[str, Any], key: str) -> str:
    """An accuracy of a run's summary with its confidence interval."""
    low, high = summary[f"{key}_ci95"]
    return f"{summary[f'{key}_accuracy']:7.2%}  (95 % interval {low:.2%} to {high:.2%})"
