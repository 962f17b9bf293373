"""Folders that ship with certipatch: ``zoo`` and ``recipes``, in a wheel inside the package, in a checkout beside src."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def folders(kind: str) -> list[Path]:
    """The existing folders that may hold ``kind``."""
    places = [_PACKAGE / kind, _PACKAGE.parents[1] / kind]
    return [place for place in places if place.is_dir()]


def find(kind: str, name: str) -> Path | None:
    """The file or folder ``name`` of ``kind``; None if there is none, or if ``name`` is a path."""
    if Path(name).name != name:
        return None
    return next((place / name for place in folders(kind) if (place / name).exists()), None)


def resource_names(kind: str, holding: str) -> list[str]:
    """Names in ``kind`` of the files that match the pattern ``holding``, such as ``*/card.json``."""
    return sorted({path.relative_to(place).parts[0] for place in folders(kind) for path in place.glob(holding)})
