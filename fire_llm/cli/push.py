"""`fire-llm push`: upload one arm of a run to the Hub, with a card that compares all of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fire_llm.cli.parser import path

EXAMPLES = (
    "fire-llm push runs/continue owner/name --arm fire",
    "fire-llm push runs/continue owner/name --arm fire --seed 2 --checkpoint best --public",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    verb.add_argument("run", type=path, metavar="RUN_DIR", help="the folder of a run")
    verb.add_argument("repo", metavar="OWNER/NAME", help="the repository; it is made where it is not there")
    verb.add_argument("--arm", metavar="NAME", help="of the last phase; needed where it has several")
    verb.add_argument("--seed", type=int, metavar="N", help="of the recipe's (the first)")
    verb.add_argument("--start", metavar="NAME", help="the warm start, where there are several: final, best, 2000")
    verb.add_argument("--checkpoint", metavar="NAME", default="final", help="final, best, ema, or a kept step (final)")
    verb.add_argument("--public", action="store_true", help="make the repository public (private)")


def main(arguments: Namespace) -> None:
    """Upload, and print where to."""
    from fire_llm.experiment.pushing import push_run

    address = push_run(
        Path(arguments.run),
        arguments.repo,
        arm=arguments.arm,
        seed=arguments.seed,
        start=arguments.start,
        checkpoint=arguments.checkpoint,
        private=not arguments.public,
    )
    print(f"pushed: {address}")
