"""``certipatch demo``: certify, evaluate and report on what ships in the package."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
) -> None:
    """Certify the 1,000 Fashion-MNIST pictures that ship with the package. Trains nothing, needs no network.

    Example:

      certipatch demo
    """
    from certipatch.cli.evaluate import summary_lines
    from certipatch.cli.progress import progress_bar
    from certipatch.cli.work import certify_sample, evaluate_into
    from certipatch.threats import PatchThreat

    threat = PatchThreat(5)
    typer.echo("Three pictures, and what no 5x5 patch can change:")
    for line in certify_sample("fashion-columns", "fashion-sample", threat, range(3)):
        typer.echo(f"  {line}")
    with progress_bar("evaluate") as progress:
        summary = evaluate_into(out, "fashion-columns", "fashion-sample", threat, "test", None, progress)
    for line in summary_lines(summary, out):
        typer.echo(line)
    shares = summary["certified_by_patch"]
    typer.echo(
        "certified by patch side: " + "  ".join(f"{side}: {shares[side]:.0%}" for side in ("1", "3", "5", "7", "9"))
    )
