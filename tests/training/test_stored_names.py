"""Checkpoints whose tensors have other names on the disk than in the model: the experts of a Mixtral, one by one."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import tiny_llama, tiny_mixtral
from support.small_models import SMALL, build
from support.small_others import build_other
from support.tiny_recipe import recipe
from support.training import Samples, losses, train
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.training.restoring import restore_weights

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
    one_expert = tiny_mixtral(num_local_experts=1, num_experts_per_tok=1)
    train(one_expert, tmp_path / "one-expert", max_steps=4)
    for model, folder, said in (
        (tiny_llama(num_hidden_layers=3), "llama", r"lacks 9 of the tensors of Llama.*'model.layers.2"),
        (tiny_llama(num_hidden_layers=1), "llama", r"has 9 tensors, 'model.layers.1.*which the model lacks"),
        (tiny_llama(attention_bias=True), "llama", r"lacks 8 of the tensors"),
        (tiny_llama(intermediate_size=64), "llama", r"has shape \(80, 32\), which does not fit"),
        (
            tiny_llama(tie_word_embeddings=True),
            "llama",
            r"holds two values of 'model.embed_tokens.weight' and 'lm_head",
        ),
        (tiny_mixtral(num_hidden_layers=3), "mixtral", r"lacks 9 of the tensors of Mixtral.*'model.layers.2"),
        (tiny_mixtral(num_hidden_layers=1), "mixtral", r"has \d+ tensors, 'model.layers.1.*which the model lacks"),
        (tiny_mixtral(intermediate_size=64), "mixtral", r"do not fill 'model.layers.0.mlp.experts"),
        (tiny_mixtral(), "one-expert", r"do not fill|does not fit"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match="is of another model than the one that is trained.*" + said):
            train(model, tmp_path / "again", str(tmp_path / folder / "checkpoint-4"))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_module_that_is_none_of_transformers_is_left_to_trainer_where_it_fits(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for names, said in (
        (["0.weight", "0.bias", "1.weight", "1.bias"], None),
        (["0.weight", "0.bias", "1.weight"], r"lacks '1.bias', which the model has"),
        (["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"], r"has '2.bias', which the model lacks"),
    ):
        save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=said) if said else nullcontext():
            assert not restore_weights(model, tmp_path)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {"pixel_values": torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(i)), "labels": i % 5}


def test_a_model_that_is_no_language_model_goes_on_exactly(tmp_path):
    name, settings = "ViTForImageClassification", {"data": Images(), "max_steps": 6, "save_steps": 3}
    whole = train(build_other(name, 0), tmp_path / "whole", keep_last=9, **settings)
    again = train(build_other(name, 1), tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert losses(again) == losses(whole)


def compiled_whole(seed):
    return torch.compile(tiny_llama(seed), backend="eager")


def compiled_layers(seed):
    model = tiny_llama(seed)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


def more(seed):
    model = tiny_mixtral(seed)
    model.extra = nn.Parameter(torch.ones(3))
    return model


def tied(seed):
    model = tiny_mixtral(seed)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def normed(seed):
    model = tiny_mixtral(seed)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


class Unsaved(MixtralForCausalLM):
    """A Mixtral with a parameter that no checkpoint is to hold."""

    _keys_to_ignore_on_save = ("fixed",)

    def __init__(self, config):
        super().__init__(config)
        self.fixed = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)


def unsaved(seed):
    torch.manual_seed(seed)
    return Unsaved(tiny_mixtral(seed).config)


class Tempered(MixtralForCausalLM):
    """A Mixtral that its config alone does not make."""

    def __init__(self, config, temperature):
        super().__init__(config)
        self.temperature = temperature


def tempered(seed):
    model = Tempered(tiny_mixtral(seed).config, 2.0)
    model.load_state_dict(tiny_mixtral(seed).state_dict())
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile, where it compiles a layer
@pytest.mark.parametrize("make", [compiled_whole, compiled_layers, more, tied, normed, unsaved, tempered])
def test_a_model_that_is_more_than_its_config_goes_on_exactly(make, tmp_path):
    settings = {"remove_unused_columns": False, "max_steps": 6, "save_steps": 3}
    whole = train(make(0), tmp_path / "whole", keep_last=9, **settings)
    again = train(make(1), tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert losses(again) == losses(whole)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_causal_lm_is_read_back(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert restore_weights(model, tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
