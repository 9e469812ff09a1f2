"""New models of any architecture: what their config takes from the tokenizer, and what is refused."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from support.small_models import SMALL, stand_ins
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fire_llm import UserError
from fire_llm.architectures.attention import refuse_attention
from fire_llm.architectures.dropout import dropout_keys, set_dropout
from fire_llm.architectures.fresh import architecture_fault
from fire_llm.core.flops import flops_per_token
from fire_llm.models import config_for, copied_config, describe, fresh_model, model_on_meta, new_config

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Tokenizer:
    def __init__(self, size=300, bos=None, eos=299, pad=None):
        self.size, self.bos_token_id, self.eos_token_id, self.pad_token_id = size, bos, eos, pad

    def __len__(self):
        return self.size

    def get_vocab(self):
        return {"last": self.size - 1}


def test_a_new_model_is_made_for_its_tokenizer_and_context():
    config = new_config("llama", tokenizer=Tokenizer(), context=16, overrides=TINY)
    assert (config.vocab_size, config.max_position_embeddings, config.head_dim) == (320, 16, 8)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (299, 299, None)
    given = {**TINY, "vocab_size": 512, "max_position_embeddings": 99, "eos_token_id": 7, "pad_token_id": 500}
    config = new_config("llama", tokenizer=Tokenizer(bos=1), context=16, overrides=given)
    assert (config.vocab_size, config.max_position_embeddings) == (512, 99)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 7, 500)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "inkling_text", "inkling2_text", "inkling2_loop_text"])
def test_further_tables_and_heads_are_as_long_as_the_vocabulary(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("of a newer transformers")
    for given, size in (({}, 320), ({"vocab_size": 512}, 512)):
        config = new_config(name, tokenizer=Tokenizer(pad=0), context=16, overrides=given)
        found = {key: value for key, value in config.to_dict().items() if "vocab_size" in key}
        assert len(found) == 2 and {*found.values()} == {size}
    (other,) = found.keys() - {"vocab_size"}
    assert getattr(new_config(name, tokenizer=Tokenizer(pad=0), overrides={other: 77}), other) == 77


def test_its_weights_are_those_that_transformers_draws():
    model = fresh_model(new_config("llama", tokenizer=Tokenizer(), context=16, overrides=TINY), 3)
    sizes = {**TINY, "vocab_size": 320, "max_position_embeddings": 16}
    torch.manual_seed(3)
    expected = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=299, eos_token_id=299, pad_token_id=None))
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_no_token_of_the_text_is_taken_for_padding():
    """OPT's own padding token is 1, whose embedding is zero and is never trained."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    for tokenizer in (Tokenizer(), Tokenizer(pad=299)):
        overrides = {**sizes, "num_attention_heads": 4}
        model = fresh_model(new_config("opt", tokenizer=tokenizer, context=16, overrides=overrides), 1)
        table = model.get_input_embeddings()
        assert table.padding_idx is None and bool((table.weight != 0).any(1).all())
    model = fresh_model(new_config("opt", tokenizer=Tokenizer(pad=5), context=16, overrides=overrides), 1)
    assert model.get_input_embeddings().padding_idx == 5


