"""BERT and its relatives used as decoders, and older families with names of their own: CTRL, XLM, CPM-Ant, Reformer.

All nn.Linear, every matrix its own parameter.
"""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = """
bert bert-generation big_bird camembert cpmant ctrl data2vec-text electra ernie git megatron-bert reformer rembert
roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod
"""

TABLE = merge(
    entries(
        "attention",
        "query key value",
        """
        BertCrossAttention BertGenerationCrossAttention BertGenerationSelfAttention BertSelfAttention
        BigBirdBlockSparseAttention BigBirdSelfAttention CamembertCrossAttention CamembertSelfAttention
        Data2VecTextCrossAttention Data2VecTextSelfAttention ElectraCrossAttention ElectraSelfAttention
        ErnieCrossAttention ErnieSelfAttention GitSelfAttention LocalSelfAttention MegatronBertSelfAttention
        RemBertSelfAttention RoCBertCrossAttention RoCBertSelfAttention RoFormerSelfAttention RobertaCrossAttention
        RobertaPreLayerNormCrossAttention RobertaPreLayerNormSelfAttention RobertaSelfAttention
        XLMRobertaCrossAttention XLMRobertaSelfAttention XLMRobertaXLCrossAttention XLMRobertaXLSelfAttention
        XmodCrossAttention XmodSelfAttention
        """,
    ),
    # Reformer's hashing layers use one projection for query and key.
    entries("attention", "query_key value", "LSHSelfAttention"),
    entries(
        "attention",
        "dense",
        """
        BertGenerationSelfOutput BertSelfOutput BigBirdSelfOutput CamembertSelfOutput Data2VecTextSelfOutput
        ElectraSelfOutput ErnieSelfOutput GitSelfOutput MegatronBertSelfOutput ReformerSelfOutput RemBertSelfOutput
        RoCBertSelfOutput RoFormerSelfOutput RobertaPreLayerNormSelfOutput RobertaSelfOutput XLMRobertaSelfOutput
        XLMRobertaXLSelfOutput XmodSelfOutput
        """,
    ),
    entries(
        "mlp",
        "dense",
        """
        BertGenerationIntermediate BertGenerationOutput BertIntermediate BertOutput BigBirdIntermediate BigBirdOutput
        CamembertIntermediate CamembertOutput Data2VecTextIntermediate Data2VecTextOutput ElectraIntermediate
        ElectraOutput ErnieIntermediate ErnieOutput GitIntermediate GitOutput MegatronBertIntermediate
        MegatronBertOutput ReformerFeedForwardDense ReformerFeedForwardOutput RemBertIntermediate RemBertOutput
        RoCBertIntermediate RoCBertOutput RoFormerIntermediate RoFormerOutput RobertaIntermediate RobertaOutput
        RobertaPreLayerNormIntermediate RobertaPreLayerNormOutput XLMRobertaIntermediate XLMRobertaOutput
        XLMRobertaXLIntermediate XLMRobertaXLOutput XmodIntermediate XmodOutput
        """,
    ),
    # The square layer between the last block and the vocabulary belongs to the head.
    entries(
        "lm_head",
        "dense",
        """
        BertPredictionHeadTransform BigBirdPredictionHeadTransform CamembertLMHead Data2VecTextLMHead
        ElectraGeneratorPredictions ErniePredictionHeadTransform MegatronBertPredictionHeadTransform
        RemBertLMPredictionHead RoCBertPredictionHeadTransform RoFormerPredictionHeadTransform RobertaLMHead
        RobertaPreLayerNormLMHead XLMRobertaLMHead XLMRobertaXLLMHead XmodLMHead
        """,
    ),
    # CTRL and XLM both call their class MultiHeadAttention; their children differ.
    entries("attention", "Wq Wk Wv dense q_lin k_lin v_lin out_lin", "MultiHeadAttention"),
    entries("mlp", "ffn.*", "EncoderLayer"),
    entries("mlp", "lin1 lin2", "TransformerFFN"),
    entries("attention", "project_q project_k project_v attention_out", "CpmAntAttention"),
    entries("mlp", "w_0 w_1", "CpmAntDenseGatedACT"),
    entries("mlp", "w_out", "CpmAntFeedForward"),
    entries("embedding", "relative_attention_bias", "CpmAntSegmentPositionEmbedding"),
    entries("embedding", "weights.*", "AxialPositionEmbeddings"),
    entries("other", "pooler", "BigBirdModel"),
    entries("other", "embeddings_project", "ElectraModel RoFormerModel"),
    entries("other", "embedding_hidden_mapping_in", "RemBertEncoder"),
    entries("other", "map_inputs_layer", "RoCBertEmbeddings"),
    entries("other", "dense1 dense2", "XmodAdapter"),
)
