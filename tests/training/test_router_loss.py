"""The loss of a mixture's routers, where the config asks for it, against the class's own and by hand."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_mixtral
from support.ranks import run_ranks
from support.small_models import build
from support.training import FSDP2, Samples, losses, train
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fire_llm import UserError
from fire_llm.core.compat import checkpointing
from fire_llm.training import loss as sliced
from fire_llm.training.loss import SummedLoss, router_loss

SPLITS = {"one": (6, 1), "three": (2, 3)}
"""Sequences a micro-batch, and micro-batches a step."""
KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "jamba", "jetmoe", "phimoe", "gpt_oss", "dbrx"]


@pytest.fixture(params=["slices", "whole"])
def cut(request, monkeypatch):
    if request.param == "slices":
        monkeypatch.setattr(sliced, "SLICE", 97 * 7)
        monkeypatch.setattr(sliced, "WHOLE", 97 * 7)


def mixture(seed: int = 0, **settings) -> MixtralForCausalLM:
    return tiny_mixtral(seed, output_router_logits=True, router_aux_loss_coef=0.5, **settings)


def step_by_hand(rows: int, passes: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of the first step and its gradients: mean NLL and, by tokens, the mean of the passes' balance."""
    model = mixture().train()
    total = torch.zeros(())
    for number in range(passes):
        samples = [Samples()[number * rows + i] for i in range(rows)]
        ids, labels = (torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels"))
        found = model.model(input_ids=ids, output_router_logits=True)
        nll = F.cross_entropy(model.lm_head(found.last_hidden_state).flatten(0, 1), labels.flatten())
        total = total + (nll + 0.5 * load_balancing_loss_func(found.router_logits, 3, 2)) / passes
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_step_is_that_by_hand(split, cut, tmp_path):
    rows, passes = SPLITS[split]
    wanted, gradients = step_by_hand(rows, passes)
    found: dict[str, torch.Tensor] = {}

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            found.update({name: p.grad.clone() for name, p in self.named})

    model = mixture()
    Seen.named = list(model.named_parameters())
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes, "max_steps": 1}
    given = {"optimizers": (Seen(model.parameters(), lr=0.1), None)}
    trainer = train(model, tmp_path, given=given, max_grad_norm=0, **settings)
    assert losses(trainer) == [pytest.approx(wanted, rel=1e-6)]
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_what_the_class_adds(name):
    model = build(name)
    config = model.config.get_text_config()
    config.output_router_logits = True
    ids = torch.arange(32).view(2, 16) % 96
    with torch.no_grad():
        try:
            outputs = model(input_ids=ids, labels=ids, use_cache=False)
        except AttributeError:  # GraniteMoe and DBRX before 5.18, whose routers' outputs are not kept
            pytest.skip(f"{name} cannot compute its own loss of routers in this version")
        alone = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    if outputs.aux_loss is None:
        pytest.skip(f"{name} has no loss of routers in this version")
    assert router_loss(model, outputs).item() == pytest.approx((outputs.loss - alone).item(), rel=1e-4, abs=2e-6)
    config.output_router_logits = False
    assert router_loss(model, outputs) is None


def test_nothing_is_added_unless_the_config_asks(cut, tmp_path):
    asked, not_asked = (
        SummedLoss(tiny_mixtral(output_router_logits=on, router_aux_loss_coef=0.5), torch.no_grad)
        for on in (True, False)
    )
    sample = Samples()[0]
    one, other = (
        loss(loss.model, sample["labels"][None], input_ids=sample["input_ids"][None]) for loss in (asked, not_asked)
    )
    assert one.item() > other.item() + 16 * 0.4  # each of the 16 tokens, and a balance is at least 1


def test_a_model_that_gives_none_is_refused(tmp_path):
    class Silent(MixtralForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return super().forward(input_ids=input_ids, **{**kwargs, "output_router_logits": False})

    with pytest.raises(UserError, match=r"output_router_logits.*Silent gives none"):
        train(Silent(mixture().config), tmp_path, max_steps=1)


def _ranks_train(rank, world, folder, environment):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    return losses(train(mixture(), folder, **settings))


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["replicas", "shards"])
def test_two_ranks_train_as_one_process_does(environment, cut, tmp_path):
    alone = losses(
        train(mixture(), tmp_path / "one", per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=3)
    )
    found = run_ranks(2, _ranks_train, tmp_path, tmp_path / "two", environment)
    assert found[0] == pytest.approx(alone, rel=1e-5), found


def test_checkpointed_activations_give_the_same(cut, tmp_path):
    plain = losses(train(mixture(), tmp_path / "plain", max_steps=2))
    assert losses(train(mixture(), tmp_path / "again", max_steps=2, **checkpointing(True))) == plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_trunk_gives_the_same(cut, tmp_path):
    plain = losses(train(mixture(), tmp_path / "plain", max_steps=2))
    assert losses(train(mixture(), tmp_path / "again", max_steps=2, torch_compile=True)) == pytest.approx(plain, 1e-5)
