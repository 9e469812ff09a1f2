"""End a command with one message and one exit code for an error, a signal or lost output."""

from __future__ import annotations

import os
from collections.abc import Callable

from fire_llm.core.errors import UserError, explained, system_reason
from fire_llm.core.launch import ended, report_failure
from fire_llm.core.ranks import launched


def exit_code(work: Callable[[], int | None], next_step: str) -> int:
    """Do the work of a verb, and return the exit code to end with.

    Args:
        work: Returns the exit code, None for 0.
        next_step: What the user can do after a signal ended the work.
    """
    try:
        return _done(work)
    except KeyboardInterrupt as error:  # it may also come while another error is reported
        code, message = ended(error, next_step)
        report_failure(code, message)
        return code


def _done(work: Callable[[], int | None]) -> int:
    """Do the work of a verb, and report the error that ends it."""
    try:
        if not launched():
            return work() or 0
        from fire_llm.distributed import leaving  # heavy, and needed only where a launcher started other ranks

        with leaving():
            return work() or 0
    except UserError as error:
        report_failure(2, str(error) or explained(error))
        return 2
    except (OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        code = 2 if isinstance(error, (OSError, ModuleNotFoundError)) else 1
        report_failure(code, f"the work failed: {explained(error)}")
        if os.environ.get("FIRE_LLM_DEBUG"):
            raise
        return code


def lost_output(lost: list[OSError]) -> int:
    """Return the exit code 1 if output could not be written, else 0; a reader that left (`| head`) does not count.

    Args:
        lost: The errors of writing to standard output.
    """
    if not lost:
        return 0
    reason = system_reason(lost[0]) or lost[0].strerror
    report_failure(1, f"the work is done, and what it prints could not be written: {reason}")
    return 1
