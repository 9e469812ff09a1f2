"""Models of images and texts in one space: CLIP and its relatives, two towers with a projection each."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

_TOWERS = "AltCLIP CLIP CLIPSeg MetaClip2"

TABLE = merge(
    entries(
        "attention",
        "q_proj k_proj v_proj out_proj",
        "AltCLIPAttention CLIPAttention CLIPSegAttention ChineseCLIPVisionAttention MetaClip2Attention",
    ),
    entries("mlp", "fc1 fc2", "AltCLIPMLP BlipMLP CLIPMLP CLIPSegMLP ChineseCLIPVisionMLP MetaClip2MLP"),
    # (3, heads, head width) on the out axis.
    entries("attention", "qkv", "BlipAttention", parts=("q", "k", "v")),
    entries("attention", "projection", "BlipAttention"),
    entries(
        "attention", "query key value", "AltRobertaSelfAttention BlipTextSelfAttention ChineseCLIPTextSelfAttention"
    ),
    entries("attention", "dense", "AltRobertaSelfOutput BlipTextSelfOutput ChineseCLIPTextSelfOutput"),
    entries(
        "mlp",
        "dense",
        """
        AltRobertaIntermediate AltRobertaOutput BlipTextIntermediate BlipTextOutput ChineseCLIPTextIntermediate
        ChineseCLIPTextOutput
        """,
    ),
    entries(
        "embedding",
        "patch_embedding class_embedding position_embedding",
        """
        AltCLIPVisionEmbeddings BlipVisionEmbeddings CLIPSegVisionEmbeddings CLIPVisionEmbeddings
        ChineseCLIPVisionEmbeddings MetaClip2VisionEmbeddings
        """,
    ),
    # Into the space that both towers share.
    entries(
        "other",
        "text_projection visual_projection",
        """
        AltCLIPModel BlipModel CLIPModel CLIPSegModel CLIPTextModelWithProjection CLIPVisionModelWithProjection
        ChineseCLIPModel MetaClip2Model MetaClip2TextModelWithProjection MetaClip2VisionModelWithProjection
        """,
    ),
    entries("other", "transformation", "AltCLIPTextModel"),
    entries("other", "dense", "AltRobertaPooler BlipTextPooler ChineseCLIPTextPooler"),
)
