"""Trained lineages whose answer is known, as ordinary Hugging Face checkpoints on disk."""

from mi_weightspace.organisms.build import Organism, build, build_recipe, decoys
from mi_weightspace.organisms.codes import KINDS, PlantedCode, planted_code
from mi_weightspace.organisms.inoculation import InoculationOrganism, build_inoculation
from mi_weightspace.organisms.recipes import RECIPES, SIZES, recipe

NAMES: tuple[str, ...] = tuple(RECIPES)

__all__ = [
    "KINDS",
    "NAMES",
    "RECIPES",
    "SIZES",
    "InoculationOrganism",
    "Organism",
    "PlantedCode",
    "build",
    "build_inoculation",
    "build_recipe",
    "decoys",
    "planted_code",
    "recipe",
]
