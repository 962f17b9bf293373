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

    made: type[Any]
    settings: type[Settings]
    whole: bool = False


REGISTERED = (
    Method(DerandomizedSmoothing, SmoothingSettings),
    Method(RandomizedAblation, RandomizedSettings),
    Method(PatchGuard, PatchGuardSettings),
    Method(ClippedBagNet, ClippedBagNetSettings),
    Method(BagCert, BagCertSettings),
    Method(PatchGuardPlusPlus, DetectionSettings),
    Method(IntervalBounds, Settings, whole=True),
    Method(PatchCleanser, PatchCleanserSettings, whole=True),
    Method(PatchCURE, PatchCURESettings, whole=True),
    Method(MinorityReports, MinorityReportsSettings, whole=True),
    Method(Undefended, Settings, whole=True),
    Method(LocalGradientsSmoothing, GradientSettings, whole=True),
    Method(DigitalWatermarking, WatermarkSettings, whole=True),
)
METHODS: dict[str, type[Any]] = {method.made.name: method.made for method in REGISTERED}
SETTINGS: dict[str, type[Settings]] = {method.made.name: method.settings for method in REGISTERED}
WHOLE = tuple(method.made.name for method in REGISTERED if method.whole)
"""Defenses of networks that read whole pictures."""
BUILT_FOR_A_PATCH = tuple(name for name, settings in SETTINGS.items() if "patch" in settings.model_fields)
"""Their answer depends on the patch that they are to withstand."""
