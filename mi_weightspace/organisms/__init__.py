"""Trained lineages whose answer is known, as ordinary Hugging Face checkpoints on disk."""

from mi_weightspace.organisms.build import Organism, build, build_recipe, decoys
from mi_weightspace.organisms.recipes import RECIPES, SIZES, recipe

NAMES: tuple[str, ...] = tuple(RECIPES)

__all__ = ["NAMES", "RECIPES", "SIZES", "Organism", "build", "build_recipe", "decoys", "recipe"]
