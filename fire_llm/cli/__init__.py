"""The command line. Heavy libraries are imported by the verb that needs them, so that --help is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_llm.cli.parser import parser
from fire_llm.core.errors import UserError
from fire_llm.core.launch import AGAIN, ANEW, Launch, ended, first_rank, launched, prepare, report_failure, start

if TYPE_CHECKING:
    from fire_llm.resets import ResetReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done; 1 the work failed; 2 the user's input is wrong; 130 ended by SIGINT, 143 by SIGTERM.
    """
    arguments = parser().parse_args(argv)
    # Libraries write advice to the terminal that is not for our users; their warnings and errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _leaving():
            return globals()[f"_{arguments.verb}"](arguments) or 0
    except UserError as error:
        report_failure(2, str(error))
        return 2
    except KeyboardInterrupt as error:
        code, message = ended(error, AGAIN if arguments.verb in ("run", "sweep", "demo") else ANEW)
        report_failure(code, message)
        return code
    except BrokenPipeError:
        # The reader of our output left (`| head`): not an error; keep the interpreter from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        report_failure(1, f"the work failed: {error}")
        if os.environ.get("FIRE_LLM_DEBUG"):
            raise
        return 1
    return 0


def _leaving() -> AbstractContextManager[None]:
    """Leave the other ranks at the end, where a launcher started some."""
    if not launched():
        return nullcontext()  # nothing heavy is imported
    from fire_llm.distributed import leaving

    return leaving()


def _check(arguments: argparse.Namespace) -> None:
    from fire_llm.experiment.recipe import load_trials, recipe_schema

    if arguments.schema:
        print(json.dumps(recipe_schema(), indent=1))
        return
    if arguments.recipe is None:
        raise UserError("check: name a RECIPE, such as demo or a YAML file")
    from fire_llm.experiment.estimate import print_plan

    trials = load_trials(arguments.recipe, arguments.set)
    if trials[0].name:
        from fire_llm.experiment.sweep_report import print_trials

        print_trials(trials, Path("runs") / trials[0].recipe.name)
    else:
        print_plan(trials[0].recipe)


def _run(arguments: argparse.Namespace) -> int | None:
    from fire_llm.experiment.recipe import load_recipe

    launch = _launch(arguments)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if recipe.sweep and not launched():
        sys.stderr.write("fire-llm: this runs the recipe as it is written; fire-llm sweep runs its grid\n")
    if launch is not None:
        from fire_llm.experiment.stages import check_processes

        check_processes(recipe, launch.processes, arguments.arm)
    if arguments.dry_run:
        from fire_llm.experiment.estimate import print_plan

        print_plan(recipe, arguments.output, arguments.arm)
        return None
    if launch is not None and not launch.alone:
        from fire_llm.core.hardware import resolve_precision

        again = _again(arguments, "num_processes", "accelerate_config")
        return start(launch, again, resolve_precision(recipe.precision))
    from fire_llm.experiment.run import run_recipe

    folder = Path(arguments.output or Path("runs") / recipe.name)
    workers = arguments.workers if launch is None else 1
    results = run_recipe(recipe, folder, arms=arguments.arm, workers=workers)
    if first_rank():
        _show(results, folder / "report.html")
    return None


def _launch(arguments: argparse.Namespace) -> Launch | None:
    """Return the launch of several ranks that was asked for, None where none was."""
    if arguments.num_processes is None and arguments.accelerate_config is None:
        return None
    if arguments.workers is not None:
        raise UserError(
            "--workers trains several stages at once, --num-processes one on several processes: give one of the two"
        )
    return prepare(arguments.num_processes, arguments.accelerate_config)


def _sweep(arguments: argparse.Namespace) -> int:
    from fire_llm.cli.sweeping import sweep

    return sweep(arguments, _launch(arguments), _again(arguments, "num_processes", "accelerate_config"))


