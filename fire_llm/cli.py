"""The command line. Heavy libraries are imported by the verb that needs them, so that --help is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fire_llm import __version__
from fire_llm.errors import UserError, did_you_mean
from fire_llm.launch import AGAIN, ANEW, interrupted, launched, prepare, report_failure, start

if TYPE_CHECKING:
    from fire_llm.resets import ResetReport

VERBS = ("check", "run", "apply", "inspect", "eval", "report", "demo")

_NATIVE = "take transformers' own class where the checkpoint brings code (auto_map)"


class _Parser(argparse.ArgumentParser):
    """Say "did you mean" for a verb that does not exist."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: '" in message and "VERB" in message:
            given = message.split("invalid choice: '")[1].split("'")[0]
            message = f"there is no verb '{given}'.{did_you_mean(given, VERBS)} Verbs: {', '.join(VERBS)}"
        sys.stderr.write(f"fire-llm: {message}\nTry: {self.prog} --help\n")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """Build the parser of every verb."""
    root = _Parser(prog="fire-llm", description="Continual pretraining: recipes, resets, exact perplexity.")
    root.add_argument("--version", action="version", version=f"fire-llm {__version__}")
    verbs = root.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    check = verb("check", "name every fault of a recipe, and print what running it would take")
    _recipe_arguments(check, nargs="?")
    check.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")

    run = verb("run", "run what of a recipe is not finished; resumes what was cut off")
    _recipe_arguments(run)
    run.add_argument("--arm", action="append", default=[], metavar="NAME", help="only this arm (repeatable)")
    run.add_argument("--output", metavar="DIR", help="the run's folder (runs/NAME)")
    run.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    _launch_arguments(run)

    apply = verb("apply", "apply a reset to a checkpoint and save the result as a new one")
    apply.add_argument("src", metavar="SRC", help="checkpoint folder or Hub id; never written to")
    apply.add_argument("dst", metavar="DST", help="folder to make")
    apply.add_argument("--method", default="fire", metavar="NAME", help="the reset (fire)")
    apply.add_argument("--iterations", type=int, metavar="N", help="Newton–Schulz steps (5)")
    apply.add_argument("--solver", metavar="NAME", help="newton-schulz (default) or polar, the true projection")
    apply.add_argument("--tolerance", type=float, metavar="T", help="relative distance polar may leave (1e-3)")
    apply.add_argument("--scale", metavar="NAME", help="sqrt (default), keep-norm or none")
    apply.add_argument("--shrink", type=float, metavar="C", help="share of the step-0 weights in shrink_perturb (0.5)")
    apply.add_argument("--role", action="append", metavar="ROLE", help="add a role to attention and mlp (repeatable)")
    apply.add_argument("--exclude", action="append", metavar="REGEX", help="leave parameters it matches (repeatable)")
    apply.add_argument("--init", metavar="CKPT", help="step-0 weights, for shrink_perturb and full_reset")
    apply.add_argument("--seed", type=int, metavar="N", help="draw the step-0 weights from the config and this seed")
    apply.add_argument("--revision", metavar="REV", help="branch, tag or commit, where SRC is a Hub id")
    apply.add_argument("--native", action="store_true", help=_NATIVE)
    apply.add_argument("--device", metavar="NAME", default="cpu", help="where to compute: cpu (default), cuda, cuda:1")
    apply.add_argument("--num-processes", type=int, metavar="N", help="processes that share the work (one)")
    apply.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to owner/name")
    apply.add_argument("--dry-run", action="store_true", help="print what would be done, read and write no weights")

    inspect = verb("inspect", "measure the logical matrices of a checkpoint: spectra, DfI, norms")
    inspect.add_argument("checkpoint", metavar="CKPT")
    inspect.add_argument("--against", metavar="CKPT", help="also SFE and cosine against this checkpoint")
    inspect.add_argument(
        "--role", action="append", metavar="ROLE", help="these roles instead of attention, mlp, lm_head"
    )
    inspect.add_argument(
        "--device", metavar="NAME", default="cpu", help="where to compute: cpu (default), cuda, cuda:1"
    )
    inspect.add_argument("--native", action="store_true", help=_NATIVE)
    inspect.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    inspect.add_argument("--html", metavar="FILE", help="write a page with heat maps and spectra")

    evaluate = verb("eval", "measure exact perplexity of checkpoints on corpora or files")
    evaluate.add_argument("checkpoints", metavar="CKPT", nargs="+")
    evaluate.add_argument("--data", nargs="+", required=True, metavar="NAME_OR_FILE", help="corpora or local files")
    evaluate.add_argument(
        "--split", default="validation", choices=("train", "validation"), help="of corpora (validation)"
    )
    evaluate.add_argument("--context", type=int, metavar="N", help="tokens a window")
    evaluate.add_argument("--stride", type=int, metavar="N", help="tokens between windows (the context)")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows a forward pass (8)")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures as JSON")

    report = verb("report", "print the table of finished runs and write the page")
    report.add_argument("runs", metavar="RUN_DIR", nargs="+")
    report.add_argument("--output", metavar="FILE", help="the page (RUN_DIR/report.html)")
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown")

    demo = verb("demo", "run the built-in recipe offline on a CPU, then report")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="the run's folder (runs/demo)")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    _launch_arguments(demo)
    return root


