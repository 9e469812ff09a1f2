"""Optimizers behind wrappers, and several of them: a reset clears the states wherever they are kept."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from support.models import tiny_gpt2
from support.ranks import run_ranks
from torch import nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from fire_llm import Recycling, UserError, apply_reset, fire_
from fire_llm.architectures.matrices import hidden_matrices
from fire_llm.distributed import optimizer_states
from fire_llm.training.beginning import Beginning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own use of torch.jit
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer, _NamedOptimizer


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


class Copied:
    """Wrap as Lightning does: what the wrapped optimizer had when it was wrapped stands for it, its state included."""

    def __init__(self, optimizer):
        self.__dict__.update(vars(optimizer))
        self._optimizer = optimizer


class Slow(torch.optim.Optimizer):
    """Keep a state of its own beside that of the wrapped optimizer, as Lookahead does."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer

    def step(self):
        self.inner.step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())


def copied(model):
    wrapper = Copied(optimizer := adam(model.parameters()))
    optimizer.load_state_dict(optimizer.state_dict())  # puts another state in the place of the first
    return wrapper, optimizer.step


def slow(model):
    wrapper = Slow(adam(model.parameters()))
    return wrapper, wrapper.step


def accelerated(model):
    wrapper = Accelerator(cpu=True).prepare_optimizer(adam(model.parameters()))
    return wrapper, wrapper.optimizer.step


def averaged(model):
    wrapper = PostLocalSGDOptimizer(adam(model.parameters()), averager=None)
    return wrapper, wrapper.optim.step


def named(model):
    wrapper = _NamedOptimizer(dict(model.named_parameters()), adam)
    return wrapper, wrapper._optimizer.step


def layer_by_layer(model):
    """As transformers' GaLore takes steps in hooks of parameters, and shows an optimizer of a number of no use."""
    each = {p: adam([p]) for p in model.parameters()}
    return LayerWiseDummyOptimizer(each), lambda: [one.step() for one in each.values()]


def several(model):
    hidden = hidden_matrices(model)
    body = [p for name, p in model.named_parameters() if name in hidden]
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    each = [adam(rest), adam(body)]
    return each, lambda: [one.step() for one in each]


def stepped(model, make):
    """Return the optimizer that is given to a reset, one step taken."""
    given, step = make(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step()
    return given


def known(model, given):
    return {name for name, p in model.named_parameters() if any(p in state for state in optimizer_states(given))}


WRAPPERS = [accelerated, averaged, named, layer_by_layer, copied, slow, several]


@pytest.mark.parametrize("make", WRAPPERS)
def test_states_behind_wrappers_and_of_several_optimizers_are_cleared(make):
    model = tiny_gpt2()
    given = stepped(model, make)
    every = {name for name, _ in model.named_parameters()}
    assert known(model, given) == every
    report = fire_(model, optimizer=given, exclude=[r"h\.0\.attn"])
    touched = {t.parameter for t in report.touched}
    assert report.optimizer_states_cleared == len(touched) == 6
    assert known(model, given) == every - touched


@pytest.mark.parametrize("make", WRAPPERS)
def test_recycling_zeroes_moments_behind_wrappers(make):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    if make is several:
        optimizers = [adam(model[0].parameters()), adam(model[2].parameters())]
        given = stepped(model, lambda _: (optimizers, lambda: [one.step() for one in optimizers]))
    else:
        given = stepped(model, make)
    recycling = Recycling(model, "redo", hidden=[("0", "2")], every=1)
    if make is slow:  # weights, which 0 would not clear
        with pytest.raises(UserError, match=r"'slow' of .* is not a moment that is known"):
            recycling._work.renew({0: torch.tensor([1])}, 1, given)
        return
    recycling._work.renew({0: torch.tensor([1])}, 1, given)
    for state in optimizer_states(given):
        for p, rows in ((model[0].weight, 1), (model[2].weight, (slice(None), 1))):
            moments = [t for key, t in state.get(p, {}).items() if key.startswith("exp_")]
            assert all(not t[rows].any() and t.any() for t in moments)
    model(torch.ones(2, 3))
    recycling.step(given)


def divided(model):
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    return optimizer, optimizer.step


def shared(rank, world):
    model = tiny_gpt2()
    given = stepped(model, divided)
    before = known(model, given)
    report = fire_(model, optimizer=given)
    return before, known(model, given), {t.parameter for t in report.touched}, report.optimizer_states_cleared


@pytest.mark.parametrize("world", [1, 2])
def test_each_rank_clears_its_share_of_the_states_that_replicas_divide(world, tmp_path):
    results = run_ranks(world, shared, tmp_path)
    names = {name for name, _ in tiny_gpt2().named_parameters()}
    assert sorted(name for before, *_ in results for name in before) == sorted(names)
    for before, after, touched, cleared in results:
        assert touched == {*hidden_matrices(tiny_gpt2())}
        assert after == before - touched and cleared == len(before & touched) > 0


def test_several_optimizers_none_of_which_trains_what_is_reset_are_refused():
    model = tiny_gpt2()
    hidden = hidden_matrices(model)
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    before = copy.deepcopy(model.state_dict())
    for given, says in (
        ([adam(rest[:2]), adam(rest[2:])], "they train none of the weights .* leave it out"),
        (adam(rest), "it trains none of the weights .* leave it out"),
        ([], "they train none of the weights"),
        ([adam(model.parameters()), 5], "optimizer: a int is given"),
    ):
        with pytest.raises(UserError, match=says):
            apply_reset(model, "fire", optimizer=given)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("make", [accelerated, averaged, slow])
def test_a_training_that_begins_again_has_the_moments_of_its_beginning(make):
    """With `auto_find_batch_size`: none here, behind a wrapper too."""
    model = tiny_gpt2()
    given, step = make(model)
    arguments = SimpleNamespace(auto_find_batch_size=True)
    beginning = Beginning()
    assert not beginning.again(arguments, SimpleNamespace(global_step=0, train_batch_size=4), model, given)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step()
    assert known(model, given)
    assert beginning.again(arguments, SimpleNamespace(global_step=0, train_batch_size=2), model, given)
    assert not known(model, given)
