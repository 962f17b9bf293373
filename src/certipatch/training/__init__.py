"""Training: recipes → trained defense."""

from certipatch.training.recipe import Recipe, read
from certipatch.training.train import train

__all__ = ["Recipe", "read", "train"]
