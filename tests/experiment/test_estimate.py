"""The plan against numbers worked out by hand."""

from __future__ import annotations

import pytest
from support.corpora import TEXTS, corpus_of
from support.models import tiny_llama
from support.recipes import GOOD
from transformers import LlamaConfig, Qwen3Config, RobertaConfig

from fire_llm import UserError, load_recipe
from fire_llm.data import train_tokenizer
from fire_llm.experiment.estimate import LOGITS_HELD, plan, print_plan
from fire_llm.training.loss import SLICES


def test_tokens_flops_disk_and_memory(tmp_path):
    planned = plan(load_recipe(GOOD), tmp_path)
    # gpt-tiny with a vocabulary of 512 and 64 positions: 512·128 + 64·128 + 4·(12·128² + 13·128) + 2·128 parameters.
    parameters = 65_536 + 8_192 + 4 * (196_608 + 1_664) + 256
    assert [row["stage"] for row in planned["stages"]] == ["one/seed-1", "two/base/seed-1", "two/fire/seed-1"]
    for row in planned["stages"]:
        assert row["steps"] == 10 and row["tokens"] == 10_240 and row["state"] == "to do"
        # The table of positions is looked up, not multiplied.
        assert row["flops"] == 10_240 * (6 * (parameters - 8_192) + 12 * 4 * 128 * 64)
    # Three final checkpoints and the two that phase one keeps, each with AdamW's two moments.
    assert planned["disk_bytes"] == 5 * parameters * 12
    assert planned["memory_bytes"] == parameters * 16
    assert planned["stages"][2]["reset"] == "fire, iterations 5, roles attention mlp"


def test_epochs_count_what_the_corpora_hold(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 42_000)
    phase = {"name": "one", "data": {"a": 1.0}, "epochs": 2.0}
    data = {**GOOD, "data_root": str(tmp_path), "corpora": {"a": {"files": "a.txt"}}, "phases": [phase]}
    steps = plan(load_recipe(data), tmp_path)["stages"][0]["steps"]
    assert steps == pytest.approx(2 * 42_000 / 4.2 / 1024, abs=2)
    phase["max_corpus_tokens"] = 2048
    assert plan(load_recipe(data), tmp_path)["stages"][0]["steps"] == 4


