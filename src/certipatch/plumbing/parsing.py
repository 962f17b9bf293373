"""Untrusted YAML and JSON: values, or one ValueError for any fault of the text."""

import json
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML's safe types; a key that stands twice in a mapping is an error, not the last one's value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise ValueError(f"{key!r} stands there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def from_yaml(text: str) -> Any:
    """The value that a YAML text stands for; it cannot run code. ValueError if it is none, in one line."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # YAMLError, and the errors of dates, long numbers, tags and deep nesting
        raise ValueError(_reason(error)) from None


def from_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for. ValueError if it is none, in one line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
