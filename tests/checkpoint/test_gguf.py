"""A model read from a GGUF file is saved by the lines of the page on checkpoints, and then reset like any other."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from fire_llm import UserError, reset_checkpoint
from fire_llm.models import load_model

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
RENAMED = {
    "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "model.layers": "blk",
    "operator_norm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down", "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
    "conv.conv": "shortconv.conv",
}  # fmt: skip


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, value: Any) -> bytes:
    """Return a key with its value: text, a number, or a list of numbers or texts."""
    kinds = {str: (8, text), int: (4, struct.Struct("<I").pack), float: (6, struct.Struct("<f").pack)}
    kind, packed = kinds[type(value[0] if isinstance(value, list) else value)]
    if isinstance(value, list):
        return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(packed, value))
    return text(key) + struct.pack("<I", kind) + packed(value)


def write_gguf(path: Path, model: Any) -> None:
    """Write an LFM2 in fp32 as llama.cpp does: names of its own, convolutions without their axis of length 1."""
    config = model.config
    settings = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads, "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.head_count_kv": [2 * (kind == "full_attention") for kind in config.layer_types],
        "shortconv.l_cache": config.conv_L_cache, "rope.freq_base": 10000.0,
    }  # fmt: skip
    keys = [entry("general.architecture", "lfm2"), *(entry(f"lfm2.{key}", value) for key, value in settings.items())]
    keys.append(entry("tokenizer.ggml.tokens", [str(number) for number in range(config.vocab_size)]))
    infos, data = [], b""
    for name, tensor in model.named_parameters():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        stored = tensor.detach().squeeze(1) if "shortconv.conv" in name else tensor.detach()
        shape = tuple(reversed(stored.shape))
        infos.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data)))
        data += stored.contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join([*keys, *infos])
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


@pytest.mark.filterwarnings("default")  # transformers' own, about what it reads
def test_the_way_round_that_the_page_gives(tmp_path, monkeypatch):
    pytest.importorskip("transformers.integrations.gguf.reader")
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, max_position_embeddings=64, block_auto_adjust_ff_dim=False))
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    write_gguf(Path("folder/model.gguf"), model)
    with pytest.raises(UserError, match="GGUF"):
        reset_checkpoint("folder", "dst")
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL) if "gguf" in b)
    try:
        exec(re.sub("^AutoTokenizer.*", "", block, flags=re.MULTILINE), {})  # it has no vocabulary
    except ImportError as error:  # below 5.18 transformers reads such files by the package gguf
        pytest.skip(str(error))
    saved = load_model("folder-safetensors")
    for (name, a), (_, b) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(reset_checkpoint("folder-safetensors", "dst").touched) == 2 * 3 + 4
