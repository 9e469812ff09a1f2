"""The Hub of Hugging Face: tried once, and replaced by its cache where it cannot be reached, as on compute nodes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fire_llm.core.errors import UserError, did_you_mean, first_line

SECONDS = 10.0
"""How long to wait for the Hub's first answer."""


@functools.cache
def settle_hub() -> None:
    """Try to reach the Hub; where that fails, use its cache alone, here and in child processes.

    Otherwise its clients would try for half a minute, for each of a model's files.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # the installed version decides which library raises
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        sys.stderr.write(
            f"fire-llm: {constants.ENDPOINT} cannot be reached ({first_line(error)}): what is in the Hub's cache is "
            "used\n"
        )


def no_folder(name: str) -> str:
    """Return a message that there is no folder of a name, taken for a Hub id then, and the name of a similar one.

    Example: `there is no folder 'runs/modle' (did you mean 'runs/model'?)`.
    """
    path = Path(name)
    try:
        neighbours = [str(p) for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        neighbours = []
    near = did_you_mean(name, neighbours).strip().replace("Did", "did")
    return f"there is no folder '{name}'" + (f" ({near})" if near else "")


@contextmanager
def asking_hub(name: str) -> Iterator[None]:
    """Turn all errors of the Hub's clients about a model into one message; none is a fault of this program.

    Raises:
        UserError: It is gated, there is none, or the Hub, or without a network its cache, does not give it.
    """
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    settle_hub()
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"'{name}' is gated: accept its terms on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{no_folder(name)} and no Hub model of that name: check the spelling; for a private one, `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{no_folder(name)}, and the Hub's cache, which is all there is without a network, holds no model of that "
            "name: check the spelling, or download it first: hf download"
        ) from error
    except Exception as error:  # the Hub's clients raise dozens of kinds
        raise UserError(
            f"{no_folder(name)}, and the Hub could not be asked for a model of that name: {first_line(error)}"
        ) from error
