"""Rules: evidence → label, each in one file with the theorem that bounds an attacker."""

from certipatch.rules.base import Rule, Verdict
from certipatch.rules.vote import Vote

__all__ = ["Rule", "Verdict", "Vote"]
