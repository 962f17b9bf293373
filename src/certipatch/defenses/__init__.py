"""Defenses by name: each a small composition of views, network and rule. See ``registry``."""

from typing import Any

from certipatch.defenses.base import Defense, Evidence
from certipatch.defenses.registry import CLASSES, METHODS

__all__ = ["METHODS", "Defense", "Evidence"]


def __getattr__(name: str) -> Any:
    """A defense by the name of its class; imported on first use."""
    if name not in CLASSES:
        raise AttributeError(f"module 'certipatch.defenses' has no attribute {name!r}")
    return METHODS[CLASSES[name]]


def __dir__() -> list[str]:
    return sorted([*globals(), *CLASSES])
