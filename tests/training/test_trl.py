"""What comes out of a rewritten checkpoint is an ordinary one: it loads, generates, and trains under TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from fire_llm import ResetCallback, dfi, logical_matrices, reset_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog and runs into the wood"


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reset a tiny Llama with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trl")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder / "src")
    tiny_llama(vocab_size=len(tokens)).save_pretrained(folder / "src", max_shard_size="40KB")
    reset_checkpoint(folder / "src", folder / "dst")
    return folder / "dst"


def test_it_loads_and_generates(rewritten: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(rewritten), AutoTokenizer.from_pretrained(rewritten)
    inputs = tokenizer(TEXT, return_tensors="pt")
    out = model.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 5


# TRL itself still uses the name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def train(model: Any, folder: Path, rewritten: Path, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=32, bf16=False,
        seed=0,
    )  # fmt: skip
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
