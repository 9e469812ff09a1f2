"""Small CPU models with real weights of transformers' classes beyond causal LMs, and what their forward passes read."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support.small_models import VOCABULARY, shrink

TOKENS = 9

_VISION = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=24, patch_size=8
)
_SWIN = dict(image_size=32, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2.0)
_TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, projection_dim=20,
)  # fmt: skip
_CONVOLUTIONS = dict(hidden_sizes=[12, 20], depths=[1, 2], num_labels=5)
_T5 = dict(
    vocab_size=VOCABULARY, d_model=48, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=1, num_heads=4,
    decoder_start_token_id=0,
)  # fmt: skip

# By `class` or `class+variant`: the attributes of its config.
OTHERS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {**_VISION, "num_labels": 5},
    "ViTModel": _VISION,
    "DeiTForImageClassificationWithTeacher": {**_VISION, "num_labels": 5},
    "BeitForImageClassification": {**_VISION, "use_relative_position_bias": True},
    "Dinov2ForImageClassification": {**_VISION, "num_labels": 5},
    "Dinov2ForImageClassification+swiglu": {**_VISION, "use_swiglu_ffn": True},
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "HieraForImageClassification": dict(
        embed_dim=12, image_size=[32, 32], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1],
        depths=[1, 1], num_heads=[2, 4], query_stride=[2, 2], masked_unit_size=[4, 4], num_query_pool=1,
    ),
    "ImageGPTForImageClassification": dict(vocab_size=VOCABULARY, n_positions=16, n_embd=48, n_layer=2, n_head=4),
    "ResNetForImageClassification": {**_CONVOLUTIONS, "embedding_size": 8, "layer_type": "basic"},
    "ResNetForImageClassification+bottleneck": {**_CONVOLUTIONS, "embedding_size": 8},
    "ConvNextForImageClassification": {**_CONVOLUTIONS, "num_stages": 2},
    "ConvNextV2ForImageClassification": {**_CONVOLUTIONS, "num_stages": 2},
    "CLIPModel": {"text_config": _TEXT, "vision_config": {**_VISION, "projection_dim": 20}, "projection_dim": 20},
    "CLIPVisionModelWithProjection": {**_VISION, "projection_dim": 20},
    "CLIPTextModelWithProjection": _TEXT,
    "BlipModel": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 20},
    "T5ForConditionalGeneration": _T5,
    "T5ForConditionalGeneration+gated": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "T5EncoderModel": _T5,
    "BartForConditionalGeneration": {},
    "WhisperForConditionalGeneration": {},
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForMaskedLM": {},
    "BertModel": {},
    "RobertaForSequenceClassification": {"num_labels": 3},
    "RobertaForTokenClassification": {"num_labels": 3},
    "DistilBertForQuestionAnswering": dict(vocab_size=VOCABULARY, dim=48, hidden_dim=40, n_layers=2, n_heads=4),
    "AlbertForMaskedLM": {"embedding_size": 20},
    "DebertaForSequenceClassification": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaForSequenceClassification+plain": {"relative_attention": False},
    "DebertaV2ForSequenceClassification": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2ForSequenceClassification+plain": {"relative_attention": False},
    "ModernBertForMaskedLM": {},
    "LlamaForSequenceClassification": {"num_labels": 3, "pad_token_id": 0},
    "Qwen2ForTokenClassification": {"num_labels": 3, "tie_word_embeddings": True},
    "GPT2Model": {},
}  # fmt: skip


def config_of(name: str) -> Any:
    """Build the small config of an entry of `OTHERS`."""
    kind = getattr(transformers, name.partition("+")[0])
    given = OTHERS[name]
    sized = given.keys() & {"hidden_size", "embed_dim", "hidden_sizes", "d_model", "dim", "n_embd", "text_config"}
    if sized:
        return kind.config_class(**given)
    return shrink(kind.config_class.model_type, **given)


def build_other(name: str, seed: int = 0) -> Any:
    """Build a small model in eval mode; the same name and seed give the same weights."""
    kind = getattr(transformers, name.partition("+")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config_of(name))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(noise * 0.1 if parameter.ndim > 1 else parameter + noise * 0.05)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):  # as training leaves them
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=draw) * (1 if "var" in key else -1))
    return model.eval()


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's forward pass reads."""
    config: Any = model.config
    draw = torch.Generator().manual_seed(3)
    name, tokens = type(model).__name__, torch.arange(3, 3 + TOKENS)[None]
    size = getattr(getattr(config, "vision_config", config), "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(1, 3, size, size, generator=draw)
    if name.startswith("Whisper"):
        features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
        return {"input_features": features, "decoder_input_ids": tokens}
    if name in ("CLIPModel", "BlipModel"):
        return {"input_ids": tokens, "pixel_values": pixels}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels}
    beside = {"decoder_input_ids": tokens[:, :4]} if config.is_encoder_decoder and "EncoderModel" not in name else {}
    return {"input_ids": tokens, **beside}


def outputs_of(model: Any) -> Tensor:
    """Return the first tensor that a model puts out."""
    with torch.no_grad():
        out = model(**inputs_of(model)).to_tuple()
    return next(tensor for tensor in out if isinstance(tensor, Tensor))


TASKS = ("IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
BESIDE = """
CLIPModel CLIPTextModelWithProjection CLIPVisionModelWithProjection T5EncoderModel WhisperForConditionalGeneration
"""
"""Classes of no such task that are listed too."""
_NEEDS = {"EsmForMaskedLM": {"vocab_size": 33}, "EsmForSequenceClassification": {"vocab_size": 33}}


def classes_of_tasks() -> list[str]:
    """Return the names of all classes of `TASKS`, each once, and those of `BESIDE`."""
    from transformers.models.auto import modeling_auto

    found = [
        name
        for task in TASKS
        for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
        for name in ([names] if isinstance(names, str) else names)
    ]
    return list(dict.fromkeys([*found, *BESIDE.split()]))


def on_meta(name: str) -> Any:
    """Build a class of `classes_of_tasks` on the meta device, with its default config.

    Raises:
        ImportError: It needs a library that is not here.
    """
    kind = getattr(transformers, name)
    with torch.device("meta"):
        try:
            return kind._from_config(kind.config_class(**_NEEDS.get(name, {})))
        except (TypeError, KeyError, ValueError):  # some default configs build nothing
            return kind._from_config(shrink(kind.config_class.model_type))
