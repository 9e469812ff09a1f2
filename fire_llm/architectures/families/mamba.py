"""Mamba and its hybrids with attention. in_proj and x_proj fuse streams of unequal width; the role `ssm` is opt-in."""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import Part, entries, merge

TYPES = "bamba falcon_h1 falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h zamba zamba2"

MAMBA1 = "FalconMambaMixer JambaMambaMixer MambaMixer"
MAMBA2 = """
BambaMixer FalconH1Mixer GraniteMoeHybridMambaLayer Mamba2Mixer NemotronHMamba2Mixer Zamba2MambaMixer
"""


# What Mamba-1 computes from its input: step size, B and C.
STEP = (("dt", "time_step_rank"), ("B", "ssm_state_size"), ("C", "ssm_state_size"))


def _mamba2_parts(mixer: Any) -> tuple[Part, ...]:
    """List Mamba-2's streams: gate, input, B and C of each group, and one step size a head."""
    width, state = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    return Part("z", width), Part("x", width), Part("B", state), Part("C", state), Part("dt", mixer.num_heads)


TABLE = merge(
    entries("ssm", "in_proj", MAMBA1, parts=("x", "z")),
    entries("ssm", "x_proj", MAMBA1, parts=STEP),
    entries("ssm", "out_proj", MAMBA1),
    entries("other", "conv1d dt_proj A_log", MAMBA1),
    entries("ssm", "in_proj", MAMBA2, parts=_mamba2_parts),
    entries("ssm", "out_proj", MAMBA2),
    entries("other", "conv1d", MAMBA2),
    # Zamba's Mamba-1 has heads: x_proj is a stack of them, and the rows of in_proj alternate between x and z.
    entries("ssm", "in_proj", "ZambaMambaMixer", parts=(("x", 1), ("z", 1)), groups="intermediate_size"),
    entries("ssm", "x_proj_weight", "ZambaMambaMixer", parts=STEP, stack="n_mamba_heads"),
    entries("ssm", "out_proj", "ZambaMambaMixer"),
    entries("other", "conv1d dt_proj_weight A_log D", "ZambaMambaMixer"),
    entries("bias", "dt_proj_bias", "ZambaMambaMixer"),
    entries(
        "attention",
        "q_proj k_proj v_proj o_proj",
        """
        BambaAttention FalconH1Attention GraniteMoeHybridAttention JambaAttention NemotronHAttention Zamba2Attention
        ZambaAttention
        """,
    ),
    entries("mlp", "gate_proj up_proj down_proj", "BambaMLP FalconH1MLP JambaMLP ZambaMLP"),
    entries("mlp", "up_proj down_proj", "NemotronHMLP"),
    entries("mlp", "input_linear", "GraniteMoeHybridMLP", parts=("gate", "up")),
    entries("mlp", "output_linear", "GraniteMoeHybridMLP"),
    entries("mlp", "gate_up_proj", "Zamba2MLP", parts=("gate", "up")),
    entries("mlp", "down_proj", "Zamba2MLP"),
    # From the shared attention block back into the stream of Mamba layers.
    entries("other", "linear", "Zamba2HybridLayer ZambaHybridLayer"),
    # Low-rank adapters distinguish the uses of a shared block.
    entries("other", "gate_up_proj_adapter_list.*.*", "Zamba2MLP"),
    entries(
        "other",
        "linear_q_adapter_list.*.* linear_k_adapter_list.*.* linear_v_adapter_list.*.*",
        "Zamba2Attention",
    ),
)
