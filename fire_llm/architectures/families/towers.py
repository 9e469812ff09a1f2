"""What hangs beside the language model: vision and audio encoders, projectors, patchers. Left whole, role `other`."""

from __future__ import annotations

from fire_llm.architectures.grammar import WHOLE_SUBTREE, entries, merge

TYPES = ""

TABLE = merge(
    entries(
        "other",
        WHOLE_SUBTREE,
        """
        BltPatcher Gemma3MultiModalProjector Gemma3nAudioEncoder Gemma3nMultimodalEmbedder Gemma4AssistantMaskedEmbedder
        Gemma4AudioModel Gemma4MultimodalEmbedder Gemma4UnifiedAssistantMaskedEmbedder Gemma4UnifiedMultimodalEmbedder
        Gemma4UnifiedVisionEmbedder Gemma4VisionModel GitProjection GitVisionModel GotOcr2MultiModalProjector
        GotOcr2VisionEncoder MossTranscribeDiarizeAudioModel MossTranscribeDiarizeMultiModalProjector
        Phi4MultimodalFeatureEmbedding SiglipVisionModel
        TimmWrapperModel
        """,
    ),
    entries("other", "img_temporal_embedding.*", "GitModel"),
    entries("other", "vision_embed_tokens", "FuyuModel"),
)
