"""The one error that means: the input is wrong, here is what to do. The command line prints it and exits with 2."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, with the value, and what to do."""


def problem(error: Any, known: Iterable[str] = ()) -> tuple[str, str]:
    """The first thing that a pydantic ``ValidationError`` found: the place, dotted, "" for the whole; and what it is.

    ``known``: the names that may stand where an unknown one did.
    """
    first = error.errors()[0]
    kinds = {"int", "float", "str", "bool", "none"}  # of a union, whose members stand in the place too
    place = ".".join(str(p) for p in first["loc"] if isinstance(p, int) or (p.isidentifier() and p not in kinds))
    if first["type"] == "extra_forbidden":
        names = ", ".join(known) if len(first["loc"]) == 1 else ""
        return place, f"there is no such setting{'; there are ' * bool(names)}{names}"
    return place, first["msg"].removeprefix("Value error, ")
