"""Decoders cut from encoder-decoders, and OPT: nn.Linear q, k, v, out and a two-layer MLP held by the layer itself."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = """
bart bigbird_pegasus biogpt blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp opt pegasus plbart
prophetnet trocr whisper xglm
"""

TABLE = merge(
    entries(
        "attention",
        "q_proj k_proj v_proj out_proj",
        """
        BartAttention BigBirdPegasusDecoderAttention BioGptAttention BlenderbotAttention BlenderbotSmallAttention
        MBartAttention MarianAttention MusicgenAttention MusicgenMelodyAttention MvpAttention OPTAttention
        PLBartAttention PegasusAttention TrOCRAttention WhisperAttention XGLMAttention
        """,
    ),
    entries(
        "mlp",
        "fc1 fc2",
        """
        BartDecoderLayer BigBirdPegasusDecoderLayer BioGptDecoderLayer BlenderbotDecoderLayer
        BlenderbotSmallDecoderLayer MBartDecoderLayer MarianDecoderLayer MusicgenDecoderLayer
        MusicgenMelodyDecoderLayer MvpDecoderLayer OPTDecoderLayer PLBartDecoderLayer PegasusDecoderLayer
        TrOCRDecoderLayer WhisperDecoderLayer XGLMDecoderLayer
        """,
    ),
    entries("attention", "query_proj key_proj value_proj out_proj", "ProphetNetAttention ProphetNetNgramSelfAttention"),
    entries("mlp", "intermediate output", "ProphetNetFeedForward"),
    entries("other", "relative_pos_embeddings", "ProphetNetNgramSelfAttention"),
    entries("other", "project_in project_out", "OPTDecoder"),
    entries("other", "prompt_trans.*", "MvpPrompt"),
)