def test_a_batch_that_a_checkpoints_context_does_not_divide_is_refused(tmp_path):
    """66 positions hold 64 tokens where they are counted from the padding token, 1."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaConfig(**sizes, vocab_size=512, max_position_embeddings=66, is_decoder=True).save_pretrained(tmp_path)
    data = {**GOOD, "model": {"checkpoint": str(tmp_path)}, "batch": {"tokens_per_step": 132}}
    with pytest.raises(UserError, match="132 does not divide into sequences of 64 tokens on 1 process"):
        plan(load_recipe(data), tmp_path)
    assert plan(load_recipe({**data, "batch": {"tokens_per_step": 128}}), tmp_path)["stages"][0]["tokens"] == 1280


def paper(*overrides):
    return plan(load_recipe("gpt-0.1b/paper", overrides), "nowhere")


def test_the_papers_tokens_hours_and_memory_by_hand():
    planned = paper()
    tokens = [row["tokens"] for row in planned["stages"]]
    # 97,000 steps of 491,520 tokens are 4.77e10; 18,600 are 9.14e9. Three seeds, five arms, three warm starts.
    assert tokens == 3 * [47_677_440_000] + 45 * [9_142_272_000] and sum(tokens) == 554_434_560_000
    # 50,304·768 + 12·(12·768² + 13·768) + 2·768 weights are multiplied, and 1024·768 positions looked up.
    multiplied = 38_633_472 + 12 * (7_077_888 + 9_984) + 1_536
    a_token = 6 * multiplied + 12 * 12 * 768 * 1024
    assert a_token == pytest.approx(8.555e8, rel=1e-3)
    one, a100, h100 = planned["machines"]
    assert [m["name"] for m in planned["machines"]] == ["1×H100", "8×A100", "8×H100"]
    assert a100["hours"] == pytest.approx(554_434_560_000 * a_token / (8 * 312e12 * 0.3) / 3600)
    assert a100["hours"] == pytest.approx(176, abs=1) and one["hours"] == pytest.approx(8 * h100["hours"])
    assert h100["hours"] == pytest.approx(a100["hours"] * 312 / 989.4)
    # 60 sequences a rank and step go in one pass; 480 on one, in 8 of 60. A layer keeps 22 + 16 bytes a unit of width
    # and token, 21.5 GB, and the trunk's output and its gradient 8. 18 bytes a parameter: 12 between steps, 2 in 16
    # bits, and 4 for the buckets of eight, or the gradients of eight passes. 2^29 logits and gradients of 2 bytes, and
    # two of the head's.
    parameters = multiplied + 1024 * 768
    kept = 60 * 1024 * 768 * (12 * 38 + 8)
    assert a100["memory_bytes"] == 18 * parameters + kept + 4 * 2**29 + 8 * 38_633_472 == one["memory_bytes"]
    assert a100["fits"] and a100["would_fit"] is None and one["shards_bytes"] is None
    assert SLICES[1] == LOGITS_HELD == 2**29


def test_machines_are_those_that_the_recipe_can_run_on():
    assert paper("precision=fp32")["machines"] == []
    halved = paper("batch.tokens_per_step=12288")["machines"]  # 12 sequences are none for each of 8
    assert [m["name"] for m in halved] == ["1×H100"]
    whole = paper("precision=fp16")["machines"][1]["memory_bytes"] - paper()["machines"][1]["memory_bytes"]
    assert whole == 8 * 60 * 1024 * 50_304 - 4 * 2**29 - 4 * 38_633_472


def printed(capsys, *arguments):
    print_plan(*arguments)
    return " ".join(capsys.readouterr().out.split())


def test_hours_are_told_where_there_are_any(tmp_path, capsys):
    text = printed(capsys, load_recipe("gpt-0.1b/paper"), tmp_path)
    assert (
        "at 30% of the 16-bit peak, evaluation left out: 1×H100 ≈ 444 h, 26.6 GB a GPU; 8×A100 ≈ 176 h, 26.6 GB" in text
    )
    text = printed(capsys, load_recipe("gpt-0.1b/paper", ["phases.0.steps=60000", "seed=1"]), tmp_path, ["base"])
    # 60,000 + 3·18,600 steps of 491,520 tokens of 8.555e8 operations, at 8·989.4e12·0.3 a second: 5.7 hours.
    assert "8×H100 ≈ 6 h" in text
    assert "of the 16-bit peak" not in printed(capsys, load_recipe(GOOD), tmp_path)


def test_a_phases_own_optimizer_is_told(tmp_path, capsys):
    assert plan(load_recipe(GOOD), tmp_path)["own"] == []
    recipe = load_recipe(
        GOOD,
        [
            "phases.0.optimizer.name=muon",
            "phases.1.optimizer={name: muon, lr: 1.0e-3}",
            "phases.1.optimizer_state=kept",
        ],
    )
    text = printed(capsys, recipe, tmp_path)
    assert "phase one: muon for 16 matrices (786,432 parameters), adamw for the rest" in text
    assert "cosine: up to 0.001 in 10% of the steps (at most 2000), a cosine down to 6e-05; begins with the" in text


LLAMA = LlamaConfig(
    hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128_256, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
QWEN = Qwen3Config(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, vocab_size=151_936, max_position_embeddings=32_768, tie_word_embeddings=True,
)  # fmt: skip


def test_llama_8b_by_hand(tmp_path, capsys):
    """The recipe with the config of Llama-3-8B from a folder, in place of the Hub's."""
    LLAMA.save_pretrained(tmp_path)
    given = [f"model={{config: {tmp_path}, context: 8192}}", "tokenizer.path=owner/name"]
    text = printed(capsys, load_recipe("llama-8b/continue", given), tmp_path / "run")
    # 7.505e9 weights are multiplied; 2385 steps of 4,194,304 tokens, four arms; the forward pass is done twice.
    a_token = 6 * (8_030_261_248 - 128_256 * 4096) + 12 * 32 * 4096 * 8192
    hours = 4 * 2385 * 4_194_304 * a_token * 4 / 3 / (8 * 989.4e12 * 0.3) / 3600
    assert hours == pytest.approx(361, abs=1) and "8×H100 ≈ 361 h" in text
    # A shard, not compiled: 16 bytes of each eighth; 2 of the head, 471,040 bytes of a token in 32 layers, 8 a unit of
    # its output, 2^29 logits of 8, and 6 of the head's gradient: 28.7 GB.
    assert "1×H100 of 80 GB: fits with --accelerate-config fsdp2 and fsdp_offload_params: true: 13 GB" in text
    assert "8×H100 of 80 GB: fits with --accelerate-config fsdp2: 29 GB" in text
    plain = ["gradient_checkpointing=false", "sync_each_batch=false"]
    told = plan(load_recipe("llama-8b/continue", [*given, *plain]), tmp_path / "run")["machines"][2]
    # Whole gradients are added up: 32 GB.
    assert told["would_fit"] == "fits with --accelerate-config fsdp2 and gradient_checkpointing: true: 57 GB"


def test_qwen_17b_trains_on_replicas(tmp_path):
    QWEN.save_pretrained(tmp_path)
    given = [f"model={{config: {tmp_path}, context: 4096}}", "tokenizer.path=owner/name"]
    planned = plan(load_recipe("qwen3-1.7b/continue", given), tmp_path / "run")
    assert len(planned["stages"]) == 8 and planned["stages"][0]["tokens"] == 4769 * 1_048_576
    assert all(machine["fits"] for machine in planned["machines"])


@pytest.mark.parametrize("name", ["llama-8b/continue", "qwen3-1.7b/continue"])
def test_protocols_of_continual_pretraining_pass_with_a_small_checkpoint(name, tmp_path, capsys):
    tokenizer = train_tokenizer([corpus_of(TEXTS)], 300, progress=False)
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    changes = [f"model={{checkpoint: {tmp_path}, context: 64}}", "batch.tokens_per_step=65536"]
    assert "no fault found" in printed(capsys, load_recipe(name, changes), tmp_path / "run")
