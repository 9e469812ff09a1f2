"""Models of images, and of spectra read as images: transformers of patches and windows, convolutional networks.

A patch embedding turns pixels into features, as a token embedding turns tokens: it has the role `embedding`, like
tables of positions and the tokens that stand for a class or a mask. Linears that join patches between two stages change
the width and are left whole.
"""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import classes, entries, merge

CONV: dict[str, Any] = {"kernel": True, "module_class": "Conv2d"}

_PLAIN = "AST Beit DeiT Dinov2 Dinov2WithRegisters IJepa Swin ViT ViTMSN"
_BERT_LIKE = "Cvt Data2VecVision DonutSwin MobileViT Swinv2"
_PATCHES = f"{_PLAIN} Data2VecVision DonutSwin FocalNet Hiera Swinv2"


TABLE = merge(
    entries("attention", "q_proj k_proj v_proj o_proj", f"{classes(_PLAIN, 'Attention')} SegformerAttention"),
    entries("mlp", "fc1 fc2", classes(_PLAIN, "MLP")),
    entries("mlp", "gate_proj up_proj down_proj", "Dinov2SwiGLUFFN Dinov2WithRegistersSwiGLUFFN"),
    entries("mlp", "fc1 fc2", "SegformerMixMLP HieraMlp FocalNetMlp"),
    entries("mlp", "dense1 dense2", "PvtFFN PvtV2ConvFeedForwardNetwork"),
    entries(
        "attention",
        "query key value",
        """
        Data2VecVisionSelfAttention Data2VecVisionSdpaSelfAttention DonutSwinSelfAttention MobileViTSelfAttention
        PvtEfficientSelfAttention PvtV2SelfAttention Swinv2SelfAttention
        """,
    ),
    entries("attention", "projection_query projection_key projection_value", "CvtSelfAttention"),
    entries("attention", "dense", f"{classes(_BERT_LIKE, 'SelfOutput')} PvtSelfOutput"),
    entries("attention", "proj", "PvtV2SelfAttention"),
    entries("mlp", "dense", f"{classes(_BERT_LIKE, 'Intermediate')} {classes(_BERT_LIKE, 'Output')}"),
    # (3, heads, head width) on the out axis.
    entries("attention", "qkv", "HieraMaskUnitAttention", parts=("q", "k", "v")),
    entries("attention", "proj", "HieraMaskUnitAttention"),
    # ImageGPT, whose Conv1D is GPT-2's.
    entries(
        "attention",
        "c_attn",
        "ImageGPTAttention",
        parts=("q", "k", "v"),
        orientation="in_first",
        module_class="Conv1D",
    ),
    entries("attention", "c_proj", "ImageGPTAttention", orientation="in_first", module_class="Conv1D"),
    entries("mlp", "c_fc c_proj", "ImageGPTMLP", orientation="in_first", module_class="Conv1D"),
    entries("mlp", "pwconv1 pwconv2", "ConvNextLayer ConvNextV2Layer"),
    # The first convolution of a ResNet is one of its layers; ConvNeXt cuts patches.
    entries("embedding", "patch_embeddings", "ConvNextEmbeddings ConvNextV2Embeddings"),
    entries("embedding", "projection", f"{classes(_PATCHES, 'PatchEmbeddings')} PvtPatchEmbeddings"),
    entries("embedding", "projection", "CvtConvEmbeddings PoolFormerEmbeddings"),
    entries("embedding", "proj", "SegformerOverlapPatchEmbeddings PvtV2OverlapPatchEmbeddings"),
    entries(
        "embedding",
        "cls_token mask_token position_embeddings distillation_token register_tokens",
        classes(_PATCHES, "Embeddings"),
    ),
    entries("embedding", "cls_token position_embeddings", "PvtPatchEmbeddings"),
    entries("embedding", "cls_token", "CvtStage"),
    entries(
        "embedding",
        "relative_position_bias_table",
        "BeitRelativePositionBias Data2VecVisionRelativePositionBias DonutSwinSelfAttention SwinRelativePositionBias",
    ),
    entries(
        "conv",
        "convolution",
        """
        CvtSelfAttentionConvProjection EfficientNetEmbeddings HGNetV2ConvLayer MobileNetV1ConvLayer MobileNetV2ConvLayer
        MobileViTConvLayer MobileViTV2ConvLayer RegNetConvLayer RegNetShortCut ResNetConvLayer ResNetShortCut
        """,
        **CONV,
    ),
    entries("conv", "dwconv", "ConvNextLayer ConvNextV2Layer", **CONV),
    entries("conv", "downsampling_layer.*", "ConvNextStage ConvNextV2Stage", **CONV),
    entries("conv", "conv1 conv2", "PoolFormerOutput", **CONV),
    entries("conv", "dwconv", "SegformerDepthWiseConv PvtV2DepthWiseConv", **CONV),
    entries("conv", "expand_conv project_conv", "EfficientNetExpansionLayer EfficientNetFinalBlockLayer", **CONV),
    entries(
        "conv", "depthwise_conv", "EfficientNetDepthwiseLayer", kernel=True, module_class="EfficientNetDepthwiseConv2d"
    ),
    entries("conv", "top_conv", "EfficientNetEncoder", **CONV),
    entries("conv", "projection_context focal_layers.*.*", "FocalNetModulation", **CONV),
    # Keys and values are read at fewer positions.
    entries("conv", "sequence_reduction", "SegformerSequenceReduction PvtEfficientSelfAttention", **CONV),
    entries("conv", "spatial_reduction", "PvtV2SelfAttention", **CONV),
    # Gates of channels, as narrow as a router.
    entries("other", "attention.*", "RegNetSELayer"),
    entries("other", "reduce expand", "EfficientNetSqueezeExciteLayer"),
    entries("other", "projection_in projection_out", "FocalNetModulation"),
    entries("other", "reduction", "DonutSwinPatchMerging SwinPatchMerging Swinv2PatchMerging"),
    entries("other", "proj", "HieraLayer"),
    entries("other", "continuous_position_bias_mlp.* logit_scale", "Swinv2SelfAttention"),
    entries("norm", "grn", "ConvNextV2Layer"),
    entries("norm", "bias", "ConvNextV2GRN"),
    entries("lm_head", "classifier.*", "ResNetForImageClassification RegNetForImageClassification"),
    entries("lm_head", "cls_classifier distillation_classifier", "DeiTForImageClassificationWithTeacher"),
    entries("lm_head", "fc", "HGNetV2ForImageClassification"),
    entries("lm_head", "dense", "ASTMLPHead"),
    # Pixels from features, of models that learn to fill in masked patches.
    entries(
        "other",
        "decoder.*",
        """
        DeiTForMaskedImageModeling FocalNetForMaskedImageModeling SwinForMaskedImageModeling
        Swinv2ForMaskedImageModeling ViTForMaskedImageModeling
        """,
    ),
)
