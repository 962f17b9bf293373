"""Defenses by name: each a small composition of views, network and rule."""

from certipatch.defenses.bagcert import BagCert
from certipatch.defenses.base import Defense, Evidence
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
from certipatch.defenses.registry import METHODS
from certipatch.defenses.undefended import Undefended

__all__ = [
    "METHODS",
    "BagCert",
    "ClippedBagNet",
    "Defense",
    "DerandomizedSmoothing",
    "DigitalWatermarking",
    "Evidence",
    "IntervalBounds",
    "LocalGradientsSmoothing",
    "MinorityReports",
    "PatchCURE",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "RandomizedAblation",
    "Undefended",
]
