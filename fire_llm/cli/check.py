"""`fire-llm check`: name every fault of a recipe, and print what running it would take."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fire_llm.cli.parser import add_recipe
from fire_llm.core.errors import UserError

EXAMPLES = (
    "fire-llm check demo",
    "fire-llm check recipe.yaml --set phases.1.steps=100",
    "fire-llm check --schema",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    add_recipe(verb, nargs="?")
    verb.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")


def main(arguments: Namespace) -> None:
    """Print the plan of a recipe, the trials of one with a grid, or the schema."""
    from fire_llm.experiment.recipe import load_trials, recipe_schema

    if arguments.schema:
        print(json.dumps(recipe_schema(), indent=1))
        return
    if arguments.recipe is None:
        raise UserError("check: name a RECIPE, such as demo or a YAML file")
    trials = load_trials(arguments.recipe, arguments.set)
    if trials[0].name:
        from fire_llm.experiment.sweep_report import print_trials

        print_trials(trials, Path("runs") / trials[0].recipe.name)
    else:
        from fire_llm.experiment.estimate import print_plan

        print_plan(trials[0].recipe)
