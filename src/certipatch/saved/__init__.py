"""Saved defenses: cards, weights, the zoo, and opening by name."""

from certipatch.saved.card import Card
from certipatch.saved.card import read as read_card
from certipatch.saved.open import ClassifierInfo, DefenseRef, load, locate, open_defense, zoo

__all__ = ["Card", "ClassifierInfo", "DefenseRef", "load", "locate", "open_defense", "read_card", "zoo"]
