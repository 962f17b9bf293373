"""Settings of networks in recipes and cards: a class beside each network, chosen by ``name``; this file has their base."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, LiteralString, cast

from pydantic import Field, ValidationError, WrapValidator, model_serializer
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from torch import nn

from certipatch.errors import InputError
from certipatch.plumbing.settings import Settings
from certipatch.views import Bands, Blocks, RandomViews, Views

Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=8)]
Depth = Annotated[int, Field(ge=1, le=32)]
Pixels = Annotated[int, Field(ge=1, le=64)]

RENAMED = {"specialists": "fallback-ensemble"}
"""Old names of networks and the new ones."""


class NetworkSettings(Settings):
    """A network in a recipe or card. Sizes are bounded, so that no file can ask for a network that fills memory.

    Subclasses have a ``name``, the fields of their network with the defaults of its class, and ``build``.
    """

    renamed: ClassVar[dict[str, str]] = {
        "mirror": "flip_tta",
        "null_encoding": "encoding",
        "confident": "exit_gap",
        "field": "receptive_field",
        "patch": "patch_size",
        "dim": "embed_dim",
        "heads": "num_heads",
        "window": "window_size",
        "local": "front_depth",
    }

    local_logits: ClassVar[bool] = False
    """The network gives local logits; its views are their receptive fields."""
    shared_front: ClassVar[bool] = False
    """The network is a ``SharedFront``."""

    @abstractmethod
    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        """The network with fresh weights. Errors: InputError if it cannot read such views or images."""

    def sizes(self) -> dict[str, Any]:
        """All settings but ``name`` and ``members``, as keywords of the network's class."""
        return {key: value for key, value in self if key not in ("name", "members")}

    @classmethod
    def check_keys(cls, values: dict[str, Any]) -> None:
        """Other unknown keys are refused too, with the known ones of this network."""
        super().check_keys(values)
        known = cls.model_fields
        for key in (key for key in values if key not in known):
            words = {"name": known["name"].default, "key": repr(key)[:80], "known": ", ".join(known)}
            raise PydanticCustomError("unknown_setting", "the {name} network has no {key}; it has {known}", words)

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


def refuse_names(refusal: LiteralString = "there is no network {name}; use {known}") -> WrapValidator:
    """Errors of a union by ``name``: unknown names are refused in these words, others are placed as the file has them."""

    def placed(error: ErrorDetails) -> InitErrorDetails:
        context = error.get("ctx", {})
        if error["type"] == "union_tag_invalid":
            name = context["tag"]
            words = {
                "name": " ".join(name.split())[:80],
                "known": context["expected_tags"].replace("'", ""),
                "new": RENAMED.get(name, ""),
            }
            text = "{name} has a new name: use {new}" if name in RENAMED else refusal
            return {"type": PydanticCustomError("unknown_network", text, words), "loc": ("name",), "input": name}
        kind, text, place = error["type"], error["msg"], error["loc"][1:]  # the first is the name of the network
        if kind == "union_tag_not_found":
            kind, text, place = "missing", "Field required", ("name",)
        same = PydanticCustomError(cast(LiteralString, kind), "{text}", {"text": text})
        return {"type": same, "loc": place, "input": error["input"]}

    def validate(value: Any, choose: Callable[[Any], NetworkSettings]) -> NetworkSettings:
        try:
            return choose(value)
        except ValidationError as error:
            raise ValidationError.from_exception_data(error.title, [placed(one) for one in error.errors()]) from None

    return WrapValidator(validate)


def check_no_views(name: str, views: Views | RandomViews | None) -> None:
    """InputError if a network of whole images is to read views."""
    if views is not None:
        raise InputError(f"the {name} network reads whole pictures; leave views out")


def bands_or_blocks(name: str, views: Views | RandomViews | None) -> Bands | Blocks:
    """The views, where they are bands or blocks; else InputError."""
    if not isinstance(views, Bands | Blocks):
        raise InputError(f"the {name} network reads columns, rows or blocks; use resnet18 for other views")
    return views
