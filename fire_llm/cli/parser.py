"""What can be typed: the verbs and their options."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from fire_llm import __version__
from fire_llm.core.errors import did_you_mean

VERBS = ("check", "run", "sweep", "apply", "inspect", "eval", "report", "demo")

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
    run.add_argument("--output", metavar="DIR", help="the run's folder (runs/NAME)")
    run.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    _launch_arguments(run)

    sweep = verb("sweep", "run a recipe for every point of a grid, with workers that share the stages out")
    _recipe_arguments(sweep)
    sweep.add_argument(
        "--grid", action="append", default=[], metavar="KEY=[…]", help="sweep a key over these values (repeatable)"
    )
    sweep.add_argument("--output", metavar="DIR", help="the sweep's folder (runs/NAME)")
    sweep.add_argument("--dry-run", action="store_true", help="print the trials and their stages, run nothing")
    _launch_arguments(sweep)
    for training in (run, sweep):
        training.add_argument("--arm", action="append", default=[], metavar="NAME", help="only this arm (repeatable)")

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
    apply.add_argument("--init", metavar="CKPT", help="step-0 weights, for shrink_perturb, full_reset, initial_norm")
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

    evaluate = verb("eval", "measure exact perplexity of checkpoints, or of a run's, on corpora or files")
    evaluate.add_argument("checkpoints", metavar="CKPT", nargs="+", help="checkpoints, or the folder of one run")
    evaluate.add_argument("--data", nargs="+", metavar="NAME_OR_FILE", help="corpora or local files (a run's own)")
    evaluate.add_argument(
        "--split", default="validation", choices=("train", "validation"), help="of corpora (validation)"
    )
    evaluate.add_argument("--column", metavar="NAME", help="column of the text in files and Hub data (text)")
    evaluate.add_argument(
        "--document", choices=("line", "blank-line", "heading", "file"), help="a document of .txt files (blank-line)"
    )
    evaluate.add_argument(
        "--context", type=int, metavar="N", help="tokens a window, and the most that tasks read at once"
    )
    evaluate.add_argument("--stride", type=int, metavar="N", help="tokens between windows (the context)")
    evaluate.add_argument(
        "--per-document", action="store_true", help="read each document by itself (windows run across them)"
    )
    evaluate.add_argument(
        "--prefix", default="auto", choices=("auto", "bos", "eos", "none"), help="token read first (BOS, else EOS)"
    )
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows a forward pass (8)")
    evaluate.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "stored", "bfloat16", "float16", "float64"),
        help="of weights and their products (float32); stored: the checkpoint's",
    )
    evaluate.add_argument("--device", metavar="NAME", default="cpu", help="where to compute: cpu (default), cuda")
    evaluate.add_argument("--compile", action="store_true", help="compile the trunk: 20 s or so, for long texts")
    evaluate.add_argument("--num-processes", type=int, metavar="N", help="processes that share the work (one)")
    evaluate.add_argument("--tasks", nargs="+", metavar="NAME", help="also these tasks of lm-eval, or files of them")
    evaluate.add_argument("--limit", type=int, metavar="N", help="documents a task (all)")
    evaluate.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (the task's own)")
    evaluate.add_argument("--diagnostics", action="store_true", help="also features, dormant units, curvature")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures as JSON")

    report = verb("report", "print the table of finished runs and write the page")
    report.add_argument("runs", metavar="RUN_DIR", nargs="*")
    report.add_argument("--output", metavar="FILE", help="the page (RUN_DIR/report.html)")
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    report.add_argument("--schema", action="store_true", help="print the JSON schema of results.json instead")

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
    verb.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that train stages side by side (one a GPU; on a CPU one a core where the model is small)",
    )
    verb.add_argument(
        "--num-processes", type=int, metavar="N", help="processes that train each stage together (one, here)"
    )
    verb.add_argument("--accelerate-config", metavar="FILE", help="accelerate's settings: FSDP2, several machines")
