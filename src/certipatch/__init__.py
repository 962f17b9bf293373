"""certipatch: certified robustness of image classifiers against adversarial patches.

import certipatch as cp
defense = cp.load("mnist-columns")
cert = defense.certify(images, cp.PatchThreat(5))     # images (B, C, H, W) float in [0, 1]
cert.label, cert.certified, cert.margin
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certipatch import rules, testing, views
    from certipatch.certificate import Certificate
    from certipatch.defenses import Defense
    from certipatch.defenses.bagcert import BagCert
    from certipatch.defenses.clipped_bagnet import ClippedBagNet
    from certipatch.defenses.derandomized_smoothing import DerandomizedSmoothing
    from certipatch.defenses.interval_bounds import IntervalBounds
    from certipatch.defenses.minority_reports import MinorityReports
    from certipatch.defenses.patchcleanser import PatchCleanser
    from certipatch.defenses.patchcure import PatchCURE
    from certipatch.defenses.patchguard import PatchGuard
    from certipatch.defenses.patchguard_plus_plus import PatchGuardPlusPlus
    from certipatch.defenses.randomized_ablation import RandomizedAblation
    from certipatch.errors import InputError
    from certipatch.models import receptive_fields
    from certipatch.saved import load
    from certipatch.threats import PatchThreat, SparseThreat
    from certipatch.views.incidence import sees

_HOME = {
    "Certificate": "certipatch.certificate",
    "Defense": "certipatch.defenses",
    "InputError": "certipatch.errors",
    "PatchThreat": "certipatch.threats",
    "SparseThreat": "certipatch.threats",
    "load": "certipatch.saved",
    "receptive_fields": "certipatch.models",
    "sees": "certipatch.views.incidence",
}
_MODULES = ("data", "rules", "testing", "views")
__all__ = [
    "BagCert",
    "Certificate",
    "ClippedBagNet",
    "Defense",
    "DerandomizedSmoothing",
    "InputError",
    "IntervalBounds",
    "MinorityReports",
    "PatchCURE",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "PatchThreat",
    "RandomizedAblation",
    "SparseThreat",
    "load",
    "receptive_fields",
    "rules",
    "sees",
    "testing",
    "views",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``certipatch --help`` need not wait for torch."""
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"certipatch.{name}")
    elif name[:1].isupper() and hasattr(defenses := import_module("certipatch.defenses"), name):
        value = getattr(defenses, name)  # any other defense, by the name of its class
    else:
        raise AttributeError(f"module 'certipatch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