def _recipe_arguments(verb: argparse.ArgumentParser, nargs: str | None = None) -> None:
    verb.add_argument("recipe", metavar="RECIPE", nargs=nargs, help="a YAML file, or the name of a built-in recipe")
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: phases.1.steps=100"
    )


def _launch_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--num-processes", type=int, metavar="N", help="processes to start, one a GPU (one, here)")
    verb.add_argument("--accelerate-config", metavar="FILE", help="accelerate's settings: FSDP2, several machines")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done; 1 the work failed; 2 the user's input is wrong; 130 interrupted.
    """
    arguments = parser().parse_args(argv)
    # Libraries write advice to the terminal that is not for our users; their warnings and errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return globals()[f"_{arguments.verb}"](arguments) or 0
    except UserError as error:
        report_failure(2, str(error))
        return 2
    except KeyboardInterrupt:
        report_failure(130, interrupted(AGAIN if arguments.verb in ("run", "demo") else ANEW))
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`): not an error; keep the interpreter from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        report_failure(1, f"the work failed: {error}")
        if os.environ.get("FIRE_LLM_DEBUG"):
            raise
        return 1
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from fire_llm.recipe import load_recipe, recipe_schema

    if arguments.schema:
        print(json.dumps(recipe_schema(), indent=1))
        return
    if arguments.recipe is None:
        raise UserError("check: name a RECIPE, such as demo or a YAML file")
    from fire_llm.plan import print_plan

    print_plan(load_recipe(arguments.recipe, arguments.set))


def _run(arguments: argparse.Namespace) -> int | None:
    from fire_llm.recipe import load_recipe

    launch = None
    if arguments.num_processes is not None or arguments.accelerate_config is not None:
        launch = prepare(arguments.num_processes, arguments.accelerate_config)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if launch is not None:
        from fire_llm.units import check_processes

        check_processes(recipe, launch.processes, arguments.arm)
    if arguments.dry_run:
        from fire_llm.plan import print_plan

        print_plan(recipe, arguments.output, arguments.arm)
        return None
    if launch is not None and not launch.alone:
        from fire_llm.units import resolve_precision

        again = _again(arguments, "num_processes", "accelerate_config")
        return start(launch, again, resolve_precision(recipe.precision))
    from fire_llm.run import run_recipe

    folder = Path(arguments.output or Path("runs") / recipe.name)
    results = run_recipe(recipe, folder, arms=arguments.arm)
    if int(os.environ.get("RANK", "0")) == 0:
        _show(results, folder / "report.html")
    return None


def _again(arguments: argparse.Namespace, *leave: str) -> list[str]:
    """Return a verb's command line as it was given, without some options: what one rank is started with."""
    verbs: Any = next(a for a in parser()._actions if a.dest == "verb").choices
    line = [arguments.verb]
    for action in verbs[arguments.verb]._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in leave or value in (None, False) or value == action.default:
            continue
        flag = action.option_strings[-1:]
        if not flag or value is True:
            line += flag or [str(value)]
        else:
            line += [f"{flag[0]}={v}" for v in (value if isinstance(value, list) else [value])]
    return line


def _demo(arguments: argparse.Namespace) -> int | None:
    arguments.verb, arguments.recipe, arguments.arm, arguments.dry_run = "run", "demo", [], False
    return _run(arguments)


def _show(results: dict[str, Any], page: Path) -> None:
    from fire_llm.report import print_table, write_report

    print_table(results)
    print(f"report: {write_report(results, page)}")


def _apply(arguments: argparse.Namespace) -> int | None:
    from fire_llm.checkpoint import check_repository, reset_checkpoint
    from fire_llm.resets import RESETS

    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    if arguments.num_processes is not None and not arguments.dry_run:
        from fire_llm.models import find_device

        launch = prepare(arguments.num_processes, None, use_cpu=find_device(arguments.device).type == "cpu")
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
        import torch.distributed as dist

        dist.init_process_group("gloo")
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
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    _print_reset(report, None if arguments.dry_run else arguments.dst)
    if not arguments.dry_run:
        _push(arguments)
    return None


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
    from fire_llm.inspection import inspect_checkpoint, print_inspection
    from fire_llm.staging import check_file, write_json

    check_file("--json", arguments.json)
    check_file("--html", arguments.html)
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
        from fire_llm.report import inspect_page

        inspect_page(rows, Path(arguments.html), str(arguments.checkpoint))


def _eval(arguments: argparse.Namespace) -> None:
    from fire_llm.evaluation import print_scores, score_checkpoints
    from fire_llm.staging import check_file, write_json

    check_file("--json", arguments.json)
    scores = score_checkpoints(
        arguments.checkpoints,
        arguments.data,
        split=arguments.split,
        context=arguments.context,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
    )
    print_scores(scores)
    if arguments.json:
        write_json(Path(arguments.json), scores)


def _report(arguments: argparse.Namespace) -> None:
    from fire_llm.report import load_results, markdown_table, print_table, write_report

    results = [load_results(Path(run)) for run in arguments.runs]
    for one in results:
        if arguments.markdown:
            print(markdown_table(one))
        else:
            print_table(one)
    page = Path(arguments.output) if arguments.output else Path(arguments.runs[0]) / "report.html"
    print(f"report: {write_report(results if len(results) > 1 else results[0], page)}")
