"""Networks without a defense under attack: with their own prediction, or with another sum of their local logits."""

from dataclasses import replace
from math import inf

from torch import nn

from certipatch.defenses import Defense
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.clipped_bagnet import ClippedBagNet
from certipatch.defenses.patchguard import PatchGuard
from certipatch.defenses.undefended import Undefended
from certipatch.reproduce.attacked import Target
from certipatch.reproduce.local_logits import Aggregation, network_of
from certipatch.rules import ClippedSum, Median, TrimmedMean
from certipatch.threats import PatchThreat
from certipatch.views import Views

MEAN = ClippedSum(-inf, inf)
UNDEFENDED = "undefended"
"""The network with its own prediction, or the mean of its local logits if it has a defense of views."""
OWN = "its own, the maximum of features"
"""The prediction of a network without a defense."""


def aggregated(victim: Target, name: str, threat: PatchThreat) -> Target | None:
    """A network with another aggregation, by name; None for a network with a defense and its own aggregation."""
    if name == UNDEFENDED:
        return undefended(victim)
    if name == OWN:
        return victim if isinstance(victim.defense, Undefended) else None
    network, views = network_of(victim.defense, victim.name)
    return around(victim, aggregations(network, views, threat, victim.card.image_size)[name])


def undefended(victim: Target) -> Target:
    """A network without a defense: with its own prediction, or with the mean of its local logits."""
    if isinstance(victim.defense, Undefended):
        return victim
    if isinstance(victim.defense, ViewDefense):
        return around(victim, Aggregation(*network_of(victim.defense, victim.name), MEAN))
    return around(victim, Undefended(victim.defense.model))


def aggregations(
    network: nn.Module, views: Views | None, threat: PatchThreat, image_size: tuple[int, int]
) -> dict[str, Defense]:
    """Ways to add up the local logits u of a network, by their names in Table XXI of PatchGuard and ours."""
    mean = Aggregation(network, views, MEAN)
    middle = TrimmedMean(mean.number_of_views(image_size) // 4)
    return {
        "mean": mean,
        "tanh(0.05u − 1)": ClippedBagNet(network, views),
        "tanh(u)": ClippedBagNet(network, views, 1.0, 0.0),
        "clipped to (0, 15)": Aggregation(network, views, ClippedSum(0.0, 15.0)),
        "median": Aggregation(network, views, Median()),
        "mean of the middle half": Aggregation(network, views, middle),
        "robust masking": PatchGuard(network, threat, views, "logits"),
    }


def around(victim: Target, defense: Defense) -> Target:
    """The victim with another defense."""
    return replace(victim, defense=defense, name=f"{defense.name}:{victim.name}")
