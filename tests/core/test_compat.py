"""What is private in the libraries is listed in one place, and an override that nothing would call is refused."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from fire_llm import ContinualTrainer, UserError
from fire_llm.core import compat
from fire_llm.core.compat import TRAINER_ATTRIBUTES, TRAINER_HOOKS, check_trainer, missing_hooks
from fire_llm.experiment import collect as results

TRAINING = Path(compat.__file__).parent.parent / "training"


def private(source: str) -> set[str]:
    """Return the private names that a source reads, sets or calls as attributes."""
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_the_hooks_are_the_methods_that_are_overridden():
    own = [kind for kind in ContinualTrainer.__mro__ if kind.__module__.startswith("fire_llm.")]
    defined = {name for kind in own for name in vars(kind) if not name.startswith("__")}
    # These are what a user calls; no method of `Trainer` has to.
    called = {"train", "hyperparameter_search"}
    assert {name for name in defined if hasattr(Trainer, name)} - called == set(TRAINER_HOOKS)


def test_each_override_says_what_it_does_otherwise():
    assert all(vars(ContinualTrainer)[name].__doc__ for name in TRAINER_HOOKS)


def test_every_private_name_shared_with_the_trainer_is_listed():
    ours = {name for file in TRAINING.glob("*.py") for name in private(file.read_text(encoding="utf-8"))}
    theirs = private(inspect.getsource(Trainer))
    assert (ours & theirs) - set(TRAINER_HOOKS) == set(TRAINER_ATTRIBUTES)


def test_the_installed_trainer_calls_every_hook():
    assert missing_hooks(Trainer) == ()


def trainer_that_calls(names, has=TRAINER_HOOKS):
    """Make a class with the methods `has`, and one more that reads the attributes `names`."""
    made = {}
    exec("\n".join(["def run(self):", *(f"    self.{name}" for name in names)]), made)
    return type("Newer", (), {"run": made["run"], **{name: lambda self: None for name in has}})


@pytest.mark.parametrize("name", ["_get_grad_norm", "training_step", "_tr_loss"])
def test_a_trainer_that_calls_no_such_hook_is_refused(name):
    every = [*TRAINER_HOOKS, *TRAINER_ATTRIBUTES]
    check_trainer(trainer_that_calls(every))
    with pytest.raises(UserError, match=rf"transformers \S+: its Trainer has or calls no {name}\. Install"):
        check_trainer(trainer_that_calls([n for n in every if n != name]))


def test_a_trainer_without_a_hook_is_refused_though_it_reads_the_name():
    every = [*TRAINER_HOOKS, *TRAINER_ATTRIBUTES]
    with pytest.raises(UserError, match="has or calls no _clip_grad_norm"):
        check_trainer(trainer_that_calls(every, [n for n in TRAINER_HOOKS if n != "_clip_grad_norm"]))


def test_a_continual_trainer_is_not_made_of_such_a_trainer(monkeypatch):
    monkeypatch.setattr("fire_llm.training.trainer.Trainer", trainer_that_calls(["compute_loss"]))
    with pytest.raises(UserError, match="has or calls no _clip_grad_norm, _get_grad_norm"):
        ContinualTrainer(None, None, None)


def test_missing_metadata_of_a_library_is_no_error_at_the_end_of_a_run(monkeypatch):
    def version(name):
        if name == "datasets":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(compat, "version", version)
    found = results.versions()
    assert found.datasets is None and found.torch == "1.0"


def test_a_torch_that_keeps_the_precision_of_shards_elsewhere_is_refused_and_nothing_is_changed():
    """A stand-in for a later FSDP2, whose parameters take their dtype from a place that is not known."""
    bf16 = SimpleNamespace(param_dtype=torch.bfloat16)
    parameter = SimpleNamespace(param_dtype=torch.bfloat16, all_gather_outputs=["kept"], _unsharded_param="kept")
    group = SimpleNamespace(fsdp_params=[parameter], mp_policy=bf16, _init_mp_dtypes=lambda: None)
    state = SimpleNamespace(_mp_policy=bf16, _fsdp_param_groups=[group])
    before = dict(vars(parameter))
    with pytest.raises(UserError, match="keeps the precision of FSDP2's shards where it cannot be set"):
        compat.set_fsdp2_policy(state, SimpleNamespace(param_dtype=None))
    assert vars(parameter) == before and state._mp_policy is bf16 and group.mp_policy is bf16
