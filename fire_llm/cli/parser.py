"""Build the parser of the command line: the verbs, and the options that several of them take."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Container
from importlib import import_module
from typing import NoReturn

from fire_llm import __version__
from fire_llm.core.errors import did_you_mean

VERBS = {
    "check": "name every fault of a recipe, and print what running it would take",
    "run": "run what of a recipe is not finished; resumes what was cut off",
    "sweep": "run a recipe for every point of its grid and of --grid; run --grid does the same",
    "apply": "apply a reset to a checkpoint and save the result as a new one",
    "inspect": "measure the logical matrices of a checkpoint: spectra, DfI, norms",
    "eval": "measure exact perplexity of checkpoints, or of a run's, on corpora or files",
    "report": "print the table of runs, as far as they are, and write the page",
    "push": "upload one arm of a run to the Hub, with a card that compares all of them",
    "demo": "run the built-in recipe, which needs no network, then report",
}
"""Each is a module of this package, with `EXAMPLES`, `add_options` and `main`."""


class _Parser(ArgumentParser):
    """Answer an unknown verb with the name of the nearest one."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: '" in message and "VERB" in message:
            verb = message.split("invalid choice: '")[1].split("'")[0]
            message = f"there is no verb '{verb}'.{did_you_mean(verb, VERBS)} Verbs: {', '.join(VERBS)}"
        sys.stderr.write(f"fire-llm: {message}\nTry: {self.prog} --help\n")
        raise SystemExit(2)


def parser(verbs: Container[str] = VERBS) -> ArgumentParser:
    """Build the parser.

    Args:
        verbs: Import the modules of these verbs and add their options; other verbs only get their names.
    """
    root = _Parser(
        prog="fire-llm",
        description="Continual pretraining: recipes, resets, exact perplexity.",
        epilog="fire-llm VERB --help lists the options of a verb, with examples.",
    )
    root.add_argument("--version", action="version", version=f"fire-llm {__version__}")
    named = root.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verb = named.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=RawDescriptionHelpFormatter
        )
        if name in verbs:
            module = import_module(f"fire_llm.cli.{name}")
            module.add_options(verb)
            verb.epilog = "\n  ".join(["examples:", *module.EXAMPLES])
    return root


def path(text: str) -> str:
    """Read an argument that may be a path: `~` is the home folder, in `--option=~/x` and in quotes too."""
    return os.path.expanduser(text)


def add_recipe(verb: ArgumentParser, nargs: str | None = None) -> None:
    """Add RECIPE and --set."""
    verb.add_argument(
        "recipe", type=path, metavar="RECIPE", nargs=nargs, help="a YAML file, or the name of a built-in recipe"
    )
    add_set(verb)


def add_set(verb: ArgumentParser) -> None:
    """Add --set."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe: phases.1.steps=100 (repeatable)",
    )


def add_report_to(verb: ArgumentParser) -> None:
    """Add --report-to."""
    verb.add_argument(
        "--report-to",
        action="append",
        default=[],
        metavar="NAME",
        help="show the curves in a tracker: tensorboard, trackio, wandb, ... (repeatable); none for none",
    )


def set_report_to(arguments: Namespace) -> None:
    """Turn --report-to into a --set of the recipe's key."""
    if arguments.report_to:
        names = [name for given in arguments.report_to for name in given.split(",")]
        arguments.set = [*arguments.set, f"report_to={json.dumps(names if names != ['none'] else [])}"]
        arguments.report_to = []


def add_processes(verb: ArgumentParser) -> None:
    """Add the options for the number of processes and machines: --workers, --num-processes, …."""
    verb.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that train stages side by side (one a GPU; on a CPU one a core where the model is small)",
    )
    verb.add_argument(
        "--num-processes", type=int, metavar="N", help="processes that train each stage together (one, here)"
    )
    verb.add_argument(
        "--accelerate-config",
        type=path,
        metavar="NAME_OR_FILE",
        help="accelerate's settings: one-gpu, multi-gpu, fsdp2, hsdp, multi-node, cpu, or a file of your own",
    )
    verb.add_argument(
        "--num-machines", type=int, metavar="N", help="machines that share --num-processes, on each of them (one)"
    )
    verb.add_argument("--machine-rank", type=int, metavar="R", help="which of the machines this is, from 0")
    verb.add_argument("--main-address", metavar="HOST[:PORT]", help="where all find the first machine (port 29500)")


def add_device(verb: ArgumentParser) -> None:
    """Add --device."""
    verb.add_argument(
        "--device",
        metavar="NAME",
        default="auto",
        help="where to compute: cpu, cuda, cuda:1; auto (default) is the accelerator, and the CPU where there is none "
        "or it lacks float64 (mps); the output names what was used",
    )


def add_native(verb: ArgumentParser) -> None:
    """Add --native."""
    verb.add_argument(
        "--native", action="store_true", help="take transformers' own class where the checkpoint brings code (auto_map)"
    )
