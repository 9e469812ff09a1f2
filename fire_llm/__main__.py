"""Run the command line as a program: `fire-llm`, `python -m fire_llm`, `accelerate launch -m fire_llm`."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

from fire_llm.cli import main
from fire_llm.core.signals import SIGNALS


def program() -> NoReturn:
    """Run one verb and end the process with its exit code.

    Before and after the work of a verb there is nothing to save, so signals end the process at once. After a signal has
    ended the verb, further signals are ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # ignored ones stay ignored
            # The system's default ends a rank even inside a library's call, as its launcher may need.
            signal.signal(number, signal.SIG_DFL if "RANK" in os.environ else _end)
    code = main()
    for number in SIGNALS if code > 128 else ():
        signal.signal(number, signal.SIG_IGN)  # while Python shuts down, it restores the system's default
    raise SystemExit(code)


def _end(number: int, _: Any) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    program()
