"""What stands between the last block of an encoder and its output: heads of classifiers, and poolers.

The role `lm_head` is that of every output head, of the layer that gives a score a class as of the one that gives a
score a token, and of the square layer before it. A pooler, which reads one token of a trunk, is left whole.
"""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TABLE = merge(
    entries(
        "lm_head",
        "dense out_proj",
        """
        BartClassificationHead BigBirdClassificationHead BigBirdPegasusClassificationHead CamembertClassificationHead
        ConvBertClassificationHead Data2VecTextClassificationHead ElectraClassificationHead EsmcClassificationHead
        JinaEmbeddingsV3ClassificationHead LayoutLMv3ClassificationHead LiltClassificationHead
        LongformerClassificationHead MBartClassificationHead MPNetClassificationHead MT5ClassificationHead
        MraClassificationHead MvpClassificationHead NystromformerClassificationHead PLBartClassificationHead
        ReformerClassificationHead RoFormerClassificationHead RobertaClassificationHead
        RobertaPreLayerNormClassificationHead T5ClassificationHead T5Gemma2ClassificationHead T5GemmaClassificationHead
        UMT5ClassificationHead XLMRobertaClassificationHead XLMRobertaXLClassificationHead XmodClassificationHead
        YosoClassificationHead
        """,
    ),
    entries("lm_head", "linear_hidden linear_out", "FunnelClassificationHead"),
    entries("lm_head", "pre_classifier", "DistilBertForSequenceClassification DistilBertForMultipleChoice"),
    entries("lm_head", "vocab_transform", "DistilBertForMaskedLM"),
    entries("lm_head", "dense", "EuroBertForSequenceClassification"),
    entries("lm_head", "qa_outputs", "BigBirdForQuestionAnsweringHead"),
    entries("lm_head", "logits_proj", "XLNetForSequenceClassification"),
    entries(
        "lm_head",
        "summary",
        """
        ElectraSequenceSummary FlaubertSequenceSummary GPT2SequenceSummary OpenAIGPTSequenceSummary XLMSequenceSummary
        XLNetSequenceSummary
        """,
    ),
    entries(
        "lm_head",
        "seq_relationship",
        """
        BertOnlyNSPHead BertPreTrainingHeads BigBirdOnlyNSPHead BigBirdPreTrainingHeads ErnieOnlyNSPHead
        ErniePreTrainingHeads MegatronBertOnlyNSPHead MegatronBertPreTrainingHeads MobileBertOnlyNSPHead
        MobileBertPreTrainingHeads FNetPreTrainingHeads
        """,
    ),
    entries("lm_head", "dense dense_prediction", "ElectraDiscriminatorPredictions"),
    entries(
        "lm_head",
        "dense",
        """
        AlbertMLMHead ConvBertGeneratorPredictions EsmcMaskedLMHead FNetPredictionHeadTransform GteLMHead
        JinaEmbeddingsV3LMHead LayoutLMPredictionHeadTransform LegacyDebertaPredictionHeadTransform
        LegacyDebertaV2PredictionHeadTransform LongformerLMHead LukeLMHead MPNetLMHead MobileBertPredictionHeadTransform
        ModernBertPredictionHead MraPredictionHeadTransform NomicBertPredictionHeadTransform
        NystromformerPredictionHeadTransform TapasPredictionHeadTransform YosoPredictionHeadTransform
        """,
    ),
    entries("lm_head", "linear1 linear2", "UltrabertPredictionHead"),
    # Further columns of the embedding, which is narrower than the model.
    entries("other", "dense", "MobileBertLMPredictionHead"),
    entries("other", "decoder dense", "EntityPredictionHead EntityPredictionHeadTransform"),
    entries(
        "other",
        "dense",
        """
        BertPooler CaninePooler ContextPooler DeiTPooler ErniePooler FNetPooler GtePooler IJepaPooler
        LayoutLMPooler LukePooler LxmertPooler MarkupLMPooler MegatronBertPooler MobileBertPooler NomicBertPooler
        PoolFormerFinalPooler RemBertPooler RoCBertPooler RobertaPooler RobertaPreLayerNormPooler TapasPooler ViTPooler
        CamembertPooler Data2VecTextPooler XLMRobertaPooler XLMRobertaXLPooler XmodPooler LiltPooler LongformerPooler
        MPNetPooler JinaEmbeddingsV3Pooler Data2VecVisionPooler
        """,
    ),
    entries("other", "pooler", "AlbertModel"),
    entries("other", "projector", "WhisperForAudioClassification"),
)
