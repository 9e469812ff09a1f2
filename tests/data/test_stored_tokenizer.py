"""Tokenizers whose class would cut text otherwise than their tokenizer.json; ids are held against the library's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from fire_llm.data import stored_tokenizer
from fire_llm.models import load_tokenizer

TEXT = "Café, cafe\u0301.  " + (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
GROUPS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 cuts
WAYS = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "groups": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GROUPS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
CLASSES = ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast"]


def trained(folder: Path, way: str, kind: str, end: str = "</s>") -> Tokenizer:
    """Train a byte-level BPE, save it under the name of a class, and return it as the library has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = WAYS[way]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", end], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": end, "model_max_length": 10**6}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", WAYS)
def test_ids_are_those_of_the_file(way, kind, tmp_path, capsys):
    stored_tokenizer._report.cache_clear()
    library = trained(tmp_path, way, kind)
    wanted = library.encode(TEXT, add_special_tokens=False).ids
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == wanted
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", "</s>", 10**6)
    differs = AutoTokenizer.from_pretrained(tmp_path)(TEXT, add_special_tokens=False)["input_ids"] != wanted
    assert ("cuts text otherwise than its tokenizer.json" in capsys.readouterr().err) == differs
    tokenizer.save_pretrained(tmp_path / "again")  # what a run writes beside its checkpoints
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT, add_special_tokens=False)["input_ids"] == wanted


def test_the_installed_transformers_still_cuts_in_its_own_way(tmp_path):
    """Otherwise the file that mends it may go."""
    wanted = trained(tmp_path, "groups", "GPT2Tokenizer").encode(TEXT, add_special_tokens=False).ids
    found = AutoTokenizer.from_pretrained(tmp_path)(TEXT, add_special_tokens=False)["input_ids"]
    assert found != wanted, f"transformers {transformers.__version__} reads tokenizer.json as it is"


def test_what_the_class_has_by_default_is_kept(tmp_path):
    trained(tmp_path, "groups", "GPT2Tokenizer", end="<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"


def test_what_a_tokenizer_is_set_to_does_not_count(tmp_path, capsys):
    trained(tmp_path, "bytes", "GPT2Tokenizer")
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=True)
    edit(
        tmp_path / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    )
    assert type(load_tokenizer(tmp_path)).__name__.startswith("GPT2")
    assert "otherwise" not in capsys.readouterr().err
