"""The typed recipe: YAML in, every fault at once out."""

from __future__ import annotations

from fire_llm.experiment.recipe.faults import doubts, stop_fault
from fire_llm.experiment.recipe.grid import Trial, load_trials, words
from fire_llm.experiment.recipe.optimizing import optimizer_of
from fire_llm.experiment.recipe.reading import load_recipe, recipes_folder
from fire_llm.experiment.recipe.sections import ModelSection, OptimizerSection, PhaseSection, Recipe, recipe_schema

__all__ = [
    "ModelSection",
    "OptimizerSection",
    "PhaseSection",
    "Recipe",
    "Trial",
    "doubts",
    "load_recipe",
    "load_trials",
    "optimizer_of",
    "recipe_schema",
    "recipes_folder",
    "stop_fault",
    "words",
]
