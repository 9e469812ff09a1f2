"""What is private in the libraries is listed in one place, and an override that nothing would call is refused."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from transformers import Trainer

from fire_llm import ContinualTrainer, UserError, compat, results
from fire_llm.compat import TRAINER_ATTRIBUTES, TRAINER_HOOKS, check_trainer, missing_hooks

PACKAGE = Path(compat.__file__).parent


def private(source: str) -> set[str]:
    """Return the private names that a source reads, sets or calls as attributes."""
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_the_hooks_are_the_private_methods_that_are_overridden():
    own = [kind for kind in ContinualTrainer.__mro__ if kind.__module__.startswith("fire_llm.")]
    defined = {name for kind in own for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in defined if hasattr(Trainer, name)} == set(TRAINER_HOOKS)


def test_every_private_name_shared_with_the_trainer_is_listed():
    ours = {name for file in (PACKAGE / "trainer").glob("*.py") for name in private(file.read_text(encoding="utf-8"))}
    theirs = private(inspect.getsource(Trainer))
    assert ours & theirs - set(TRAINER_HOOKS) == set(TRAINER_ATTRIBUTES)


def test_the_installed_trainer_calls_every_hook():
    assert missing_hooks(Trainer) == ()


@pytest.mark.parametrize("name", ["_get_grad_norm", "_tr_loss"])
def test_a_trainer_that_calls_no_such_hook_is_refused(name, monkeypatch):
    class Newer:
        """Have every hook, and call them all but one."""

    names = {*TRAINER_HOOKS, *TRAINER_ATTRIBUTES} - {name}
    exec("def run(self):\n" + "\n".join(f"    self.{n}" for n in names), calls := {})
    Newer.run = calls["run"]
    for hook in TRAINER_HOOKS:
        setattr(Newer, hook, lambda self: None)
    with pytest.raises(UserError, match=rf"transformers \S+: its Trainer has or calls no {name}\. Install"):
        check_trainer(Newer)


def test_missing_metadata_of_a_library_is_no_error_at_the_end_of_a_run(monkeypatch):
    def version(name):
        if name == "datasets":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(compat, "version", version)
    found = results.versions()
    assert found["datasets"] is None and found["torch"] == "1.0"
