"""Every module can be imported with the installed Python and libraries, one process for all of them."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import fire_llm

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(fire_llm.__path__, "fire_llm.") if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


def test_every_public_name_can_be_imported():
    for name in fire_llm.__all__:
        assert getattr(fire_llm, name) is not None
