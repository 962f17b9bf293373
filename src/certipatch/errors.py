"""The error for wrong input. The command line prints its message and exits with 2."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Wrong input. The message is one line: the problem, the value, and what to do."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that nothing has: it proposes the nearest known name, or lists all of them.

    Args:
        kind: what was looked for, such as "attack".
    """
    return InputError(f"unknown {kind} {name!r}; {suggestion(name, known)}")


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The nearest known name of similarity ``cutoff`` or more, as a question, or all known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names) or 'none'}"


@contextmanager
def validated(context: str, known: Iterable[str] = (), whole: str = "") -> Iterator[None]:
    """Turn a pydantic ``ValidationError`` raised inside into an InputError.

    Args:
        context: begins the message, such as the name of the file.
        known: the names that may replace an unknown one.
        whole: the name of the entire value in the message, if no single key of it is wrong.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        location, reason = problem(error, known)
        raise InputError(": ".join(filter(None, (context, location or whole, reason)))) from None


def problem(error: Any, known: Iterable[str] = ()) -> tuple[str, str]:
    """The first problem in a pydantic ``ValidationError``: its dotted location ("" for the entire value), and the reason.

    Args:
        known: the names that may replace an unknown one.
    """
    first = error.errors()[0]
    kinds = {"int", "float", "str", "bool", "none"}  # pydantic puts the members of a union into the location too
    location = ".".join(str(p) for p in first["loc"] if isinstance(p, int) or (p.isidentifier() and p not in kinds))
    if first["type"] == "extra_forbidden":
        names = ", ".join(known) if len(first["loc"]) == 1 else ""
        return location, f"there is no such setting{'; there are ' * bool(names)}{names}"
    return location, first["msg"].removeprefix("Value error, ")
