"""The typed recipe: YAML in, every fault at once out."""

from __future__ import annotations

from fire_llm.recipe.reading import load_recipe, recipes_folder
from fire_llm.recipe.sections import ModelSection, PhaseSection, Recipe, recipe_schema

__all__ = ["ModelSection", "PhaseSection", "Recipe", "load_recipe", "recipe_schema", "recipes_folder"]
