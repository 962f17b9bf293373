"""Rules: evidence → label, each in one file with the theorem that bounds an attacker."""

from certipatch.rules.base import Rule, Verdict
from certipatch.rules.clipped_sum import ClippedSum
from certipatch.rules.clopper_pearson import ClopperPearson
from certipatch.rules.double_mask import DoubleMask
from certipatch.rules.masked_detection import MaskedDetection, MinorityReports
from certipatch.rules.order_statistics import Median, TrimmedMean
from certipatch.rules.robust_mask import RobustMask
from certipatch.rules.vote import Vote
from certipatch.rules.windows import ProductWindows, Windows

__all__ = [
    "ClippedSum",
    "ClopperPearson",
    "DoubleMask",
    "MaskedDetection",
    "Median",
    "MinorityReports",
    "ProductWindows",
    "RobustMask",
    "Rule",
    "TrimmedMean",
    "Verdict",
    "Vote",
    "Windows",
]
