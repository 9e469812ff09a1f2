"""The Hub out of reach: asked once, then its cache; and what is said of a folder that is not there."""

from __future__ import annotations

import os
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from fire_llm.core.hub import no_folder, settle_hub


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    settle_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield
    settle_hub.cache_clear()


@pytest.mark.parametrize("reached", [True, False])
def test_the_hub_is_asked_once(reached, monkeypatch, capsys):
    asked = []

    def head(url, timeout):
        asked.append(url)
        if not reached:
            raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    settle_hub()
    settle_hub()
    assert asked == [constants.ENDPOINT]
    assert huggingface_hub.is_offline_mode() is not reached
    assert (os.environ["HF_HUB_OFFLINE"] == "1") is not reached  # for processes that are started from here
    told = capsys.readouterr().err
    assert told == "" if reached else "no route to host" in told and "cache is used" in told


def test_a_misspelt_folder_is_told_with_its_neighbour(tmp_path, monkeypatch):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert no_folder("runs/modle") == "there is no folder 'runs/modle' (did you mean 'runs/model'?)"
    assert no_folder("owner/model") == "there is no folder 'owner/model'"