def _again(arguments: argparse.Namespace, *leave: str) -> list[str]:
    """Return a verb's command line as it was given, without some options: what one rank is started with."""
    verbs: Any = next(a for a in parser()._actions if a.dest == "verb").choices
    line = [arguments.verb]
    for action in verbs[arguments.verb]._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in leave or value in (None, False) or value == action.default:
            continue
        flag, values = action.option_strings[-1:], value if isinstance(value, list) else [value]
        if value is True:
            line += flag
        elif not flag or action.nargs == "+":
            line += [*flag, *map(str, values)]
        else:
            line += [f"{flag[0]}={v}" for v in values]
    return line


def _demo(arguments: argparse.Namespace) -> int | None:
    arguments.verb, arguments.recipe, arguments.arm, arguments.dry_run = "run", "demo", [], False
    return _run(arguments)


def _show(results: dict[str, Any], page: Path) -> None:
    from fire_llm.reporting.schema import Results
    from fire_llm.reporting.tables import page_told, print_table

    typed = Results.model_validate(results)
    print_table(typed)
    print(page_told(typed, page))


def _apply(arguments: argparse.Namespace) -> int | None:
    from fire_llm.checkpoint import check_repository, reset_checkpoint
    from fire_llm.resets import RESETS

    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    if arguments.num_processes is not None and not arguments.dry_run:
        launch = _prepare_on(arguments.device, arguments.num_processes)
        if not launch.alone:
            again = _again(arguments, "num_processes", "push_to_hub")
            code = start(launch, again, "fp32", ANEW)
            if code == 0:
                _push(arguments)
            return code
    names = ("iterations", "solver", "tolerance", "scale", "shrink", "exclude")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.role:
        method = RESETS.get(arguments.method)
        base = method.roles if method is not None and method.matrices_only else ()
        options["roles"] = list(dict.fromkeys([*base, *arguments.role]))
    if launched():
        from fire_llm.distributed import join

        join("gloo")
    report = reset_checkpoint(
        arguments.src,
        arguments.dst,
        arguments.method,
        init=arguments.init,
        seed=arguments.seed,
        revision=arguments.revision,
        native=arguments.native,
        device=arguments.device,
        progress=True,
        dry_run=arguments.dry_run,
        **options,
    )
    if not first_rank():
        return None
    _print_reset(report, None if arguments.dry_run else arguments.dst)
    if not arguments.dry_run:
        _push(arguments)
    return None


def _prepare_on(device: str, processes: int) -> Launch:
    from fire_llm.models import find_device

    return prepare(processes, None, use_cpu=find_device(device).type == "cpu")


def _push(arguments: argparse.Namespace) -> None:
    if arguments.push_to_hub is not None and not launched():
        from fire_llm.checkpoint import push

        print(f"pushed: {push(Path(arguments.dst), arguments.push_to_hub)}")


def _print_reset(report: ResetReport, saved: str | None) -> None:
    """Say what a reset of a checkpoint did, or, where nothing was saved, what it would do to each piece."""
    if saved is None:
        label = "; ".join(spec.label() for spec in report.resets)
        for tensor in [*report.touched, *report.untouched]:
            shape = "×".join(map(str, tensor.shape))
            action, why = ("leave", tensor.reason) if tensor.reason else ("reset", f"by {label}")
            print(f"{action}  {tensor.role:<10} {shape:>14}  {tensor.name}  {why}")
    lists = {"kept as stored, not loaded by the class": report.kept_unread, "not copied": report.not_copied}
    for what, names in lists.items():
        if names:
            print(f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}")
    if saved is None:
        print(f"{len(report.touched)} to reset, {len(report.untouched)} to leave; nothing written (--dry-run)")
    else:
        print(f"{report}\nsaved: {saved}")


def _inspect(arguments: argparse.Namespace) -> None:
    from fire_llm.checkpoint.inspection import inspect_checkpoint, print_inspection
    from fire_llm.core.atomic import check_file, write_json

    check_file("--json", arguments.json)
    check_file("--html", arguments.html)
    if arguments.html:
        from fire_llm.reporting.tables import check_page, inspect_page

        check_page()
    rows = inspect_checkpoint(
        arguments.checkpoint,
        arguments.against,
        arguments.role or ("attention", "mlp", "lm_head"),
        device=arguments.device,
        native=arguments.native,
    )
    print_inspection(rows)
    if arguments.json:
        write_json(Path(arguments.json), rows)
    if arguments.html:
        inspect_page(rows, Path(arguments.html), str(arguments.checkpoint))


