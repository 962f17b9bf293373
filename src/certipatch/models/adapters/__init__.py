"""Other people's classifiers, by the name that a user types after ``--model``."""

import re
from collections.abc import Callable

from certipatch.errors import InputError
from certipatch.models.adapters import sources
from certipatch.models.adapters.adapted import Adapted, Preprocessing
from certipatch.models.adapters.onnx import from_onnx

__all__ = ["FORMS", "Adapted", "Preprocessing", "is_adapter", "open_model", "runs_code"]

KINDS: dict[str, Callable[[str], Adapted]] = {
    "timm": sources.from_timm,
    "torchvision": sources.from_torchvision,
    "hf": sources.from_hugging_face,
    "onnx": from_onnx,
}
NAMES: dict[str, Callable[[], Adapted]] = {"imagenet-lite": sources.imagenet_lite}
FORMS = ", ".join([*NAMES, *(f"{kind}:NAME" for kind in KINDS), "package.module:function"])
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_adapter(name: str) -> bool:
    """Test if ``--model NAME`` means somebody else's classifier: by the form of the name, without opening it."""
    kind, colon, rest = name.partition(":")
    return name in NAMES or (bool(colon) and bool(rest) and kind in KINDS) or runs_code(name)


def runs_code(name: str) -> bool:
    """Test if opening the model imports a module of the user's: only a name that the user typed may do that."""
    return _FUNCTION.fullmatch(name) is not None and name.partition(":")[0] not in KINDS


def open_model(name: str) -> Adapted:
    """The classifier, with its preprocessing and class names. InputError with the reason where it cannot be had."""
    kind, _, rest = name.partition(":")
    if name in NAMES:
        return NAMES[name]()
    if kind in KINDS and rest:
        return KINDS[kind](rest)
    if runs_code(name):
        return sources.from_function(name)
    raise InputError(f"unknown model {name!r}; write one of {FORMS}")
