"""``certipatch list``: the defenses, models, attacks, datasets and recipes."""

from typing import Annotated, Any

import typer

from certipatch.errors import InputError, unknown

KINDS = ("defenses", "models", "attacks", "datasets", "recipes")


def list_(
    what: Annotated[str | None, typer.Argument(help=" | ".join(KINDS), metavar="[KIND]")] = None,
    name: Annotated[str | None, typer.Argument(help="One entry in full: a defense with its settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List defenses, shipped models, attacks, datasets and recipes.

    Examples:

      certipatch list

      certipatch list models --json

      certipatch list defenses patchcleanser
    """
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if what is not None and what not in KINDS:
        raise unknown("list", what, KINDS)
    listed = {kind: _rows(kind) for kind in ([what] if what else KINDS)}
    if what is not None and name is not None:
        if name not in listed[what]:
            raise unknown(what.removesuffix("s"), name, listed[what])
        text, settings = _in_full(what, name, listed[what][name])
        print(json.dumps({"name": name, "text": text, "settings": settings}, ensure_ascii=False) if as_json else text)
        for key, value in {} if as_json else settings.items():
            print(f"    --set {key}={json.dumps(value)}")
        return
    if as_json:
        print(json.dumps(listed, ensure_ascii=False))
        return
    console = Console()
    for kind, rows in listed.items():
        if not rows:
            if what:
                console.print(f"no {kind} yet")
            continue
        table = Table(title=kind, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
        for name, text in rows.items():
            table.add_row(escape(name), escape(text))
        console.print(table, "")


def _rows(kind: str) -> dict[str, str]:
    """Names and one line about each."""
    if kind == "datasets":
        from certipatch.data import dataset_names

        return dataset_names()
    if kind == "attacks":
        from certipatch.attacks import ATTACKS

        return {name: (attack.__doc__ or "").splitlines()[0] for name, attack in ATTACKS.items()}
    if kind == "recipes":
        from certipatch.plumbing import resources

        paths = {name: resources.find("recipes", name) for name in resources.resource_names("recipes", "*.yaml")}
        return {name.removesuffix(".yaml"): _first_comment(path) for name, path in paths.items() if path}
    if kind == "defenses":
        from certipatch.defenses import METHODS

        return {name: _first_line_of_defense(name) for name in METHODS}
    from certipatch.saved import zoo

    return {name: _card_line(card) for name, card in zoo().items()}


def _in_full(kind: str, name: str, line: str) -> tuple[str, dict[str, Any]]:
    """The full text about one entry, and its settings with their defaults."""
    import inspect

    if kind == "defenses":
        from certipatch.defenses import METHODS

        return inspect.getdoc(METHODS[name]) or line, METHODS[name].settings_class().model_dump(mode="json")
    if kind == "attacks":
        from certipatch.attacks import ATTACKS

        return inspect.getdoc(ATTACKS[name]) or line, {}
    if kind == "recipes":
        from certipatch.plumbing import resources

        path = resources.find("recipes", f"{name}.yaml")
        return line if path is None else path.read_text(encoding="utf-8").rstrip(), {}
    return line, {}


def _first_line_of_defense(name: str) -> str:
    """The first line of a defense's docstring; the reason if a defense of another package cannot be used."""
    from certipatch.defenses import METHODS

    try:
        return (METHODS[name].__doc__ or "").strip().partition("\n")[0]
    except InputError as error:
        return str(error)


def _first_comment(path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    return " ".join(comment)


def _card_line(card) -> str:
    line = f"{card.defense} on {card.data.get('name', '?')}, {card.image_size[0]}x{card.image_size[1]}"
    for metric in card.metrics[:1]:
        line += (
            f"; {metric['threat']}: certified {metric['certified_accuracy']:.1%} at {metric['clean_accuracy']:.1%} clean "
            f"({metric['images']} pictures)"
        )
    return line
