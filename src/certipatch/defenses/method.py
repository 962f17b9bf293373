"""A defense by name, certified or empirical: how it is set, built, attacked, told and exported."""

from abc import ABC
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from certipatch.defenses.settings import DefenseSettings
from certipatch.errors import InputError
from certipatch.models.settings import NetworkSettings
from certipatch.rules.soft import lead_of
from certipatch.threats import PatchThreat, Threat
from certipatch.views import RandomViews, Views


class Method(ABC):
    """The contract of a defense for commands, cards, attacks, reports and exports. Only the name has no default.

    The constructor takes the network, then ``views`` (unless the defense reads whole images), ``threat`` (if its settings
    have a ``patch``), its settings by name, and ``batch_size``.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[DefenseSettings]] = DefenseSettings
    options: DefenseSettings = DefenseSettings()
    """The settings of this very defense, an instance of ``settings_class``."""
    theorem: str
    """The condition behind its certificates, in one line."""
    in_words: ClassVar[str] = ""
    """The theorem for a report's reader, with ``{views}`` for the partial images; without it the theorem is printed."""
    reads_whole_images: ClassVar[bool] = False
    """Its network reads whole images, without views, so that it goes around any classifier."""
    takes_random_views: ClassVar[bool] = False
    """It asks views that are drawn, not every view."""
    trains_under_masks: ClassVar[bool] = False
    """Its network may be trained under masks (``mask_training`` in a recipe)."""
    trains_by_bounds: ClassVar[bool] = False
    """Its network may be trained by interval bounds (``interval`` in a recipe)."""
    watched_settings: ClassVar[dict[str, Any]] = {}
    """Settings that are enough to watch a training by, where its own take too long."""

    @classmethod  # noqa: B027
    def check_network(cls, network: NetworkSettings) -> None:
        """ValueError if the defense cannot go around such a network."""

    @classmethod
    def built_for_patch(cls) -> bool:
        """True if its answer depends on the patch that it is to withstand."""
        return "patch" in cls.settings_class.model_fields

    @classmethod
    def from_settings(
        cls, network: nn.Module, settings: DefenseSettings, threat: Threat | None, views: Views | RandomViews | None
    ) -> Self:
        """The defense around a network.

        Args:
            threat: the patch that it is built for, if it is built for one; otherwise the patch in its settings, also if
                the settings say ``ignore_threat``. For a sparse threat too, which is then never certified more.
            views: the views of a network that does not read whole images, or None for its receptive fields.
        """
        construct: Any = cls  # every constructor takes the network, then settings by name
        values: dict[str, Any] = settings.model_dump(mode="json")
        if cls.built_for_patch():
            patch = values.pop("patch")
            given = isinstance(threat, PatchThreat) and not values.get("ignore_threat")
            values["threat"] = threat if given else PatchThreat(patch)
        if not cls.reads_whole_images:
            values["views"] = views
        return construct(network, **values)

    def settings(self) -> dict[str, Any]:
        """The defense's own settings, as plain JSON values, with the threat that it is built for."""
        values = self.options.model_dump(mode="json")
        if self.built_for_patch():
            del values["patch"]
            values["threat"] = getattr(self, "threat").to_dict()  # noqa: B009
        return values

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"] | None:
        """Compute a differentiable lead of each class over the answer (of a detector: the answer without an alarm).

        Above 0 if the class is the answer, as far as a soft version of the defense knows. Steps are soft here (votes,
        masks, ranks) and flat parts keep a small slope (``rules.soft.LEAK``), so that no gradient vanishes. ``generator``
        draws what the defense draws. None: there is no soft version, and attacks use ``square``.
        """
        return None

    def network_leads(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Leads of the network alone: those of a plain attack, which knows nothing of the defense."""
        return leads_of_network(getattr(self, "model", None), images)

    def exported_network(self, image_size: tuple[int, int]) -> nn.Module | None:
        """The network that ``export`` writes; None: the defense cannot be exported.

        Without views its largest logit must be the answer. With views it reads or gives them, and the rule has a graph.
        """
        return None


def leads_of_network(network: Any, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
    """Leads of the classes in a network of whole images, also one of NULL-encoded images."""
    if not isinstance(network, nn.Module):
        raise InputError(f"there is no network to attack in {type(network).__name__}; give the defense a method leads")
    if getattr(network, "encoding", "picture") == "null":
        images = torch.cat([images, 1 - images], 1)
    return lead_of(network(images).float())
