"""Recycling where blocks share their weights: units are judged by what they do in every block, or it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_llama
from support.small_models import build
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from fire_llm import UserError
from fire_llm.training.recycling import RecyclingCallback


def albert() -> nn.Module:
    """Build a model of one block that is run three times."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "embedding_size": 16}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=96, num_hidden_layers=3, **sizes))


def zamba() -> nn.Module:
    """Build a model whose second and third layer each have an MLP module, of the same weights."""
    return build("zamba")


def llama() -> nn.Module:
    """Build a model whose two layers are one module, under two names."""
    model = tiny_llama()
    model.model.layers[1] = model.model.layers[0]
    return model


def begun(model: nn.Module) -> RecyclingCallback:
    callback = RecyclingCallback("redo", seed=0, every=1, threshold=0.9)
    arguments = SimpleNamespace(n_gpu=0, torch_compile=False)
    callback.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=model)
    return callback


@pytest.mark.parametrize(
    ("make", "readers"),
    [
        (albert, ["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"]),
        (llama, ["model.layers.0.mlp.down_proj"]),
        (zamba, [f"model.layers.{layer}.shared_transf.feed_forward.down_proj" for layer in (1, 2)]),
    ],
)
def test_units_of_shared_weights_are_judged_by_all_of_their_uses(make, readers) -> None:
    model = make().train()
    seen: list[torch.Tensor] = []
    for name in readers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    callback = begun(model)
    (layer,), (recycler,) = callback.work.layers, callback.work.recyclers
    assert [*layer.readers] == [model.get_submodule(name) for name in readers]
    callback.on_step_begin(None, SimpleNamespace(global_step=0), None)
    model(input_ids=torch.arange(24).view(2, 12), use_cache=False)
    activations = torch.stack(seen).abs().flatten(0, -2)
    assert len(activations) == len(seen) * 24 and len(seen) > 1
    assert recycler.sums[-1] == len(activations)
    torch.testing.assert_close(recycler.sums[:-1], activations.sum(0))
    optimizer = torch.optim.SGD(model.parameters())
    callback.on_step_end(None, SimpleNamespace(global_step=1), None, optimizer=optimizer)
    stale = activations.mean(0) <= 0.9 * activations.mean()
    assert callback.recycled == stale.sum() > 0
    assert torch.equal((model.get_submodule(readers[-1]).weight == 0).all(0), stale)
    callback.on_train_end(None, None, None)
    assert all(len(model.get_submodule(name)._forward_pre_hooks) == 1 for name in readers)


def test_blocks_that_share_a_part_of_their_weights_are_refused() -> None:
    model = zamba()
    first, second = (model.model.layers[number].shared_transf.feed_forward for number in (1, 2))
    second.up_proj.weight = nn.Parameter(first.up_proj.weight.detach().clone())
    with pytest.raises(UserError, match=r"cannot reach .*: ZambaMLP shares a part of its weights with another block"):
        begun(model)
