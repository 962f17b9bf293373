"""``certipatch compare``: finished runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certipatch.cli.options import OutOption
from certipatch.errors import InputError, unknown

if TYPE_CHECKING:
    from rich.table import Table as Drawn

    from certipatch.report.table import Table

FORMATS = ("table", "markdown", "csv", "latex")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders of evaluate, two or more.", metavar="RUN…")],
    out: OutOption = None,
    format_: Annotated[str | None, typer.Option("--format", help=" | ".join(FORMATS), metavar="FORMAT")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="The folder of the runs' pictures, if they have moved; for the page's gallery."),
    ] = None,
) -> None:
    """Compare finished runs: accuracies, cost, and paired differences on the same images.

    The others are compared with the first run; of up to four runs, every pair is compared. --out also writes a page with
    figures (comparison.html), tables in Markdown, CSV and LaTeX, and the images on which the runs differ.

    Examples:

      certipatch compare runs/fashion runs/mask-ds

      certipatch compare runs/fashion runs/mask-ds --out comparison

      certipatch compare runs/fashion runs/mask-ds --format latex > table.tex
    """
    if as_json and format_ is not None:
        raise InputError("give --json or --format, not both")
    if format_ is not None and format_ not in FORMATS:
        raise unknown("format", format_, FORMATS)
    if data is not None and out is None:
        raise InputError("--data is for the gallery of the page; give --out too")
    import json

    from certipatch.comparison import notes, pairs, tables, texts, write

    if out is not None:
        write.check_writable(out)
    comparison = pairs.compare(runs)
    if out is not None:
        write.write(comparison, out, data)
    if as_json:
        print(json.dumps(texts.to_dict(comparison), ensure_ascii=False, allow_nan=False))
    elif format_ in (None, "table"):
        _show(tables.tables(comparison), notes.sentences(comparison))
        if out is not None:
            typer.echo(f"page: {out / 'comparison.html'}")
    else:
        formats = {"markdown": texts.markdown, "csv": texts.runs_csv, "latex": texts.latex}
        typer.echo(formats[format_](comparison), nl=False)


def _show(tables: "list[Table]", sentences: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    for table in tables:
        console.print(_drawn(table), "")
    for sentence in sentences:
        console.print(Text(sentence, style="dim"))


def _drawn(table: "Table") -> "Drawn":
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(
        title=Text(table.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for i, name in enumerate(table.header):
        drawn.add_column(Text(name), justify="left" if i < table.left else "right", overflow="fold")
    for row in table.rows:
        names = (cell.replace(":", ":\n", 1) if len(cell) > 24 else cell for cell in row[: table.left])
        numbers = (cell.replace(" (", "\n(") for cell in row[table.left :])
        drawn.add_row(*map(Text, (*names, *numbers)))
    return drawn
