"""How a command ends: one message and one exit code for an error, a signal or a reader that left."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from fire_llm.core.errors import UserError
from fire_llm.core.launch import ended, report_failure
from fire_llm.core.ranks import launched


def exit_code(work: Callable[[], int | None], next_step: str) -> int:
    """Do the work of a verb, and return the exit code to end with.

    Args:
        work: Returns the exit code, None for 0.
        next_step: What the user can do after a signal ended the work.
    """
    try:
        with _leaving():
            return work() or 0
    except UserError as error:
        report_failure(2, str(error))
        return 2
    except KeyboardInterrupt as error:
        code, message = ended(error, next_step)
        report_failure(code, message)
        return code
    except BrokenPipeError:
        # The reader of the output left (`| head`): no error; keep the interpreter from reporting one at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        report_failure(1, f"the work failed: {error}")
        if os.environ.get("FIRE_LLM_DEBUG"):
            raise
        return 1
    return 0


def _leaving() -> AbstractContextManager[None]:
    """Return what leaves the other ranks at the end, where a launcher started some."""
    if not launched():
        return nullcontext()  # nothing heavy is imported
    from fire_llm.distributed import leaving

    return leaving()
