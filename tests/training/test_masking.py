"""Documents packed into one block are kept apart: positions start again, and logits are those of documents alone."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.models import tiny_gpt2, tiny_llama
from support.small_models import build, shrink
from transformers import AutoModelForCausalLM

from fire_llm import ContinualTrainer, UserError, load_recipe, perplexity, run_recipe
from fire_llm.data import Mixture, TokenFile
from fire_llm.data.documents import Boundaries
from fire_llm.data.tokens import seal
from fire_llm.training import ContinualArguments
from fire_llm.training.masking import check_document_mask

END = 0


def token_file(folder: Path, lengths: list[int]) -> TokenFile:
    """Write a token file of documents of given lengths, each followed by the end-of-text token, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    tokens = np.concatenate([np.append(rng.integers(1, 97, n), END) for n in lengths]).astype(np.uint16)
    ends = np.zeros((len(lengths), 3), dtype=np.uint64)
    ends[:, 0] = np.cumsum(np.asarray(lengths) + 1)
    tokens.tofile(folder / "tokens.bin")
    ends.tofile(folder / "documents.bin")
    meta = {"dtype": "uint16", "n_tokens": len(tokens), "n_bytes": 0, "n_words": 0, "n_documents": len(lengths)}
    seal(folder, meta)
    return TokenFile.open(folder)


def counted(tokens: np.ndarray) -> list[int]:
    """Count positions token by token: 0 at an end-of-text token, which opens the next document, and at the start."""
    places: list[int] = []
    for token in tokens:
        places.append(0 if token == END or not places else places[-1] + 1)
    return places


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), start=st.integers(0, 200), length=st.integers(1, 80)
)
def test_positions_start_again_at_every_document(tmp_path_factory, lengths, start, length):
    source = token_file(tmp_path_factory.mktemp("tokens") / "t", lengths)
    start %= source.n_tokens
    length = min(length, source.n_tokens - start)
    found = Boundaries(source).positions(start, length)
    assert found.dtype == np.int64 and found.tolist() == counted(source.tokens[start : start + length])


def mixture(folder: Path, lengths: list[int], **options) -> Mixture:
    settings = {"context": 16, "seed": 3, "phase": "p", "document_positions": True, **options}
    return Mixture({"c": token_file(folder, lengths)}, {"c": 1.0}, **settings)


def test_samples_hold_positions_and_are_otherwise_what_they_were(tmp_path):
    lengths = [3, 40, 1, 1, 9, 25, 2, 60]
    with_positions, without = mixture(tmp_path, lengths), mixture(tmp_path, lengths, document_positions=False)
    loaded = pickle.loads(pickle.dumps(with_positions))  # as a worker gets it
    for i in range(20):
        sample, plain = with_positions[i], without[i]
        assert set(plain) == {"input_ids", "labels"}
        assert torch.equal(sample["input_ids"], plain["input_ids"]) and torch.equal(sample["labels"], plain["labels"])
        assert sample["position_ids"].tolist() == counted(sample["input_ids"].numpy())
        assert torch.equal(loaded[i]["position_ids"], sample["position_ids"])
    if hasattr(with_positions, "__getitems__"):
        many = with_positions.__getitems__([0, 5, 11])
        rows = (
            [many[k] for k in range(3)]
            if isinstance(many, list)
            else [{n: t[k] for n, t in many.items()} for k in range(3)]
        )
        for i, row in zip([0, 5, 11], rows, strict=True):
            assert torch.equal(row["position_ids"], with_positions[i]["position_ids"])
    assert len(pickle.dumps(with_positions)) < 2000  # a path, not an index of documents


FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "gpt_neox", "mistral", "olmo2", "phi"]


