"""The Hub of Hugging Face where it cannot be reached, as on a compute node: asked once, and then its cache alone."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from fire_llm.core.errors import did_you_mean, first_line

SECONDS = 10.0
"""To wait for the Hub's first answer."""


@functools.cache
def settle_hub() -> None:
    """Find out whether the Hub can be reached; where it cannot, let its cache serve, here and in child processes.

    Left alone, its clients try again for half a minute, for each of a model's files.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of whichever library the installed version asks with
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        sys.stderr.write(
            f"fire-llm: {constants.ENDPOINT} cannot be reached ({first_line(error)}): what is in the Hub's cache is "
            "used\n"
        )


def no_folder(name: str) -> str:
    """Return that there is no folder of a name that was then taken for a Hub id, and which of its neighbours is near.

    Example: `there is no folder 'runs/modle' (did you mean 'runs/model'?)`.
    """
    path = Path(name)
    try:
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        beside = []
    near = did_you_mean(name, beside).strip().replace("Did", "did")
    return f"there is no folder '{name}'" + (f" ({near})" if near else "")
