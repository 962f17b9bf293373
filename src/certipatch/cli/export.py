"""``certipatch export``: a defense as one ONNX file."""

from pathlib import Path
from typing import Annotated

import typer

from certipatch.cli.options import ModelOption, PatchOption, SetOption, changes_from, threat_from


def export(
    defense: Annotated[
        str,
        typer.Argument(help="A zoo model, the folder that train wrote, or with --model a method.", metavar="DEFENSE"),
    ],
    onnx: Annotated[Path, typer.Option("--onnx", help="The file to write.", metavar="FILE")],
    model: ModelOption = None,
    settings: SetOption = None,
    patch: PatchOption = None,
) -> None:
    """Write a defense as one ONNX file: views, network and rule in one graph, images in, labels out.

    --patch is for defenses whose predictions depend on the patch; somebody else's classifier always needs it. If onnxruntime
    is installed, it checks the file before the file is kept.

    Examples:

      certipatch export mnist-columns --onnx mnist-columns.onnx

      certipatch export patchguard --model fashion-columns --patch 5 --onnx mask-ds.onnx

      certipatch export patchcleanser --model mnist-plain --patch 5 --set masks=3 --onnx double-masking.onnx

      certipatch export patchcleanser --model my_package.models:classifier --patch 5 --set masks=3 --onnx mine.onnx
    """
    threat = None if patch is None else threat_from(patch, None, 1, "anywhere", None)
    from certipatch.errors import InputError
    from certipatch.export import to_onnx
    from certipatch.saved.open import DefenseRef, open_named
    from certipatch.threats import threat_from_dict

    if onnx.is_dir() or not onnx.absolute().parent.is_dir():
        raise InputError(f"--onnx {onnx} cannot be written; name a file in a folder that exists")
    opened, card, _ = open_named(DefenseRef(defense, model, changes_from(settings)), threat)
    written = to_onnx(opened, card, onnx)
    shape = " x ".join(map(str, written["inputs"]["images"]))
    typer.echo(
        f"{onnx}: images ({shape}), float32 in [0, 1] -> {', '.join(written['outputs'])}; {written['bytes']:,} bytes"
    )
    built = opened.settings().get("threat")
    if built is not None:
        every = built if isinstance(built, list) else [built]
        typer.echo(
            f"its answers are those of the defense against {', '.join(str(threat_from_dict(one)) for one in every)}"
        )
    if written["checked"]:
        typer.echo(f"onnxruntime gives the same labels on {written['checked']} random pictures")
    else:
        typer.echo("onnxruntime is not installed, so the file was not tried out")
