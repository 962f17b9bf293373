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
    from certipatch.defenses import (
        BagCert,
        ClippedBagNet,
        Defense,
        DerandomizedSmoothing,
        IntervalBounds,
        MinorityReports,
        PatchCleanser,
        PatchCURE,
        PatchGuard,
        PatchGuardPlusPlus,
        RandomizedAblation,
    )
    from certipatch.errors import InputError
    from certipatch.models import receptive_fields
    from certipatch.saved import load
    from certipatch.threats import PatchThreat, SparseThreat
    from certipatch.views.incidence import sees

_HOME = {
    "BagCert": "certipatch.defenses",
    "Certificate": "certipatch.certificate",
    "ClippedBagNet": "certipatch.defenses",
    "Defense": "certipatch.defenses",
    "DerandomizedSmoothing": "certipatch.defenses",
    "InputError": "certipatch.errors",
    "IntervalBounds": "certipatch.defenses",
    "MinorityReports": "certipatch.defenses",
    "PatchCURE": "certipatch.defenses",
    "PatchCleanser": "certipatch.defenses",
    "PatchGuard": "certipatch.defenses",
    "PatchGuardPlusPlus": "certipatch.defenses",
    "RandomizedAblation": "certipatch.defenses",
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
    else:
        raise AttributeError(f"module 'certipatch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
