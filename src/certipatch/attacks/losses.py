"""The objective of an attack: for every defense a differentiable *lead* of each class.

``leads(defense, images)`` is (N, K): how far class k is from being the answer (of a detector: the answer without an
alarm); above 0 where it is, as far as the soft version of the defense knows. The soft version is the defense's own
(``Method.leads``, ``ViewDefense.soft_values``, ``Rule.leads``). Whether an attack succeeded is never decided here: the
defense itself answers.
"""

from jaxtyping import Float
from torch import Generator, Tensor

from certipatch.defenses.method import Method, leads_of_network


def has_soft_version(defense: object) -> bool:
    """False for a defense without ``leads``: nothing is known of it but its network and its answers."""
    return not isinstance(defense, Method) or type(defense).leads is not Method.leads


def leads(defense: object, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
    """Differentiable leads of all classes; ``generator`` makes the random draws of the defense.

    Without a soft version, and for anything that only holds a network: the leads of the network alone.
    """
    own = defense.leads(images, generator) if isinstance(defense, Method) else None
    return network_leads(defense, images) if own is None else own


def network_leads(defense: object, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
    """Leads of a defense's network alone: the objective of a plain attack, which knows nothing of the defense."""
    if isinstance(defense, Method):
        return defense.network_leads(images)
    return leads_of_network(getattr(defense, "model", None), images)
