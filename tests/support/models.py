"""Models of two layers and width 32."""

from __future__ import annotations


def tiny_gpt2(seed: int = 0, **settings):
    """Build a GPT-2 of 2 layers and width 32."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    defaults = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**defaults, **off, **settings}))


def tiny_mixtral(seed: int = 0, **settings):
    """Build a mixture of experts of width 32, which transformers stores under other names than it holds."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 97, "num_local_experts": 3, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**{**defaults, **settings}))


def tiny_llama(seed: int = 0, **settings):
    """Build a Llama of 2 layers, width 32 and grouped queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings}))
