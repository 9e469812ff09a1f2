"""The command line: one module a verb, which is imported when the verb is used, so that --help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fire_llm.cli.exits import exit_code
from fire_llm.cli.parser import parser
from fire_llm.core.launch import REPEAT, RESUME


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done; 1 the work failed; 2 the user's input is wrong; 130 ended by SIGINT, 143 by SIGTERM.
    """
    words = sys.argv[1:] if argv is None else argv
    arguments = parser(words).parse_args(words)
    # Libraries write advice to the terminal that is not for our users; their warnings and errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("USE_HUB_KERNELS", "0")  # else the package kernels fetches code for some model types
    verb = import_module(f"fire_llm.cli.{arguments.verb}")
    return exit_code(lambda: verb.main(arguments), RESUME if arguments.verb in ("run", "sweep", "demo") else REPEAT)
