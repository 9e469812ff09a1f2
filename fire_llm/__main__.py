"""Run the command line as a program: `fire-llm`, `python -m fire_llm`, `accelerate launch -m fire_llm`."""

from __future__ import annotations

import signal
from typing import NoReturn

from fire_llm.cli import main


def program() -> NoReturn:
    """Run one verb and end the process with its exit code.

    Before a verb waits for signals, and after it, nothing is left to save: Ctrl-C ends the process as SIGTERM does.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise SystemExit(main())


if __name__ == "__main__":
    program()
