"""Which of a launcher's processes this one is, by its environment: known before the ranks have joined.

What the ranks of a process group share is asked of the group instead (`distributed.agree`).
"""

from __future__ import annotations

import os


def launched() -> bool:
    """Return whether a launcher made this process."""
    return any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def first_rank() -> bool:
    """Return whether this process is the first of those that a launcher made, or alone: the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0
