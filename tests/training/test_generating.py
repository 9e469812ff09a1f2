"""Text that a model writes while it trains: transformers' own greedy text, and training as without it."""

from __future__ import annotations

import os

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from support.ranks import Raised, run_ranks
from support.training import FSDP2, train
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fire_llm import UserError
from fire_llm.evaluation.generation import Prompts, continuations
from fire_llm.training import EarlyStopCallback, EvaluationSet, GenerationCallback, ResetCallback
from fire_llm.training.generating import BEFORE, SAMPLES


def letters() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a character, 97 of them, the first of which ends a text."""
    words = {"<end>": 0, **{chr(0x100 + i): i for i in range(1, 97)}}
    tokenizer = Tokenizer(models.BPE(words, []))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def prompts(texts=("\u0105\u0106", ""), new=6, **how) -> Prompts:
    return Prompts.of(list(texts), letters(), 16, max_new_tokens=new, **how)


def without_cache(model, ids, new):
    """Write greedily by whole forward passes."""
    model.eval()
    read = list(ids)
    with torch.no_grad():
        for _ in range(new):
            read.append(int(model(input_ids=torch.tensor([read]), use_cache=False).logits[0, -1].argmax()))
            if read[-1] == 0:
                break
    return letters().decode(read[len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_the_text_is_that_of_whole_forward_passes_and_the_model_is_left_alone(build):
    model = build().train()
    model.transformer.h[0].eval() if hasattr(model, "transformer") else model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    model.generation_config.repetition_penalty = 9.0  # the checkpoint's own settings do not count
    settings, config, state = model.generation_config, model.config.to_dict(), torch.get_rng_state()
    found = continuations(model, prompts())
    drawn = continuations(model, prompts(temperature=3.0, seed=4))
    assert torch.equal(torch.get_rng_state(), state) and model.generation_config is settings
    assert [module.training for module in model.modules()] == modes and model.config.to_dict() == config
    assert found == [without_cache(model, ids, 6) for ids in prompts().ids]
    assert drawn == continuations(model, prompts(temperature=3.0, seed=4)) != found
    assert drawn != continuations(model, prompts(temperature=3.0, seed=5))


def test_prompts_that_do_not_fit_are_refused_with_the_numbers():
    assert prompts([""]).ids == [[0]]
    assert prompts(["\u0105" * 9]).ids[0][:2] == [0, 5]
    with pytest.raises(UserError, match=r"prompts\[1\].* takes 11 tokens.*6 new ones.*context, 16: at most 5 are left"):
        prompts(["", "\u0105" * 10])
    with pytest.raises(UserError, match=r"takes 17 tokens.*shorten it"):
        prompts(["\u0105" * 16])


SETS = {"c": EvaluationSet(torch.arange(200) % 97, 800, 0)}
EVALUATED = {
    "sets": SETS,
    "max_steps": 7,
    "save_steps": 100,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "eval_context": 16,
    "eval_on_start": True,
}


def written(trainer) -> list[tuple[int, bool]]:
    return [(e["step"], e[BEFORE]) for e in trainer.state.log_history if SAMPLES in e]


def test_training_is_as_without_it_and_each_time_is_noted_once_resumed_or_not(tmp_path):
    """With dropout, which random numbers decide, in every run."""
    dropout = {"resid_pdrop": 0.3}

    def run(name, every, resume=None, sample=True, **changes):
        callback = GenerationCallback(prompts(), every)
        around = [callback.before_reset(), ResetCallback("fire"), callback] if sample else [ResetCallback("fire")]
        return train(tiny_gpt2(**dropout), tmp_path / name, resume, around, keep_steps=[4], **EVALUATED, **changes)

    plain, often = run("plain", None, sample=False), run("often", 3)
    assert all(map(torch.equal, plain.model.parameters(), often.model.parameters()))
    assert written(often) == [(0, True), (0, False), (3, False), (6, False), (7, False)]
    assert written(run("evaluated", None)) == [(0, True), (0, False), (5, False), (7, False)]
    texts = [e[SAMPLES] for e in often.state.log_history if SAMPLES in e]
    again = run("again", 3, str(tmp_path / "often" / "checkpoint-4"))
    assert [e[SAMPLES] for e in again.state.log_history if SAMPLES in e] == texts
    assert texts[0] == continuations(tiny_gpt2(), prompts()) and texts[0] != texts[1]
    assert texts[-1] == continuations(again.model, prompts())
    # Where an evaluation ends training, the checkpoint of that step holds what was written there.
    callback = GenerationCallback(prompts(), 100)
    stop = EarlyStopCallback("c", patience=1, min_delta=9.0)
    assert written(train(tiny_gpt2(), tmp_path / "stopped", None, [stop, callback], **EVALUATED)) == [
        (0, False),
        (5, False),
    ]


def on_ranks(rank, world, folder, environment):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6 // world, "max_steps": 2}
    trainer = train(tiny_gpt2(), folder, None, [GenerationCallback(prompts(), 1)], **split)
    return [e[SAMPLES] for e in trainer.state.log_history if SAMPLES in e]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["replicas", "shards"])
def test_all_ranks_write_what_one_process_writes(environment, tmp_path):
    alone = train(tiny_gpt2(), tmp_path / "one", None, [GenerationCallback(prompts(), 1)], max_steps=2)
    texts = [e[SAMPLES] for e in alone.state.log_history if SAMPLES in e]
    assert len(texts) == 3
    for told in run_ranks(2, on_ranks, tmp_path, tmp_path / "two", environment):
        assert not isinstance(told, Raised) and told == texts