def test_positions_that_begin_behind_the_padding_token_are_as_many_as_the_context():
    with pytest.raises(UserError, match="RobertaConfig needs a padding token, and the tokenizer has none"):
        new_config("roberta", tokenizer=Tokenizer(), context=16, overrides=TINY)
    model = fresh_model(new_config("roberta", tokenizer=Tokenizer(pad=7), context=16, overrides=TINY), 1)
    assert model.config.is_decoder
    assert model(input_ids=torch.arange(20, 36)[None]).logits.shape == (1, 16, 320)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.arange(20, 37)[None])


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("llma", {}, "model.architecture: 'llma' is no model type of transformers. Did you mean 'llama'?"),
        ("vit", {}, "model.architecture: 'vit' is no causal language model"),
        ("xlnet", {}, "'xlnet' lets a token see those after it"),
        ("blt", {}, "'blt' reads bytes"),
        ("gemma3", {}, "'gemma3' is no model of text alone, and new weights are for those; take 'gemma3_text'"),
        ("qwen3_5", {}, "take 'qwen3_5_text'"),
        ("moshi", {}, "take a causal LM of text, such as llama"),
        ("llama", {"hidden_sze": 32}, "LlamaConfig has no attribute 'hidden_sze'. Did you mean 'hidden_size'?"),
        ("llama", {"auto_map": {}}, "LlamaConfig has no attribute 'auto_map'"),
        ("llama", {"model_type": "gpt2"}, "LlamaConfig has no attribute 'model_type'"),
        ("llama", {"hidden_size": 33}, "hidden size (33) is not a multiple of the number of attention heads (32)"),
        ("llama", {**TINY, "num_key_value_heads": 3}, "4 attention heads cannot share 3 heads of keys and values"),
        ("gpt2", {"n_embd": 32, "hidden_size": 64}, "GPT2Config has one attribute for n_embd and hidden_size"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; at most 2,000 is allowed"),
        ("llama", {"vocab_size": 64}, "the tokenizer has 300 tokens and the model's embedding 64 rows"),
    ],
)
def test_what_cannot_be_had_is_told(architecture, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        new_config(architecture, tokenizer=Tokenizer(), context=16, overrides=overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("preset", "kv"), [("llama-0.1b", 12), ("qwen3-0.1b", 6)])
def test_the_other_presets_are_of_gpt_0_1bs_size(preset, kv):
    model = model_on_meta(config_for(preset, tokenizer=Tokenizer(50257)))
    config = model.config
    assert (config.vocab_size, config.max_position_embeddings, config.num_key_value_heads) == (50304, 1024, kv)
    assert config.tie_word_embeddings and config.head_dim == 64
    embeddings = 50304 * 768
    norms = 12 * 2 * 768 + 768 + (12 * 2 * 64 if preset.startswith("qwen3") else 0)
    assert sum(p.numel() for p in model.parameters()) == embeddings + 12 * 12 * 768**2 + norms
    # 6 a weight, and 12·width·context for each layer's attention.
    assert flops_per_token(model, 1024) == 6 * (embeddings + 12 * 12 * 768**2 + norms) + 12 * 12 * 768 * 1024
    changed = config_for(preset, context=64, overrides={"num_hidden_layers": 3, "hidden_size": 384})
    assert (changed.num_hidden_layers, changed.max_position_embeddings) == (3, 64)


def test_a_preset_of_two_layers_reads_text():
    for preset in ("llama-0.1b", "qwen3-0.1b"):
        overrides = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96}
        model = fresh_model(config_for(preset, tokenizer=Tokenizer(), context=16, overrides=overrides), 1)
        assert model(input_ids=torch.arange(16)[None]).logits.shape == (1, 16, 320)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"auto_map": {"AutoConfig": "own.Config"}}, r"names code of its own \(auto_map\), which is never run"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is of quantised weights: take quantization_config out"),
        ({"model_type": "vit"}, "ViTConfig is no causal language model|ViT is no causal"),
        ({"model_type": "gemma3"}, "take 'gemma3_text'"),
        ({"vocab_size": 200}, "the tokenizer has 300 tokens and the model's embedding 200 rows"),
        ({"num_hidden_layers": 10**6}, "at most 2,000 is allowed"),
    ],
)
def test_configs_of_files_that_cannot_be_had_are_told(keys, message, tmp_path):
    config = LlamaConfig(**TINY, vocab_size=320)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        copied_config(written(tmp_path, keys), tokenizer=Tokenizer())


def written(folder, keys):
    import json

    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return str(file)


def test_a_config_of_a_file_has_the_tokenizers_special_tokens(tmp_path):
    LlamaConfig(**TINY, vocab_size=320, bos_token_id=4, eos_token_id=5, pad_token_id=6).save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        config = copied_config(place, tokenizer=Tokenizer(bos=1), context=16)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 299, None)
        assert (config.vocab_size, config.max_position_embeddings) == (320, 2048)


