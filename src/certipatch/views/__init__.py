"""Views: which pixels a partial image shows, and how it is rendered for a network."""

from typing import Any

import torch

from certipatch.errors import InputError
from certipatch.views.bands import Bands, Columns, Rows
from certipatch.views.base import Views
from certipatch.views.blocks import Blocks
from certipatch.views.cross import Cross
from certipatch.views.masks import MaskPairs, PixelSets, mask_set, masked
from certipatch.views.random import OneOf, RandomColumns, RandomPixels, RandomViews
from certipatch.views.receptive_fields import ReceptiveFields

__all__ = [
    "Bands",
    "Blocks",
    "Columns",
    "Cross",
    "MaskPairs",
    "OneOf",
    "PixelSets",
    "RandomColumns",
    "RandomPixels",
    "RandomViews",
    "ReceptiveFields",
    "Rows",
    "Views",
    "create",
    "mask_set",
    "masked",
]

_BY_NAME = {view.name: view for view in (Columns, Rows, Cross, Blocks, RandomPixels, RandomColumns)}


def create(settings: dict[str, Any]) -> Views | RandomViews:
    """The views that ``views.settings()`` described. ValueError on an unknown name or setting."""
    rest = dict(settings)
    name = rest.pop("name", None)
    try:
        if name in _BY_NAME:
            return _BY_NAME[name](**rest)
        if name == ReceptiveFields.name:
            values: dict[str, Any] = {key: None if value is None else tuple(value) for key, value in rest.items()}
            return ReceptiveFields(**values)
        if name == "pixel-sets":
            return PixelSets(torch.tensor(rest["visible"], dtype=torch.bool))
        if name == "mask-pairs":
            return MaskPairs(torch.tensor(rest["masks"], dtype=torch.bool), rest.get("unmasked", False))
        if name == OneOf.name:
            views = create(rest["views"])
            assert isinstance(views, Views)
            return OneOf(views)
    except TypeError as error:
        raise InputError(f"views {name!r} cannot be built: {error}") from None
    raise InputError(f"unknown views {name!r}; known: {', '.join([*_BY_NAME, ReceptiveFields.name, 'pixel-sets'])}")
