"""`fire-llm inspect`: measure the logical matrices of a checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fire_llm.cli.parser import add_device, add_native, path

EXAMPLES = (
    "fire-llm inspect openai-community/gpt2",
    "fire-llm inspect trained-fire --against trained --html matrices.html",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    verb.add_argument("checkpoint", type=path, metavar="CKPT", help="checkpoint folder or Hub id")
    verb.add_argument("--against", type=path, metavar="CKPT", help="also SFE and cosine against this checkpoint")
    verb.add_argument(
        "--role", action="append", metavar="ROLE", help="these roles instead of attention, mlp, conv, lm_head"
    )
    add_device(verb)
    add_native(verb)
    verb.add_argument("--all", action="store_true", help="list each matrix in a terminal too (by part and by layer)")
    verb.add_argument("--json", type=path, metavar="FILE", help="write the figures as JSON")
    verb.add_argument("--html", type=path, metavar="FILE", help="write a page with heat maps and spectra")


def main(arguments: Namespace) -> None:
    """Print the table of matrices, and write what was asked for."""
    from fire_llm.checkpoint.inspection import ROLES, inspect_checkpoint
    from fire_llm.core.atomic import check_file, write_json
    from fire_llm.models import find_device

    check_file("--json", arguments.json)
    check_file("--html", arguments.html)
    from fire_llm.reporting.inspection import about, inspect_page, print_inspection
    from fire_llm.reporting.tables import check_page

    if arguments.html:
        check_page()
    device = str(find_device(arguments.device))
    roles = arguments.role or ROLES
    inspection = inspect_checkpoint(
        arguments.checkpoint, arguments.against, roles, device=device, native=arguments.native
    )
    figures = inspection.to_dict()
    if arguments.json:
        write_json(Path(arguments.json), figures)
    if arguments.html:
        names = [arguments.checkpoint, *([arguments.against] if arguments.against is not None else [])]
        inspect_page(figures["rows"], Path(arguments.html), " against ".join(names), about(figures))
    print_inspection(figures, arguments.all)
    for page in filter(None, (arguments.json, arguments.html)):
        print(f"saved: {page}")
    print(f"computed on {device}")
