"""The defenses by name. A new one is a file of its own, its settings in ``settings.py``, and a line here."""

from dataclasses import dataclass
from typing import Any, final

from certipatch.defenses.bagcert import BagCert
from certipatch.defenses.clipped_bagnet import ClippedBagNet
from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
from certipatch.defenses.digital_watermarking import DigitalWatermarking
from certipatch.defenses.interval_bounds import IntervalBounds
from certipatch.defenses.local_gradients_smoothing import LocalGradientsSmoothing
from certipatch.defenses.minority_reports import MinorityReports
from certipatch.defenses.patchcleanser import PatchCleanser
from certipatch.defenses.patchcure import PatchCURE
from certipatch.defenses.patchguard import PatchGuard
from certipatch.defenses.patchguard_plus_plus import PatchGuardPlusPlus
from certipatch.defenses.randomized_ablation import RandomizedAblation
from certipatch.defenses.settings import (
    BagCertSettings,
    ClippedBagNetSettings,
    DetectionSettings,
    GradientSettings,
    MinorityReportsSettings,
    PatchCleanserSettings,
    PatchCURESettings,
    PatchGuardSettings,
    RandomizedSettings,
    Settings,
    SmoothingSettings,
    WatermarkSettings,
)
from certipatch.defenses.undefended import Undefended


@final
@dataclass(frozen=True)
class Method:
    """A defense: its class, its settings, and whether its network reads whole pictures, without views."""

    defense_class: type[Any]
    settings: type[Settings]
    reads_whole_images: bool = False


REGISTERED = (
    Method(DerandomizedSmoothing, SmoothingSettings),
    Method(RandomizedAblation, RandomizedSettings),
    Method(PatchGuard, PatchGuardSettings),
    Method(ClippedBagNet, ClippedBagNetSettings),
    Method(BagCert, BagCertSettings),
    Method(PatchGuardPlusPlus, DetectionSettings),
    Method(IntervalBounds, Settings, reads_whole_images=True),
    Method(PatchCleanser, PatchCleanserSettings, reads_whole_images=True),
    Method(PatchCURE, PatchCURESettings, reads_whole_images=True),
    Method(MinorityReports, MinorityReportsSettings, reads_whole_images=True),
    Method(Undefended, Settings, reads_whole_images=True),
    Method(LocalGradientsSmoothing, GradientSettings, reads_whole_images=True),
    Method(DigitalWatermarking, WatermarkSettings, reads_whole_images=True),
)
METHODS: dict[str, type[Any]] = {method.defense_class.name: method.defense_class for method in REGISTERED}
SETTINGS: dict[str, type[Settings]] = {method.defense_class.name: method.settings for method in REGISTERED}
WHOLE_IMAGE_METHODS = tuple(method.defense_class.name for method in REGISTERED if method.reads_whole_images)
"""Defenses of networks that read whole pictures."""
THREAT_SPECIFIC_METHODS = tuple(name for name, settings in SETTINGS.items() if "patch" in settings.model_fields)
"""Their answer depends on the patch that they are to withstand."""
