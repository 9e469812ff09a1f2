"""Checkpoints whose tensors have other names on the disk than in the model: the experts of a Mixtral, one by one."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import tiny_llama, tiny_mixtral
from support.small_models import SMALL, build
from support.tiny_recipe import recipe
from support.training import Samples, losses, train
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.training.sharding import load_weights, stored_otherwise

# The names of the first are stored whole, one by one, in other words, and by a class that nobody registered.
CASES = ["llama", "mixtral", "gpt_neox", "subclass"]


class Scaled(LlamaForCausalLM):
    """A Llama of a user's own, with a parameter that no class of transformers has."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input_ids=None, labels=None, **kwargs):
        found = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        return type(found)({**found, "logits": found.logits * self.temperature})


def tiny(case: str, seed: int) -> nn.Module:
    if case == "mixtral":
        return tiny_mixtral(seed)
    if case == "gpt_neox":
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=97, bos_token_id=0, eos_token_id=0))
    model = tiny_llama(seed)
    return model if case == "llama" else Scaled(model.config)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_as_the_uninterrupted_one(case, tmp_path):
    whole = train(tiny(case, 0), tmp_path / "whole", keep_last=9)
    again = train(tiny(case, 1), tmp_path / "again", str(tmp_path / "whole" / "checkpoint-4"))
    with safe_open(tmp_path / "whole" / "checkpoint-4" / "model.safetensors", "pt") as stored:
        assert (set(stored.keys()) - whole.model.state_dict().keys() != set()) == (case in ("mixtral", "gpt_neox"))
    assert losses(again) == losses(whole)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_that_was_cut_off_ends_as_the_whole_one(tmp_path):
    model = {
        "architecture": "mixtral", "context": 16, "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    file = recipe(tmp_path, model=model, keep_last=9)
    for name in ("whole", "cut"):
        run_recipe(load_recipe(file), tmp_path / name, progress=False)
    for stage, last in (("first", 10), ("second/fire", 8)):
        shutil.rmtree(tmp_path / "cut" / stage / "seed-1" / f"checkpoint-{last}")
    (tmp_path / "cut" / "results.json").unlink()
    run_recipe(load_recipe(file), tmp_path / "cut", progress=False)
    for stage, last in (("first", 10), ("second/fire", 8)):
        one, other = (tmp_path / name / stage / "seed-1" / f"checkpoint-{last}" for name in ("whole", "cut"))
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_best_model_is_what_its_checkpoint_holds(tmp_path):
    held_out = torch.utils.data.Subset(Samples(), range(100, 104))
    settings = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "keep_last": 9}
    trainer = train(
        tiny_mixtral(), tmp_path, given={"eval_dataset": held_out}, metric_for_best_model="eval_loss", **settings
    )
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    for (name, one), (_, other) in zip(best.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tiny_llama(), tmp_path / "llama", max_steps=4)
    train(tiny_mixtral(), tmp_path / "mixtral", max_steps=4)
    for model, folder, said in (
        (tiny_llama(num_hidden_layers=3), "llama", r"lacks 9 tensors, 'model.layers.2.*which the model has"),
        (tiny_llama(num_hidden_layers=1), "llama", r"has 9 tensors, 'model.layers.1.*which the model lacks"),
        (tiny_llama(attention_bias=True), "llama", r"lacks 8 tensors, '.*which the model has"),
        (tiny_mixtral(num_hidden_layers=3), "mixtral", r"lacks 9 tensors, 'model.layers.2.*which the model has"),
        (tiny_mixtral(num_hidden_layers=1), "mixtral", r"has 9 tensors, 'model.layers.1.*which the model lacks"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match=said):
            train(model, tmp_path / "again", str(tmp_path / folder / "checkpoint-4"))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_causal_lm_is_read_back(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    if stored_otherwise(model, tmp_path):
        load_weights(model, tmp_path)
    else:
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
