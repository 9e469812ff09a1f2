"""`fire-llm run`: train a recipe, or every point of a grid over it, and report; `sweep` and `demo` come here too."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_llm.cli.launching import command_line, training_launch
from fire_llm.cli.parser import add_processes, add_recipe, add_report_to, path, set_report_to
from fire_llm.core.launch import report_failure, start
from fire_llm.core.ranks import first_rank, launched

if TYPE_CHECKING:
    from fire_llm.experiment.recipe import Recipe, Trial

EXAMPLES = (
    "fire-llm run recipe.yaml --output runs/one",
    "fire-llm run demo --arm base --arm fire --workers 2",
    "fire-llm run demo --grid phases.1.arms.fire.iterations=1,5,15 --dry-run",
    "fire-llm run gpt-0.1b/paper --num-processes 4 --accelerate-config fsdp2",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options, which are also those of `sweep`."""
    add_recipe(verb)
    verb.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="run every point of a grid: this key with each value, or KEY=[V1,V2] (repeatable)",
    )
    verb.add_argument(
        "--output", type=path, metavar="DIR", help="the folder of the run or of the grid's runs (runs/NAME)"
    )
    verb.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    add_processes(verb)
    add_report_to(verb)
    verb.add_argument("--arm", action="append", default=[], metavar="NAME", help="only this arm (repeatable)")


def main(arguments: Namespace) -> int | None:
    """Run a recipe, or the trials of its grid: here, in workers, or on the ranks of a launch.

    Returns:
        The exit code; None for 0.
    """
    from fire_llm.experiment.recipe import Trial, doubts, load_recipe, load_trials
    from fire_llm.experiment.stages import check_processes

    set_report_to(arguments)
    launch = training_launch(arguments)
    sweeping = arguments.verb == "sweep" or bool(arguments.grid)
    if sweeping:
        trials = load_trials(arguments.recipe, arguments.set, map(_as_list, arguments.grid))
    else:
        trials = [Trial("", {}, load_recipe(arguments.recipe, arguments.set))]
    recipe = trials[0].recipe
    if recipe.sweep and not launched():
        sys.stderr.write("fire-llm: this runs the recipe as it is written; fire-llm sweep runs its grid\n")
    if not launched() and not arguments.dry_run:
        sys.stderr.writelines(f"fire-llm: {doubt}\n" for doubt in doubts(recipe))
    if launch is not None:
        for trial in trials:
            check_processes(trial.recipe, launch.processes, arguments.arm)
    folder = Path(arguments.output or Path("runs") / recipe.name)
    if arguments.dry_run:
        from fire_llm.experiment.estimate import print_plan
        from fire_llm.experiment.sweep_report import print_trials

        if sweeping:
            print_trials(trials, folder, arguments.arm)
        else:
            print_plan(recipe, folder, arguments.arm)
        return None
    if launch is not None and not launch.alone:
        from fire_llm.core.hardware import resolve_precision

        return start(launch, command_line(arguments), resolve_precision(recipe.precision))
    workers = arguments.workers if launch is None else 1
    if sweeping:
        return _sweep(trials, folder, arguments.arm, workers)
    return _run(recipe, folder, arguments.arm, workers)


def _as_list(text: str) -> str:
    """Return `KEY=[V1,V2]` for `KEY=V1,V2`, and any other text as it is."""
    key, equals, values = text.partition("=")
    return f"{key}=[{values}]" if equals and "," in values and values[0] not in "[{\"'" else text


def _run(recipe: Recipe, folder: Path, arms: list[str], workers: int | None) -> int:
    """Run a recipe, write its page and print its table; return the exit code."""
    from fire_llm.experiment.pushing import unpushed
    from fire_llm.experiment.run import run_recipe

    results = run_recipe(recipe, folder, arms=arms, workers=workers)
    if first_rank():
        show_results(results, folder / "report.html")
        if left := unpushed(recipe, folder):
            report_failure(1, left)
            return 1
    return 0


def show_results(results: dict[str, Any], page: Path) -> None:
    """Write the page of a run, and print its table."""
    from fire_llm.reporting.schema import Results
    from fire_llm.reporting.tables import page_line, print_table

    typed = Results.model_validate(results)
    line = page_line(typed, page)
    print_table(typed)
    print(line)


def _sweep(trials: list[Trial], folder: Path, arms: list[str], workers: int | None) -> int:
    """Run the trials of a sweep, write their pages and print their table; return the exit code."""
    from fire_llm.experiment.run import run_sweep
    from fire_llm.experiment.sweep_report import show

    sweep = run_sweep(trials, folder, arms=arms, workers=workers)
    if first_rank():
        show(sweep, folder)
    if sweep.failures:
        report_failure(sweep.code, sweep.failed_text())
    return sweep.code
