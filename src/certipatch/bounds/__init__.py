"""Interval bounds on the logits of a network when the attacker chooses some of its pixels."""

from certipatch.bounds.interval import Interval
from certipatch.bounds.patch import Regions, attacked, patch_margins, patch_verdict, regions
from certipatch.bounds.propagate import Passage, logit_bounds, margin_bounds, passage, rivals_of
from certipatch.bounds.sparse import sparse_margins

__all__ = [
    "Interval",
    "Passage",
    "Regions",
    "attacked",
    "logit_bounds",
    "margin_bounds",
    "passage",
    "patch_margins",
    "patch_verdict",
    "regions",
    "rivals_of",
    "sparse_margins",
]
