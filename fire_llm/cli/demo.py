"""`fire-llm demo`: `run demo`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from fire_llm.cli import run
from fire_llm.cli.parser import add_processes, add_report_to, add_set, path

EXAMPLES = (
    "fire-llm demo",
    "fire-llm demo --output runs/short --set phases.0.steps=20 --set phases.1.steps=20",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's options."""
    verb.add_argument("--output", type=path, default="runs/demo", metavar="DIR", help="the run's folder (runs/demo)")
    add_set(verb)
    add_processes(verb)
    add_report_to(verb)


def main(arguments: Namespace) -> int | None:
    """Run the built-in recipe."""
    fixed = {"verb": "run", "recipe": "demo", "grid": [], "arm": [], "dry_run": False}
    return run.main(Namespace(**{**vars(arguments), **fixed}))
