"""Presets, step-0 weights, and what is refused on the way to a model."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.edits import NO_OBJECTS, damaged, edited
from support.models import tiny_gpt2, tiny_llama
from transformers import PreTrainedTokenizerFast, XLNetConfig

from fire_llm import UserError, reset_checkpoint
from fire_llm.core.errors import reading
from fire_llm.evaluation.checkpoints import score_checkpoints
from fire_llm.models import (
    PRESETS,
    config_for,
    describe,
    fresh_model,
    load_model,
    load_tokenizer,
    model_on_meta,
    pretrained_config,
)


def test_gpt_0_1b_is_the_papers_model():
    model = model_on_meta(config_for("gpt-0.1b"))
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (12, 12, 768, 1024)
    assert config.vocab_size == 50304 and config.tie_word_embeddings
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    x = torch.linspace(-3, 3, 99)
    assert torch.equal(model.transformer.h[0].mlp.act(x), torch.nn.functional.gelu(x))  # not the tanh form
    # 50304·768 + 1024·768 + 12·(12·768² + 13·768) + 2·768, the biases of the transformers classes included.
    assert sum(p.numel() for p in model.parameters()) == 124_475_904


def test_fresh_weights_are_the_papers_initialisation():
    model = fresh_model(config_for("gpt-small"), seed=1)
    layers = model.config.n_layer
    for name, p in model.state_dict().items():
        if name.endswith("c_proj.weight"):
            assert float(p.std()) == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.05)
        elif p.ndim == 2:
            assert float(p.std()) == pytest.approx(0.02, rel=0.05)
        elif name.endswith("bias"):
            assert not p.any()


def test_fresh_weights_depend_on_the_seed_alone_and_leave_the_generator_as_it_was():
    config = config_for("gpt-tiny")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fresh_model(config, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(100)
    again, other = fresh_model(config, 3), fresh_model(config, 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_a_saved_config_gives_the_same_fresh_weights(tmp_path):
    model = fresh_model(config_for("gpt-tiny", context=32), 7)
    model.save_pretrained(tmp_path)
    again = fresh_model(load_model(tmp_path).config, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_vocabulary_that_follows_the_tokenizer_is_padded():
    class Tokenizer:
        eos_token_id = 0

        def __len__(self):
            return 2049

        def get_vocab(self):
            return {"a": 0}

    assert config_for("gpt-tiny", tokenizer=Tokenizer()).vocab_size == 2112
    with pytest.raises(UserError, match="the tokenizer has 2049 tokens and the model's embedding 1000 rows"):
        config_for("gpt-tiny", tokenizer=Tokenizer(), overrides={"vocab_size": 1000})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt-2", {}, "neither a preset"),
        ("gpt-tny", {}, "Did you mean 'gpt-tiny'?"),
        ("gpt-tiny", {"overrides": {"n_layers": 3}}, "no attribute 'n_layers'. Did you mean 'n_layer'?"),
    ],
)
def test_bad_models(name, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_for(name, **options)


def test_a_context_beyond_the_models_positions_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.context 65 must lie between 1 and 64, the most tokens"):
        config_for(str(tmp_path), context=65)


def test_a_model_without_a_limit_can_be_overridden_and_read_at_any_length(tmp_path):
    XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=32).save_pretrained(tmp_path)
    config = config_for(str(tmp_path), context=5000, overrides={"dropout": 0.0})
    assert config.dropout == 0.0 and config.max_position_embeddings == -1


def test_checkpoints_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="neither a preset"):
        load_model(tmp_path / "nowhere")
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        weights.write_bytes(damage)
        with pytest.raises(UserError, match="m' cannot be read"):
            load_model(tmp_path / "m")
    weights.unlink()
    with pytest.raises(UserError, match="m' cannot be read"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json' is not JSON"):
        load_model(tmp_path / "m")


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's tensors, 'model.layers.1.mlp.up_proj.weight'"):
        load_model(tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_names_of_a_wrapped_model_are_named_and_the_way_out_works(wrapper, tmp_path):
    whole, file = tiny_llama(), tmp_path / "m" / "model.safetensors"
    whole.save_pretrained(tmp_path / "m")
    save_file({wrapper + k: t for k, t in load_file(file).items()}, file, {"format": "pt"})
    for read in (load_model, lambda folder: reset_checkpoint(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=rf"its names bear '{wrapper}' \('{wrapper}lm_head.weight'\)") as error:
            read(tmp_path / "m")
        line = str(error.value).split("safetensors.torch: ")[1]
    exec(line, {"load_file": load_file, "save_file": save_file, "FILE": file})
    assert all(torch.equal(a, b) for a, b in zip(load_model(file.parent).parameters(), whole.parameters(), strict=True))


def test_sizes_that_differ_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "vocab_size": 77}))
    for read in (load_model, lambda folder: reset_checkpoint(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=r"embed_tokens.weight'.* \(97, 32\).* \(77, 32\)"):
            read(tmp_path / "m")


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_tokenizer("a/b/c")
    with pytest.raises(UserError, match=r"none could be read from .*, which holds no file of one: save the model"):
        load_tokenizer(tmp_path)
    # What `GPT2TokenizerFast(vocab_file=…)` would silently turn into an empty vocabulary.
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"empty vocabulary|none could be read"):
        load_tokenizer(tmp_path)


@pytest.mark.shared_data
def test_gpt2s_two_files_alone_give_its_tokenizer(shared_data):
    tokenizer = load_tokenizer(shared_data / "gpt2-tokenizer")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256


def test_descriptions():
    assert describe(model_on_meta(config_for("gpt-tiny", overrides={"vocab_size": 2048}))) == (
        "GPT2LMHeadModel, 4 layers, width 128, vocabulary 2048, 1.07 M parameters"
    )
    assert set(PRESETS) == {"gpt-0.1b", "gpt-small", "gpt-tiny", "llama-0.1b", "qwen3-0.1b"}


# ---- what lies outside


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return a checkpoint of seconds: a model, its tokenizer of bytes, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("outside")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<end>": 256}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>").save_pretrained(folder / "m")
    tiny_gpt2(vocab_size=260).save_pretrained(folder / "m")
    (folder / "t.txt").write_text("one text\n\nand another")
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole / "m", tmp_path / "m")


def changed(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("content", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_that_hold_no_object_are_told_in_one_sentence(name, content, copy):
    (copy / name).write_bytes(content)
    said = []
    for load in (load_tokenizer, load_model):
        with suppress(UserError):
            load(copy)
            continue
        with pytest.raises(UserError, match=re.escape(str(copy))) as caught:
            load(copy)
        said.append(str(caught.value))
    assert not any("\n" in each for each in said)
    assert said or name in ("tokenizer_config.json", "generation_config.json")  # which transformers may read over


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n_layer": "many"}, "is no config that transformers can read"),
        ({"dtype": "nope"}, "is no config that transformers can read|cannot be read"),
        ({"n_layer": 10**9}, "n_layer is 1000000000; at most 2,000 is allowed"),
        ({"num_labels": 10**9}, "num_labels is 1000000000; at most 100,000 is allowed"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "cannot be read"),
        ({"model_type": "vit"}, "is no causal language model|cannot be read"),
    ],
)
def test_hostile_configs_are_told_in_one_sentence(keys, said, copy):
    changed(copy, **keys)
    with pytest.raises(UserError, match=said) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("number", [25, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_checkpoint_edited_by_chance_is_measured_or_told(number, whole, tmp_path):
    names = ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for seed in range(number):
        chance = random.Random(seed)
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole / "m", folder)
        path = folder / chance.choice([*names, "model.safetensors"])
        if path.suffix == ".json" and chance.random() < 0.7:
            path.write_text(json.dumps(edited(json.loads(path.read_text()), chance)))
        else:
            path.write_bytes(damaged(path.read_bytes(), chance))
        with suppress(UserError):
            model_on_meta(config_for(str(folder)))
        try:
            score_checkpoints([str(folder)], [str(whole / "t.txt")], progress=False)
        except UserError as error:
            assert "\n" not in str(error), (seed, path.name)  # noqa: PT017
        except FloatingPointError:
            assert path.name == "model.safetensors", seed


def test_an_adapter_is_told_what_to_do(copy):
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter \(adapter_config.json\).*merge_and_unload"):
        load_model(copy)


def test_a_misspelt_folder_is_told_its_neighbour_and_the_home_folder_is_known(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    (copy.parent / "runs" / "model").mkdir(parents=True)
    for load in (pretrained_config, load_tokenizer):
        with pytest.raises(UserError, match=r"there is no folder 'runs/modle' \(did you mean 'runs/model'\?\)"):
            load("runs/modle")
        with pytest.raises(UserError, match=r"did you mean 'runs/model'\?"):
            load("./runs/modle")
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load_model("~/m").config.vocab_size == load_model(copy).config.vocab_size
    assert len(load_tokenizer("~/m")) == 257


class PanicException(BaseException):
    """What pyo3 raises where Rust panics: no `Exception`."""


@pytest.mark.parametrize("error", [PanicException("range end out of bounds"), Exception("no model"), KeyError("x")])
def test_whatever_readers_raise_becomes_one_sentence(error):
    with pytest.raises(UserError, match=r"'f' cannot be read: ."), reading("'f' cannot be read"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), torch.OutOfMemoryError("x")])
def test_what_is_not_the_files_fault_goes_through(error):
    with pytest.raises(type(error)), reading("'f' cannot be read"):
        raise error


def test_a_document_without_tokens_is_left_out_where_documents_are_read_alone(copy, tmp_path, capfd):
    """A vocabulary of letters alone makes no token of digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"<end>": 26}, merges=[])
    )
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    letters.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>").save_pretrained(copy)
    (tmp_path / "t.txt").write_text("some text\n\n12 34\n\nmore")
    (tmp_path / "without.txt").write_text("some text\n\nmore")
    (tmp_path / "none.txt").write_text("12\n\n34")
    kept, plain = (
        score_checkpoints([str(copy)], [str(tmp_path / name)], per_document=True, progress=False).rows[0]
        for name in ("t.txt", "without.txt")
    )
    assert kept.nll == plain.nll and (kept.tokens, kept.documents, kept.bytes) == (12, 2, plain.bytes)
    assert "1 of 3 documents of" in capfd.readouterr().err
    stream = score_checkpoints([str(copy)], [str(tmp_path / "t.txt")], progress=False).rows[0]
    assert (stream.tokens, stream.documents) == (15, 3)
    with pytest.raises(UserError, match="the tokenizer makes no token of any document"):
        score_checkpoints([str(copy)], [str(tmp_path / "none.txt")], per_document=True, progress=False)
