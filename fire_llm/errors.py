"""The one way a user's mistake is told: a message that names the value, what is allowed and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Report input that the user must change; the command line prints the message alone and exits with 2."""


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest allowed name, or an empty string where none is near."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
