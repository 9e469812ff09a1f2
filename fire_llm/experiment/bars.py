"""Hide the progress bars that libraries draw by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def library_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of transformers and of the Hub while the block runs, unless they are to be shown."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, if not marked so
        are_progress_bars_disabled,
        disable_progress_bars,
    )
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    hub_shows_bars = not are_progress_bars_disabled()
    with _hub_warnings_ignored():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with _hub_warnings_ignored():
            logging.enable_progress_bar()
        if not hub_shows_bars:
            disable_progress_bars()


@contextmanager
def _hub_warnings_ignored() -> Iterator[None]:
    """Ignore the Hub's warning that HF_HUB_DISABLE_PROGRESS_BARS already decides about its own bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
