"""Encoders of text that no causal LM is made of: ALBERT, DistilBERT, DeBERTa, MPNet, ModernBERT, Longformer and others.

All nn.Linear. DeBERTa's in_proj holds q, k and v head by head; ModernBERT's Wqkv one after another, and its Wi the gate
before what it multiplies.
"""

from __future__ import annotations

from fire_llm.architectures.grammar import classes, entries, merge

_BERT_LIKE = """
Canine ConvBert LayoutLM LayoutLMv3 Lilt Longformer Luke MarkupLM MobileBert Mra Nystromformer Tapas Yoso
"""


TABLE = merge(
    entries("attention", "query key value", f"AlbertAttention {classes(_BERT_LIKE, 'SelfAttention')}"),
    entries("attention", "dense", f"AlbertAttention {classes(_BERT_LIKE, 'SelfOutput')}"),
    entries(
        "mlp",
        "dense",
        f"{classes(_BERT_LIKE, 'Intermediate')} {classes(_BERT_LIKE, 'Output')} FNetIntermediate FNetOutput",
    ),
    entries("mlp", "ffn ffn_output", "AlbertLayer"),
    # Of positions on a page, of entities, and of the tokens that all others look at.
    entries("attention", "layout_query layout_key layout_value", "LiltSelfAttention"),
    entries("attention", "w2e_query e2w_query e2e_query", "LukeSelfAttention"),
    entries("attention", "query_global key_global value_global", "LongformerSelfAttention LEDEncoderSelfAttention"),
    entries("attention", "query key value", "LEDEncoderSelfAttention BigBirdPegasusBlockSparseAttention"),
    entries("attention", "query key value", "BigBirdPegasusSelfAttention"),
    entries("attention", "output", "LEDEncoderAttention BigBirdPegasusEncoderAttention"),
    entries("attention", "q_lin k_lin v_lin out_lin", "DistilBertSelfAttention"),
    entries("mlp", "lin1 lin2", "FFN"),
    entries("attention", "q k v o", "MPNetSelfAttention"),
    entries("mlp", "dense", "MPNetIntermediate MPNetOutput"),
    entries("attention", "in_proj", "DisentangledSelfAttention", parts=("q", "k", "v"), groups="num_attention_heads"),
    # DeBERTa calls them pos_proj and pos_q_proj, its second version pos_key_proj and pos_query_proj: of positions.
    entries(
        "attention",
        "query_proj key_proj value_proj pos_proj pos_q_proj pos_key_proj pos_query_proj",
        "DisentangledSelfAttention",
    ),
    entries("other", "head_logits_proj head_weights_proj", "DisentangledSelfAttention"),
    entries("attention", "dense", "DebertaSelfOutput DebertaV2SelfOutput"),
    entries("mlp", "dense", "DebertaIntermediate DebertaOutput DebertaV2Intermediate DebertaV2Output"),
    entries("conv", "conv", "ConvLayer", kernel=True, module_class="Conv1d"),
    entries("attention", "Wqkv", "ModernBertAttention", parts=("q", "k", "v")),
    entries("attention", "Wo", "ModernBertAttention"),
    entries("mlp", "Wi", "ModernBertMLP", parts=("gate", "up")),
    entries("mlp", "Wo", "ModernBertMLP"),
    entries(
        "attention",
        "q_proj k_proj v_proj o_proj",
        """
        EsmcAttention EuroBertAttention GteAttention JinaEmbeddingsV3Attention NomicBertAttention UltrabertAttention
        """,
    ),
    entries("mlp", "gate_proj up_proj down_proj", "EsmcMLP EuroBertMLP GteMLP NomicBertMLP UltrabertMLP"),
    entries("mlp", "fc1 fc2", "JinaEmbeddingsV3MLP"),
    # Funnel stores its kernel of positions (width, heads, head width), as XLNet does.
    entries("attention", "q_head k_head v_head post_proj", "FunnelRelMultiheadAttention"),
    entries("attention", "r_kernel", "FunnelRelMultiheadAttention", orientation="in_first"),
    entries("bias", "r_r_bias r_s_bias r_w_bias", "FunnelRelMultiheadAttention"),
    entries("other", "seg_embed", "FunnelRelMultiheadAttention"),
    entries("mlp", "linear_1 linear_2", "FunnelPositionwiseFFN"),
    entries("attention", "query key value", "PerceiverSelfAttention"),
    entries("attention", "dense", "PerceiverSelfOutput"),
    entries("mlp", "dense1 dense2", "PerceiverMLP"),
    entries("embedding", "latents position_embeddings", "PerceiverEmbeddings PerceiverTrainablePositionEncoding"),
    entries("other", "convnet_1x1 positions_projection", "PerceiverImagePreprocessor"),
    entries("lm_head", "final_layer", "PerceiverBasicDecoder"),
    entries("mlp", "dense", "FFNOutput"),
    # What changes the width, or makes a kernel of a few numbers for each token.
    entries("other", "dense", "BottleneckLayer OutputBottleneck"),
    entries("other", "embedding_transformation", "MobileBertEmbeddings"),
    entries("other", "embedding_hidden_mapping_in", "AlbertTransformer"),
    entries("other", "embeddings_project", "ConvBertModel ElectraForMaskedLM"),
    entries("other", "projection", "FNetEmbeddings"),
    entries("other", "conv_kernel_layer conv_out_layer", "ConvBertSelfAttention"),
    entries("conv", "depthwise pointwise", "SeparableConv1D", kernel=True, module_class="Conv1d"),
    entries("bias", "bias", "SeparableConv1D"),
    entries("conv", "conv", "CharactersToMolecules ConvProjection", kernel=True, module_class="Conv1d"),
    entries("conv", "conv", "NystromformerSelfAttention", kernel=True, module_class="Conv2d"),
    entries("other", "box_linear_embeddings", "LiltLayoutEmbeddings"),
    entries("other", "entity_embedding_dense", "LukeEntityEmbeddings"),
    entries("other", "inner2emb xpath_unitseq2_embeddings xpath_unitseq2_inner", "XPathEmbeddings"),
    entries("other", "rel_pos_bias rel_pos_x_bias rel_pos_y_bias", "LayoutLMv3Encoder"),
    entries("embedding", "cls_token pos_embed", "LayoutLMv3Model"),
    entries("embedding", "proj", "LayoutLMv3PatchEmbeddings"),
)
