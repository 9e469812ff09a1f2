"""The command line: one module a verb, which is imported when the verb is used, so that --help is instant."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from fire_llm.cli.exits import exit_code, lost_output
from fire_llm.cli.parser import parser
from fire_llm.core.launch import REPEAT, RESUME, end_with_launcher
from fire_llm.core.ranks import settle_launcher
from fire_llm.core.signals import signals_handled
from fire_llm.core.terminal import standard_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done; 1 the work failed; 2 the user's input is wrong; 130 ended by SIGINT, 143 by SIGTERM.
    """
    words = sys.argv[1:] if argv is None else argv
    with standard_streams() as lost:
        arguments = parser(words).parse_args(words)
        end_with_launcher()
        # Libraries write advice to the terminal that is not for our users; their warnings and errors still show.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("USE_HUB_KERNELS", "0")  # else the package kernels fetches code for some model types
        code = exit_code(settle_launcher, REPEAT)  # signals_handled depends on what it finds
        if not code:
            with signals_handled():
                code = exit_code(lambda: _work(arguments), RESUME if arguments.verb in RESUMED else REPEAT)
        sys.stdout.flush()
        return code or lost_output(lost)


RESUMED = ("run", "sweep", "demo")
"""Verbs that resume from what they saved; the others write their result at the very end."""


def _work(arguments: Namespace) -> int | None:
    code: int | None = import_module(f"fire_llm.cli.{arguments.verb}").main(arguments)
    return code
