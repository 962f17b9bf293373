"""Patch locations of a threat, the views that see the patch at each, and the layout in which the views are drawn."""

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from certipatch.certificate import Certificate
from certipatch.defenses import Defense
from certipatch.defenses.base import ViewDefense
from certipatch.rules import ClippedSum, DoubleMask, MaskedDetection, RobustMask, Rule, Vote
from certipatch.views import Bands, Blocks, Columns, Cross, ReceptiveFields, Views
from certipatch.views.incidence import Incidence

MAX_BYTES = 2**20  # of the relation and of the list of locations, each, in a page
_BANDS = {True: "column", False: "row"}


@final
@dataclass(frozen=True, eq=False)
class Places:
    """The locations of one patch, for the explorer.

    relation: L locations, R distinct rows, V views. layout: how the views are drawn, see ``layout``. classes: K names.
    bounds: the range of one score under attack, if the margin is then a difference of sums, or None.
    clip: the range to which the rule clips scores. notion: of the certificates.
    rule: ``vote``, ``sum``, ``mask``, ``detection``, ``masks`` or ``other``.
    """

    relation: Incidence
    layout: dict[str, Any]
    classes: tuple[str, ...]
    rule: str
    bounds: tuple[float, float] | None
    clip: tuple[float, float]
    notion: str

    @property
    def first(self) -> Tensor:
        """int64 (R,): a location of each distinct row."""
        row_of = self.relation.row_of
        first = torch.full((self.relation.number_of_rows,), len(row_of))
        return first.scatter_reduce_(0, row_of, torch.arange(len(row_of)), "amin")

    def counted(self, values: Tensor) -> np.ndarray:
        """Evidence as the rule counts it: bool votes as they are, scores clipped, in float32."""
        values = values.detach().cpu()
        return values.numpy() if values.dtype == torch.bool else values.float().clamp(*self.clip).numpy()


def places(
    defense: Defense, certificate: Certificate, image_size: tuple[int, int], classes: tuple[str, ...]
) -> Places | None:
    """The locations of the threat of ``certificate``.

    None if there is nothing to explore: a threat without single locations (sparse, several patches), a defense whose
    margins do not come from the views that see a location, or more locations than a page holds.
    """
    relation = certificate.sees
    if (
        not isinstance(defense, ViewDefense)
        or relation is None
        or relation.choices.shape[1] != 1
        or certificate.margin.shape[1] != len(relation.row_of)
    ):
        return None
    if relation.packed.nbytes > MAX_BYTES or 4 * len(relation.row_of) > MAX_BYTES:
        return None
    if defense.number_of_views(image_size) != relation.number_of_views:  # sampled: its evidence is not one row per view
        return None
    rule = defense.rule(image_size)
    return Places(relation, layout(defense.views_of(image_size), image_size), classes, *_rule(rule), defense.notion)


def layout(views: Views, image_size: tuple[int, int]) -> dict[str, Any]:
    """The layout of views, with a description: bands along the image's edge, other views as cells of a grid."""
    number = views.number(image_size)
    if isinstance(views, Bands) and views.count == 1:
        kind = _BANDS[isinstance(views, Columns)]
        words = f"{number} {kind} bands, each {views.width} pixel{'s' if views.width > 1 else ''} wide"
        starts = views.starts(image_size)
        return {
            "kind": kind,
            "starts": starts,
            "length": views.length(image_size),
            "words": words,
            "one": f"{kind} band",
        }
    rows, columns, one = 1, number, "view"
    words = f"{number:,} partial pictures"
    if isinstance(views, Blocks) and views.count == 1:
        rows, columns = (len(starts) for starts in views.starts(image_size))
        words, one = f"{number:,} blocks of {views.width}×{views.width} pixels", "block"
    elif isinstance(views, ReceptiveFields):
        rows, columns = views.grid
        words = f"{rows}×{columns} cells, each made from {views.size[0]}×{views.size[1]} pixels"
        if views.resized is not None:
            words += f" of the picture resized to {views.resized[0]}×{views.resized[1]}"
        one = "cell"
    elif isinstance(views, Cross):
        down, across = (part.number(image_size) for part in views.parts)
        rows, columns = (2, down) if down == across else (1, number)
        words, one = f"{down} column bands, then {across} row bands, each {views.width} pixels wide", "band"
    elif number > 64:
        columns = math.isqrt(number - 1) + 1
        rows = -(-number // columns)
    return {"kind": "grid", "rows": rows, "columns": columns, "words": words, "one": one}


def _rule(rule: Rule) -> tuple[str, tuple[float, float] | None, tuple[float, float]]:
    everything = (-math.inf, math.inf)
    if isinstance(rule, Vote):
        return "vote", (0.0, 1.0) if rule.margin == "location" else None, (0.0, 1.0)
    if isinstance(rule, ClippedSum):
        limits = (rule.lo, rule.hi)
        return "sum", limits if all(map(math.isfinite, limits)) else None, limits
    if isinstance(rule, RobustMask):
        return "mask", None, (0.0, rule.clip)
    kinds = {MaskedDetection: "detection", DoubleMask: "masks"}
    return next((kind for of, kind in kinds.items() if isinstance(rule, of)), "other"), None, everything
