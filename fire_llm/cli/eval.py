"""`fire-llm eval`: measure exact perplexity of checkpoints, or of a run's, on corpora or files."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fire_llm.cli.launching import command_line, device_launch
from fire_llm.cli.parser import add_device, parser, path
from fire_llm.core.errors import UserError
from fire_llm.core.launch import REPEAT, start
from fire_llm.core.ranks import first_rank, launched

EXAMPLES = (
    "fire-llm eval runs/demo",
    "fire-llm eval before after --data wikitext-103 --context 1024",
    "fire-llm eval openai-community/gpt2 --data notes.txt --per-document --json scores.json",
)

_OF_A_RUN = ("data", "context", "stride", "batch_size", "device", "again")
"""Options that apply to the folder of a run too; its recipe decides the others."""


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    verb.add_argument("checkpoints", type=path, metavar="CKPT", nargs="+", help="checkpoints, or the folder of one run")
    verb.add_argument(
        "--data", type=path, nargs="+", metavar="NAME_OR_FILE", help="corpora or local files (a run's own)"
    )
    verb.add_argument("--split", default="validation", choices=("train", "validation"), help="of corpora (validation)")
    verb.add_argument("--column", metavar="NAME", help="column of the text in files and Hub data (text)")
    verb.add_argument(
        "--document", choices=("line", "blank-line", "heading", "file"), help="a document of .txt files (blank-line)"
    )
    verb.add_argument("--max-tokens", type=int, metavar="N", help="of each text the first documents, N tokens at most")
    verb.add_argument("--context", type=int, metavar="N", help="tokens a window, and the most that tasks read at once")
    verb.add_argument("--stride", type=int, metavar="N", help="tokens between windows (the context)")
    verb.add_argument(
        "--per-document", action="store_true", help="read each document by itself (windows run across them)"
    )
    verb.add_argument(
        "--prefix", default="auto", choices=("auto", "bos", "eos", "none"), help="token read first (BOS, else EOS)"
    )
    verb.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows a forward pass (8)")
    verb.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "stored", "bfloat16", "float16", "float64", "fp32", "bf16", "fp16", "fp64"),
        help="of weights and their products: fp32 (or float32, the same), bf16, fp16, fp64; stored: the checkpoint's",
    )
    add_device(verb)
    verb.add_argument("--compile", action="store_true", help="compile the trunk: 20 s or so, for long texts")
    verb.add_argument("--num-processes", type=int, metavar="N", help="processes that share the work (one)")
    verb.add_argument("--tasks", nargs="+", metavar="NAME", help="also these tasks of lm-eval, or files of them")
    verb.add_argument("--limit", type=int, metavar="N", help="documents a task (all)")
    verb.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (the task's own)")
    verb.add_argument("--diagnostics", action="store_true", help="also features, dormant units, curvature")
    verb.add_argument("--again", action="store_true", help="of a run: measure again what was measured before")
    verb.add_argument("--json", type=path, metavar="FILE", help="write the figures as JSON")


def main(arguments: Namespace) -> int | None:
    """Score checkpoints, or those of a run: here, or on the ranks of a launch."""
    from fire_llm.core.atomic import check_file, is_run, write_json

    if first_rank():
        check_file("--json", arguments.json)
    of_run = [name for name in arguments.checkpoints if is_run(Path(name))]
    if of_run:
        _check_run_alone(arguments, of_run[0])
    if not (arguments.data or arguments.tasks or of_run):
        gone = next((name for name in arguments.checkpoints if not Path(name).exists()), None)
        run = f". The folder of a run needs neither, and there is no folder '{gone}'" if gone is not None else ""
        raise UserError(f"eval: name what to measure on: --data with corpora or files, or --tasks of lm-eval{run}")
    if arguments.max_tokens is not None and not (arguments.data or of_run):
        raise UserError("eval: --max-tokens counts those of --data, and there is none; for --tasks, give --limit")
    if arguments.again and not of_run:
        raise UserError("eval: --again is for the folder of a run; checkpoints are always measured")
    if arguments.num_processes is not None and arguments.tasks:
        raise UserError("--num-processes shares the work of perplexity, not of --tasks: give them without it")
    if (launch := device_launch(arguments)) is not None:
        return start(launch, command_line(arguments), "fp32", REPEAT)
    if launched():
        from fire_llm.distributed import join

        join()
    evaluation, tell = (_evaluate_run if of_run else _evaluate)(arguments, first_rank())
    if first_rank():
        if arguments.json:
            write_json(Path(arguments.json), evaluation)
        tell()
        print(f"computed on {evaluation['settings']['device']}")
    return None


def _check_run_alone(arguments: Namespace, run: str) -> None:
    """Refuse a run beside other checkpoints, and options that the run's recipe decides."""
    if len(arguments.checkpoints) > 1:
        raise UserError(f"eval: '{run}' is the folder of a run: give one run alone, or checkpoints in it")
    defaults = parser(["eval"]).parse_args(["eval", run])
    allowed = (*_OF_A_RUN, "num_processes", "json")
    given = [n for n, value in vars(arguments).items() if n not in allowed and value != getattr(defaults, n)]
    if given:
        flag = given[0].replace("_", "-")
        raise UserError(
            f"eval: --{flag} is not for the folder of a run, '{run}': leave it out, or name its checkpoints"
        )


def _evaluate(arguments: Namespace, first: bool) -> tuple[dict[str, Any], Callable[[], None]]:
    """Score checkpoints on texts and tasks; return the scores, and a function that prints them."""
    from fire_llm.evaluation.checkpoints import score_checkpoints
    from fire_llm.evaluation.table import print_scores

    texts = ("split", "column", "document", "max_tokens", "per_document", "prefix")
    names = (*texts, "context", "stride", "batch_size", "dtype")
    scored = score_checkpoints(
        arguments.checkpoints,
        arguments.data or [],
        device=arguments.device,
        compiled=arguments.compile,
        tasks=arguments.tasks or [],
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        diagnostics=arguments.diagnostics,
        progress=first,
        **{name: getattr(arguments, name) for name in names},
    )
    tell = partial(print_scores, scored.rows, differences=scored.differences, diagnostics=scored.diagnostics)
    return scored.to_dict(), partial(tell, tasks=scored.tasks, max_tokens=arguments.max_tokens)


def _evaluate_run(arguments: Namespace, first: bool) -> tuple[dict[str, Any], Callable[[], None]]:
    """Score the checkpoints of a run; return the scores, and a function that prints them and rewrites the page."""
    from fire_llm.evaluation.table import print_scores
    from fire_llm.experiment.evaluate_run import evaluate_run
    from fire_llm.reporting.schema import Evaluation
    from fire_llm.reporting.tables import load_results, page_line

    folder = Path(arguments.checkpoints[0])
    evaluation = evaluate_run(folder, **{name: getattr(arguments, name) for name in _OF_A_RUN}, progress=first)

    def tell() -> None:
        if (folder / "results.json").is_file():
            print(page_line(load_results(folder), folder / "report.html"))
        typed = Evaluation.model_validate(evaluation)
        print_scores(
            typed.rows,
            forgetting=typed.forgetting,
            forward_transfer=typed.forward_transfer,
            left_out=typed.left_out,
            unfinished=typed.unfinished,
            max_tokens=typed.settings.max_tokens,
        )
        if typed.reused:
            print(f"{typed.reused} of {len(typed.rows)} rows were measured before, with these weights (--again: anew)")

    return evaluation, tell
