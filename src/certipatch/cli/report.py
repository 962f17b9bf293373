"""``certipatch report``: a run folder as one page to look at."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run folder of evaluate, attack or certify.", metavar="RUN")],
    data: Annotated[str | None, typer.Option("--data", help="The place of the pictures, if they moved.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The place of the model, if it moved.")] = None,
) -> None:
    """Write RUN/report.html: numbers, every image's weak locations, and a patch that you can move over the images.

    The report of an attack has the accuracy that it leaves, a map of its successes, and the worst patches. It is one file
    below 5 MB and needs no network. The images and the model are opened again, and must be those of the run.

    Examples:

      certipatch report runs/fashion

      certipatch report runs/attack

      certipatch report runs/m --data path/to/mnist --model models/m
    """
    from certipatch.report import rebuild

    path = rebuild(run, data, model)
    typer.echo(f"report     {path}  ({path.stat().st_size / 1e6:.2g} MB)")
