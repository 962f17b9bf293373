"""``certipatch train``: a recipe → a certified defense."""

from pathlib import Path
from typing import Annotated

import typer

from certipatch.cli.options import OutOption
from certipatch.errors import unknown
from certipatch.plumbing import distributed


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name from `certipatch list recipes`.")],
    data: Annotated[str | None, typer.Option("--data", help="Other data than the recipe names.")] = None,
    out: OutOption = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: epochs=3, views.width=4.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Train a certified defense. Stops and resumes: after Ctrl-C or a kill, the same command continues.

    Examples:

      certipatch train recipes/mnist-columns.yaml --data path/to/mnist --out models/mnist

      certipatch train mnist-columns --set epochs=2 --set views.width=4 --out models/quick

      certipatch train mnist-ibp-5-mlp --set interval.strategy=random --set interval.sampled_locations=10 --out models/random-10

      torchrun --nproc-per-node 2 -m certipatch train recipes/mnist-columns.yaml --data path/to/mnist --out models/mnist
    """
    from certipatch.cli.progress import progress_bar
    from certipatch.plumbing import resources
    from certipatch.training.recipe import read

    path = Path(recipe)
    if not path.exists():
        path = resources.find("recipes", f"{recipe.removesuffix('.yaml')}.yaml") or path
    if not path.exists():
        names = resources.resource_names("recipes", "*.yaml")
        raise unknown("recipe", recipe, [name.removesuffix(".yaml") for name in names])
    if data is not None:
        changes = [*(changes or []), f"data={data}"]
    settings = read(path, changes)
    folder = out or Path("models") / settings.name

    from certipatch.plumbing import devices
    from certipatch.training.train import train as run

    devices.keep_freed_memory()
    with progress_bar(f"train {settings.name}") as progress:
        card = run(settings, folder, progress)
    if distributed.rank() != 0:
        return
    held = f"  certify a picture:  certipatch certify PICTURE --defense {folder} {_typed(settings.threat)}"
    typer.echo(
        f"{card.name} is in {folder} ({card.training['parameters']:,} parameters, {card.training['seconds']:.0f} s)"
    )
    typer.echo(held)


def _typed(threat) -> str:
    """A recipe's threat as options of a command."""
    size = threat.to_dict()
    return f"--sparse {size['pixels']}" if size["kind"] == "sparse" else f"--patch {size['size'][0]}x{size['size'][1]}"
