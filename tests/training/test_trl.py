"""What comes out of a rewritten checkpoint is an ordinary one: it loads, generates, and trains under TRL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_llama
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    TrainerCallback,
)

from fire_llm import ResetCallback, dfi, fire_, logical_matrices, reset_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog and runs into the wood"

# TRL itself still uses the name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reset a tiny Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "src")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "src", max_shard_size="40KB")
    reset_checkpoint(folder / "src", folder / "dst")
    return folder / "dst"


def test_it_loads_and_generates(rewritten: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(rewritten), AutoTokenizer.from_pretrained(rewritten)
    inputs = tokenizer(TEXT, return_tensors="pt")
    out = model.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 5


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, "seed": 0, "gradient_checkpointing": False, **changes,
    }  # fmt: skip


def train(model: Any, folder: Path, rewritten: Path, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**settings(folder, max_steps=12, per_device_train_batch_size=4, max_length=32))
    data = Dataset.from_dict({"text": [TEXT] * 16})
    tokenizer = AutoTokenizer.from_pretrained(rewritten)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    return trainer


def test_it_goes_on_learning_under_trl(rewritten: Path, tmp_path: Path) -> None:
    trainer = train(str(rewritten), tmp_path, rewritten, [])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5


def test_the_callback_resets_inside_trls_trainer(rewritten: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(rewritten)
    with torch.no_grad():
        for matrix in logical_matrices(model):
            matrix.write_(matrix.read() @ torch.diag(torch.linspace(0.1, 3, matrix.shape[1])))
    before = sum(dfi(m.read()) for m in logical_matrices(model))
    callback = ResetCallback({"method": "fire", "solver": "polar", "scale": "none"}, at_steps=[6])
    trainer = train(model, tmp_path, rewritten, [callback])
    (report,) = callback.reports
    assert len(report.touched) == 14 and report.optimizer_states_cleared == 14
    assert sum(t.dfi_after or 0 for t in report.touched) < 1e-3 * before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and min(losses[6:]) < losses[0]


class Noting(TrainerCallback):
    """Note the weights right after the callback before it, at each step's end, and how often training began."""

    def __init__(self) -> None:
        self.began: list[dict[str, Tensor]] = []
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.began.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1


def pairs() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["the fox"] * 4, "chosen": [" jumps"] * 4, "rejected": [" sleeps"] * 4})


def sft(folder: Path, tokenizer: Any, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        tiny_llama(vocab_size=257), SFTConfig(**settings(folder, max_length=16)),
        train_dataset=Dataset.from_dict({"text": [TEXT] * 4}), processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


def dpo(folder: Path, tokenizer: Any, callbacks: list[Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        tiny_llama(vocab_size=257), tiny_llama(vocab_size=257), args=DPOConfig(**settings(folder, max_length=32)),
        train_dataset=pairs(), processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


def grpo(folder: Path, tokenizer: Any, callbacks: list[Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def weight(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text))) for text in completions]

    return GRPOTrainer(
        tiny_llama(vocab_size=257), reward_funcs=weight, processing_class=tokenizer, callbacks=callbacks,
        args=GRPOConfig(**settings(folder, num_generations=2, max_completion_length=4)),
        train_dataset=pairs().select_columns(["prompt"]),
    )  # fmt: skip


def reward(folder: Path, tokenizer: Any, callbacks: list[Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    config = tiny_llama(vocab_size=257).config
    config.num_labels, config.pad_token_id = 1, 0
    return RewardTrainer(
        LlamaForSequenceClassification(config), args=RewardConfig(**settings(folder, max_length=32)),
        train_dataset=pairs().remove_columns("prompt"), processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("make", [sft, dpo, grpo, reward])
def test_each_of_trls_trainers_begins_with_the_reset_weights(make: Any, tmp_path: Path) -> None:
    """Once, as `fire_` makes them, and training goes on from there."""
    reset, noting = ResetCallback("fire", iterations=5), Noting()
    trainer = make(tmp_path, byte_tokenizer(), [reset, noting])
    wanted = copy.deepcopy(trainer.model)
    fire_(wanted, iterations=5)
    trainer.train()
    ((report,), (began,)) = reset.reports, noting.began
    assert len(report.touched) == 14 and noting.steps == 2 == trainer.state.global_step
    for name, p in wanted.named_parameters():
        assert torch.equal(began[name], p), name
    moved = [not torch.equal(began[name], p) for name, p in trainer.model.named_parameters()]
    assert any(moved)


def test_the_heads_of_classifiers_are_heads() -> None:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = 3
    for kind, head in (
        (LlamaForSequenceClassification, "score.weight"), (LlamaForTokenClassification, "score.weight"),
        (LlamaForQuestionAnswering, "qa_outputs.weight"),
    ):  # fmt: skip
        model = kind(config)
        assert [m.name for m in logical_matrices(model, ["lm_head"])] == [head]
        before = model.get_parameter(head).clone()
        assert len(fire_(model).touched) == 14 and torch.equal(model.get_parameter(head), before)
