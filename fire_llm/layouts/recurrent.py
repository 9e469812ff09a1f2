"""Linear attention and recurrence whose projections are separate nn.Linear: their role `ssm` is opt-in."""

from __future__ import annotations

from fire_llm.layouts.grammar import entries, merge

TYPES = "olmo_hybrid rwkv"

TABLE = merge(
    entries("ssm", "q_proj k_proj v_proj g_proj o_proj", "OlmoHybridGatedDeltaNet"),
    # One number a head, and a depthwise convolution.
    entries("other", "a_proj b_proj conv1d", "OlmoHybridGatedDeltaNet"),
    entries("ssm", "key value receptance output", "RwkvSelfAttention"),
    entries("other", "time_mix_key time_mix_value time_mix_receptance", "RwkvSelfAttention"),
    entries("mlp", "key value receptance", "RwkvFeedForward"),
    entries("other", "time_mix_key time_mix_receptance", "RwkvFeedForward"),
)
