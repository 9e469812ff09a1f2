"""The verb `sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fire_llm.core.launch import Launch, report_failure, start
from fire_llm.core.ranks import first_rank


def sweep(arguments: argparse.Namespace, launch: Launch | None, again: list[str]) -> int:
    """Run the trials of a sweep, or print them; `again` is the command line of each of several ranks."""
    from fire_llm.experiment.recipe import load_trials

    trials = load_trials(arguments.recipe, arguments.set, arguments.grid)
    folder = Path(arguments.output or Path("runs") / trials[0].recipe.name)
    if arguments.dry_run:
        from fire_llm.experiment.sweep_report import print_trials

        print_trials(trials, folder, arguments.arm)
        return 0
    if launch is not None and not launch.alone:
        from fire_llm.core.hardware import resolve_precision
        from fire_llm.experiment.stages import check_processes

        for trial in trials:
            check_processes(trial.recipe, launch.processes, arguments.arm)
        return start(launch, again, resolve_precision(trials[0].recipe.precision))
    from fire_llm.experiment.run import run_sweep
    from fire_llm.experiment.sweep_report import show

    workers = arguments.workers if launch is None else 1
    done = run_sweep(trials, folder, arms=arguments.arm, workers=workers)
    if first_rank():
        show(done, folder)
    if done.failures:
        report_failure(done.code, done.told())
    return done.code
