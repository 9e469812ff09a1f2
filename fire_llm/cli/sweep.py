"""`fire-llm sweep`: `run` for every point of the grid that the recipe and --grid span."""

from fire_llm.cli.run import add_options, main

EXAMPLES = (
    "fire-llm sweep demo --grid phases.1.arms.fire.iterations=1,5,15 --grid optimizer.lr=1.0e-3,3.0e-4",
    "fire-llm sweep demo --grid seed=1,2,3 --arm base --arm fire --workers 2",
    "fire-llm sweep recipe.yaml --dry-run",
)

__all__ = ["EXAMPLES", "add_options", "main"]
