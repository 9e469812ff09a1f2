"""T5 and its relatives: plain q, k, v, o; an MLP of two layers, or a gated one of three; relative positions."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TABLE = merge(
    entries(
        "attention",
        "q k v o",
        """
        LongT5Attention LongT5LocalAttention LongT5TransientGlobalAttention MT5Attention SwitchTransformersAttention
        T5Attention UMT5Attention
        """,
    ),
    entries(
        "mlp",
        "wi wo",
        "LongT5DenseActDense MT5DenseActDense SwitchTransformersDenseActDense T5DenseActDense UMT5DenseActDense",
    ),
    # wi_0 goes through the activation and is the gate; wi_1 is the up projection.
    entries(
        "mlp",
        "wi_0 wi_1 wo",
        "LongT5DenseGatedActDense MT5DenseGatedActDense T5DenseGatedActDense UMT5DenseGatedActDense",
    ),
    entries("router", "classifier", "NllbMoeTop2Router SwitchTransformersTop1Router"),
    entries(
        "attention",
        "q_proj k_proj v_proj o_proj",
        "T5GemmaCrossAttention T5GemmaSelfAttention T5Gemma2MergedAttention T5Gemma2SelfAttention",
    ),
    entries("mlp", "gate_proj up_proj down_proj", "T5GemmaMLP T5Gemma2MLP"),
)