def _eval(arguments: argparse.Namespace) -> int | None:
    from fire_llm.core.atomic import check_file, is_run, write_json

    check_file("--json", arguments.json)
    of_run = [name for name in arguments.checkpoints if is_run(Path(name))]
    if of_run:
        _check_run_alone(arguments, of_run[0])
    if not (arguments.data or arguments.tasks or of_run):
        raise UserError("eval: name what to measure on: --data with corpora or files, or --tasks of lm-eval")
    if arguments.num_processes is not None:
        if arguments.tasks:
            raise UserError("--num-processes shares the work of perplexity, not of --tasks: give them without it")
        launch = _prepare_on(arguments.device, arguments.num_processes)
        if not launch.alone:
            return start(launch, _again(arguments, "num_processes"), "fp32", ANEW)
    if launched():
        from fire_llm.distributed import join

        join()
    evaluation = (_evaluate_run if of_run else _evaluate)(arguments, first_rank())
    if first_rank():
        from fire_llm.evaluation.table import print_scores

        print_scores(evaluation)
        if arguments.json:
            write_json(Path(arguments.json), evaluation)
    return None


def _evaluate(arguments: argparse.Namespace, progress: bool) -> dict[str, Any]:
    from fire_llm.evaluation.checkpoints import score_checkpoints

    look = None
    if arguments.diagnostics:
        from fire_llm.evaluation.diagnose import diagnose

        def look(model: Any, text: Any) -> dict[str, Any]:
            return diagnose(model, text.tokens, context=arguments.context).to_dict()

    names = ("split", "column", "document", "context", "stride", "batch_size", "per_document", "prefix", "dtype")
    return score_checkpoints(
        arguments.checkpoints,
        arguments.data or [],
        device=arguments.device,
        compiled=arguments.compile,
        tasks=arguments.tasks or [],
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        look=look,
        progress=progress,
        **{name: getattr(arguments, name) for name in names},
    )


def _check_run_alone(arguments: argparse.Namespace, run: str) -> None:
    """Refuse a run beside other checkpoints, and options that its own evaluation has settled."""
    if len(arguments.checkpoints) > 1:
        raise UserError(f"eval: '{run}' is the folder of a run: give one run alone, or checkpoints in it")
    usual = parser().parse_args(["eval", run])
    free = ("data", "context", "stride", "batch_size", "device", "num_processes", "json")
    given = [n for n, value in vars(arguments).items() if n not in free and value != getattr(usual, n)]
    if given:
        flag = given[0].replace("_", "-")
        raise UserError(
            f"eval: --{flag} is not for the folder of a run, '{run}': leave it out, or name its checkpoints"
        )


def _evaluate_run(arguments: argparse.Namespace, progress: bool) -> dict[str, Any]:
    """Measure a run's checkpoints, and write its page anew."""
    from fire_llm.experiment.evaluate_run import evaluate_run
    from fire_llm.reporting.tables import load_results, page_told

    folder = Path(arguments.checkpoints[0])
    names = ("data", "context", "stride", "batch_size", "device")
    evaluation = evaluate_run(folder, **{name: getattr(arguments, name) for name in names}, progress=progress)
    if progress and (folder / "results.json").is_file():
        print(page_told(load_results(folder), folder / "report.html"))
    return evaluation


def _report(arguments: argparse.Namespace) -> None:
    from fire_llm.reporting.schema import results_schema
    from fire_llm.reporting.tables import load_results, markdown_table, print_table, write_report

    if arguments.schema:
        print(json.dumps(results_schema(), indent=1, ensure_ascii=False))
        return
    if not arguments.runs:
        raise UserError("report: name the folder of a finished run, RUN_DIR")
    results = [load_results(Path(run)) for run in arguments.runs]
    for one in results:
        if arguments.markdown:
            print(markdown_table(one))
        else:
            print_table(one)
    page = Path(arguments.output) if arguments.output else Path(arguments.runs[0]) / "report.html"
    print(f"report: {write_report(results if len(results) > 1 else results[0], page)}")