# ---- dropout


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop"}),
        ("llama", {"attention_dropout"}),
        ("bert", {"hidden_dropout_prob", "attention_probs_dropout_prob"}),
        ("opt", {"dropout", "attention_dropout"}),
        ("gpt_neox", {"hidden_dropout", "attention_dropout"}),
        ("gpt_neo", {"attention_dropout", "embed_dropout", "resid_dropout"}),
        ("mamba", set()),
    ],
)
def test_one_key_sets_the_dropouts_of_an_architecture(architecture, keys):
    config = AutoConfig.for_model(architecture)
    assert set(dropout_keys(config)) == keys
    if not keys:
        with pytest.raises(UserError, match="MambaConfig has no dropout; remove the key"):
            set_dropout(config, 0.1)
        return set_dropout(config, 0.0)
    set_dropout(config, 0.25)
    assert {getattr(config, key) for key in keys} == {0.25}
    with pytest.raises(UserError, match=f"model.config gives {min(keys)} too"):
        set_dropout(config, 0.1, [min(keys)])
    return None


def test_a_dropout_that_a_class_refuses_is_told():
    with pytest.raises(UserError, match="DiffLlama does not support `attention_dropout > 0`"):
        new_config("diffllama", tokenizer=Tokenizer(), context=16, overrides=TINY, dropout=0.1)


UNBUILT = {
    "cohere_compass_text", "dbrx", "dots1", "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron",
    "qwen4_exp_text",
}  # fmt: skip
"""Types whose default config transformers itself cannot build."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in SMALL if "+" not in name and architecture_fault(name) is None])
def test_every_type_is_built_and_drops_what_it_says(name):
    """Where a config has dropouts, two passes in training differ, and in evaluation they do not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert describe(model_on_meta(new_config(name)))
    except UserError as error:
        told = "transformers cannot build" if name in UNBUILT else "is no model of text alone"
        assert told in str(error)  # noqa: PT017
        if name not in UNBUILT:
            return
    config = SMALL[name]()
    try:
        set_dropout(config, 0.5)
    except UserError as error:
        assert "has no dropout" in str(error) or "refuses" in str(error)  # noqa: PT017
        return
    if name in ("diffllama", "reformer"):  # which refuse it, and any other length than one
        return
    with stand_ins():
        small = fresh_model(config, 1)
    ids = torch.arange(24).view(2, 12) * 3 + 4
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(10 if p.ndim > 1 else 1)
        for mode in (True, False):
            small.train(mode)
            one, other = (small(input_ids=ids, use_cache=False).logits for _ in range(2))
            assert torch.equal(one, other) != mode, mode


# ---- attention


def test_an_attention_that_is_not_here_is_told():
    model = model_on_meta(new_config("llama", overrides=TINY))
    plain = {"half": True, "document_mask": False}
    for name in ("sdpa", "eager"):
        refuse_attention(name, model, **plain)
    with pytest.raises(UserError, match=r"attention: 'flash_attention_2' cannot be had: the package flash-attn is not"):
        refuse_attention("flash_attention_2", model, **plain)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"'flex_attention' cannot be had: there is no CUDA device here"):
            refuse_attention("flex_attention", model, **plain)
    with pytest.raises(UserError, match=r"'sdpa' cannot be had: DebertaForCausalLM does not|does not support it; take"):
        refuse_attention("sdpa", type("OldForCausalLM", (), {"_supports_sdpa": False})(), **plain)


def test_flash_attention_needs_16_bits_and_takes_no_mask_of_documents(monkeypatch):
    import fire_llm.architectures.attention as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    model = model_on_meta(new_config("llama", overrides=TINY))
    refuse_attention("flash_attention_2", model, half=True, document_mask=False)
    with pytest.raises(UserError, match="it computes in 16 bits alone: set precision to bf16"):
        refuse_attention("flash_attention_2", model, half=False, document_mask=False)
    with pytest.raises(UserError, match=r"it takes no mask, which batch\.document_mask needs"):
        refuse_attention("flash_attention_3", model, half=True, document_mask=True)


def test_every_causal_type_is_an_architecture_or_told_why():
    assert {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if architecture_fault(name)} <= {
        "blt",
        "cpmant",
        "xlnet",
    }
