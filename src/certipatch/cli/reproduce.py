"""``certipatch reproduce``: a table or figure of a paper, ours beside theirs."""

from pathlib import Path
from typing import Annotated

import typer

from certipatch.cli.options import SplitOption


def reproduce(
    table: Annotated[
        str, typer.Argument(help="A table's name, such as pg-table5; `certipatch reproduce list` shows all.")
    ],
    data: Annotated[str | None, typer.Option("--data", help="Other data than the paper's, or their folder.")] = None,
    split: SplitOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N pictures.", metavar="N")] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A model in one of the table's roles (repeatable).", metavar="ROLE=NAME"),
    ] = None,
    starts: Annotated[
        int | None, typer.Option("--starts", help="Restarts of the attacks. Default: the paper's.", min=1, metavar="N")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Iterations of the attacks. Default: the paper's.", min=1, metavar="N")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the table; kept counts are used again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON object.")] = False,
) -> None:
    """Reproduce a table or figure of a paper from trained models; a cell without its model shows the cost of training it.

    Examples:

      certipatch reproduce list

      certipatch reproduce pg-table5 --data path/to/cifar10

      certipatch reproduce ds-table2 --data path/to/mnist

      certipatch reproduce pg-table17 --data path/to/cifar10 --limit 1000 --model bagnet=models/mine
    """
    import json

    from certipatch.cli.progress import progress_bar
    from certipatch.reproduce import TABLES
    from certipatch.reproduce.into import models_by_role, reproduce_into

    if table == "list":
        _list(TABLES, as_json)
        return
    roles = models_by_role(models or [])
    with progress_bar(table) as progress:
        made, folder, broken = reproduce_into(table, out, data, split, limit, roles, progress, starts, steps)
    if as_json:
        print(json.dumps(made.to_json(), ensure_ascii=False))
    else:
        _print(made)
        typer.echo(f"written    {folder}/table.md, .csv, .json{''.join(', ' + name for name in made.figures)}")
    for line in broken:
        typer.echo(line, err=True)
    if broken:
        raise typer.Exit(1)


def _print(table) -> None:
    from rich.console import Console
    from rich.table import Table

    single = [len(row.cells) == 1 < len(table.columns) for row in table.rows]  # one cell stands for all
    lines = [text for text, one in zip(table.texts(), single, strict=True) if not one]
    drawn, widths = Table(title=table.title, title_justify="left", show_lines=False), []
    for i, column in enumerate(["", "", *table.columns]):
        widths.append(max((len(word) for line in [column, *(t[i] for t in lines)] for word in line.split()), default=0))
        drawn.add_column(column, justify="left" if i < 2 else "right", min_width=widths[-1])
    for line in lines:
        drawn.add_row(*line, style="dim" if line[1] == "paper" else None)
    console = Console()
    console.width = max(console.width if console.is_terminal else 120, sum(width + 3 for width in widths) + 1)
    if drawn.rows:
        console.print(drawn)
    else:
        console.print(table.title, markup=False, highlight=False)
    for text, one in zip(table.texts(), single, strict=True):
        if one:
            source = f" ({text[1]})" if text[1] != "ours" else ""
            console.print(f"{text[0]}{source}: {text[2]}", markup=False, highlight=False)
    for note in table.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def _list(tables, as_json: bool) -> None:
    import json

    titles = {name: table.full_title for name, table in tables.items()}
    if as_json:
        print(json.dumps(titles, ensure_ascii=False))
        return
    for name, title in titles.items():
        typer.echo(f"{name:22}{title}")
