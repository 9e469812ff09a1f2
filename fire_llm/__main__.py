"""Run the command line as a program: `fire-llm`, `python -m fire_llm`, `accelerate launch -m fire_llm`."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

from fire_llm.cli import main
from fire_llm.core.signals import SIGNALS


def program() -> NoReturn:
    """Run one verb and end the process with its exit code.

    Before a verb waits for signals, and after it, nothing is left to save: they end the process at once. Once a signal
    has ended the verb, others change nothing any more.
    """
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where they are ignored
            # The system's own end comes to a rank in any call, as its launcher may want.
            signal.signal(number, signal.SIG_DFL if "RANK" in os.environ else _end)
    code = main()
    for number in SIGNALS if code > 128 else ():
        signal.signal(number, signal.SIG_IGN)  # Python's own end would fall back to the system's
    raise SystemExit(code)


def _end(number: int, _: Any) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    program()