def packed(lengths: tuple[int, ...], vocabulary: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, vocabulary, (1, n), generator=generator) for n in lengths]
    return ids, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("attention", ["default", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_packed_block_are_those_of_its_documents(family, attention):
    model = build(family, torch.float64)
    if attention == "eager":
        model.set_attn_implementation("eager")
    # 30 tokens reach beyond the window of 16 that Gemma 2 and Mistral have here.
    ids, places = packed((5, 1, 30, 20), int(model.config.get_text_config().vocab_size))
    with torch.no_grad():
        alone = torch.cat([model(input_ids=one, use_cache=False).logits for one in ids], dim=1)
        together = model(input_ids=torch.cat(ids, 1), position_ids=places, use_cache=False).logits
        unmasked = model(input_ids=torch.cat(ids, 1), use_cache=False).logits
    # Eager attention takes its softmax in fp32, whatever the dtype.
    exact = model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12 if exact else 2e-6)
    assert (unmasked - alone).abs().max() > 1e-4
    check_document_mask(model)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bloom", "mpt", "rwkv", "recurrent_gemma", "falcon_h1", "xlnet"])
def test_models_that_read_across_documents_are_refused(family):
    model = build(family).train()
    with pytest.raises(
        UserError, match=rf"batch.document_mask: {type(model).__name__} (reads across|takes no positions)"
    ):
        check_document_mask(model)
    assert model.training


def test_a_packed_block_is_scored_as_documents_read_after_the_end_of_text(tmp_path):
    source = token_file(tmp_path, [6, 1, 12, 9])
    model = tiny_gpt2().double().eval()
    # The stream is opened by an end-of-text token, as the evaluation opens every document.
    stream = np.append(END, source.tokens).astype(np.int64)
    inputs, labels = torch.from_numpy(stream[:-1])[None], torch.from_numpy(stream[1:])
    places = torch.tensor([counted(stream[:-1])])
    with torch.no_grad():
        logits = model(input_ids=inputs, position_ids=places, use_cache=False).logits[0]
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    measured = perplexity(
        model, source.tokens, context=32, prefix=END, documents=source.ends[:, 0].astype(np.int64), per_document=True
    )
    assert measured.tokens == len(labels)
    assert nll == pytest.approx(measured.nll * measured.tokens, rel=1e-9)


def test_small_contexts_are_looked_at_too():
    check_document_mask(tiny_gpt2(n_positions=4))
    check_document_mask(tiny_llama())


# ---- training


def test_the_training_loss_is_that_of_the_documents_read_alone(tmp_path):
    data = mixture(tmp_path / "tokens", [3, 40, 1, 1, 9, 25, 2, 60])
    model = tiny_gpt2()
    summed = torch.zeros(())
    for i in range(6):  # 2 sequences × 3 passes
        sample = data[i]
        starts = [k for k, place in enumerate(sample["position_ids"].tolist()) if place == 0]
        for start, end in itertools.pairwise([*starts, 16]):
            logits = model(input_ids=sample["input_ids"][None, start:end], use_cache=False).logits[0]
            summed = summed + torch.nn.functional.cross_entropy(logits, sample["labels"][start:end], reduction="sum")
    (summed / 96).backward()
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    arguments = ContinualArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        logging_steps=1, learning_rate=1.0, optim="sgd", weight_decay=0.0, max_grad_norm=0.0, use_cpu=True,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = ContinualTrainer(model, arguments, data)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(summed.item() / 96, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), by_hand[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def recipe_data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(0)
    lines = [" ".join(f"w{k}" for k in draw.integers(0, 30, draw.integers(1, 20))) for _ in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {
        "data_root": str(folder),
        "model": {"preset": "gpt-tiny", "context": 16, "config": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
        "tokenizer": {"train": 270},
        "corpora": {"a": {"files": "a.jsonl", "holdout": 0.1}},
        "batch": {"tokens_per_step": 64, "document_mask": True},
        "phases": [{"name": "p", "data": {"a": 1.0}, "steps": 4, "keep": 2}],
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "p/seed-1/checkpoint-4/model.safetensors")


def test_a_masked_run_resumes_bit_for_bit_and_an_unmasked_one_is_another(tmp_path, recipe_data):
    recipe, run = load_recipe(recipe_data), tmp_path / "run"
    run_recipe(recipe, run, progress=False)
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/p/seed-1/checkpoint-4")
    run_recipe(recipe, tmp_path / "cut", progress=False)
    whole, resumed = weights(run), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    without = load_recipe(recipe_data, ["batch.document_mask=false"])
    with pytest.raises(UserError, match=r"batch\.document_mask: true then, false now"):
        run_recipe(without, run, progress=False)
    run_recipe(without, tmp_path / "without", progress=False)
    assert not torch.equal(weights(tmp_path / "without")["transformer.wte.weight"], whole["transformer.wte.weight"])


def test_a_run_of_a_model_that_cannot_is_refused_before_training(tmp_path, recipe_data):
    config = shrink("mamba", vocab_size=320)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    recipe = load_recipe({**recipe_data, "model": {"checkpoint": str(tmp_path / "mamba"), "context": 16}})
    with pytest.raises(UserError, match=r"batch\.document_mask: MambaForCausalLM reads across documents"):
        run_recipe(recipe, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
