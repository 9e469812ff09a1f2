"""Encoder-decoders, decoders cut from them, and OPT: nn.Linear q, k, v, out and a two-layer MLP held by the layer."""

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
        LEDDecoderAttention M2M100Attention MBartAttention MarianAttention MusicgenAttention MusicgenMelodyAttention
        MvpAttention NllbMoeAttention OPTAttention PLBartAttention PegasusAttention PegasusXAttention
        PegasusXGlobalLocalAttention TrOCRAttention WhisperAttention XGLMAttention
        """,
    ),
    entries(
        "mlp",
        "fc1 fc2",
        """
        BartDecoderLayer BartEncoderLayer BigBirdPegasusDecoderLayer BigBirdPegasusEncoderLayer BioGptDecoderLayer
        BlenderbotDecoderLayer BlenderbotEncoderLayer BlenderbotSmallDecoderLayer BlenderbotSmallEncoderLayer
        LEDDecoderLayer LEDEncoderLayer M2M100DecoderLayer M2M100EncoderLayer MBartDecoderLayer MBartEncoderLayer
        MarianDecoderLayer MarianEncoderLayer MusicgenDecoderLayer MusicgenMelodyDecoderLayer MvpDecoderLayer
        MvpEncoderLayer NllbMoeDenseActDense OPTDecoderLayer PLBartDecoderLayer PLBartEncoderLayer PegasusDecoderLayer
        PegasusEncoderLayer PegasusXDecoderLayer PegasusXEncoderLayer TrOCRDecoderLayer WhisperDecoderLayer
        WhisperEncoderLayer XGLMDecoderLayer
        """,
    ),
    entries("attention", "query_proj key_proj value_proj out_proj", "ProphetNetAttention ProphetNetNgramSelfAttention"),
    entries("mlp", "intermediate output", "ProphetNetFeedForward"),
    entries("other", "relative_pos_embeddings", "ProphetNetNgramSelfAttention"),
    # Whisper's first two layers read spectra.
    entries("conv", "conv1 conv2", "WhisperEncoder", kernel=True, module_class="Conv1d"),
    entries("other", "project_in project_out", "OPTDecoder"),
    entries("other", "prompt_trans.*", "MvpPrompt"),
)
