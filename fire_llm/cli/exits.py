"""How a command ends: one message and one exit code for an error, a signal or output that is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

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
    except KeyboardInterrupt as error:  # also one that comes while another end is reported
        code, message = ended(error, next_step)
        report_failure(code, message)
        return code


def _done(work: Callable[[], int | None]) -> int:
    try:
        with _leaving():
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
    """Return the exit code for output that could not be written, other than to a reader that left (`| head`): 0 or 1.

    Args:
        lost: Errors of standard output.
    """
    if not lost:
        return 0
    reason = system_reason(lost[0]) or lost[0].strerror
    report_failure(1, f"the work is done, and what it prints could not be written: {reason}")
    return 1


def _leaving() -> AbstractContextManager[None]:
    """Return what leaves the other ranks at the end, where a launcher started some."""
    if not launched():
        return nullcontext()  # nothing heavy is imported
    from fire_llm.distributed import leaving

    return leaving()
