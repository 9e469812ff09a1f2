"""Decoders whose attention and MLP are separate nn.Linear: Llama and all that took after it."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = """
apertus apertus1p5_text arcee bitnet blt cohere cohere2 cohere_compass_text cwm diffllama doge dory emu3 ernie4_5 exaone
exaone4 gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_unified
gemma4_unified_assistant gemma4_unified_text got_ocr2 gpt_neo gptj granite granite_swa helium hrm_text hunyuan_v1_dense
hyperclovax internlm3 iquestcoder jais2 llama ministral ministral3 mistral mllama moss_transcribe_diarize nanochat
nemotron olmo olmo2 olmo3 phi qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma
"""

TABLE = merge(
    entries(
        "attention",
        "q_proj k_proj v_proj o_proj",
        """
        Apertus1p5TextAttention ApertusAttention ArceeAttention BitNetAttention BltCrossAttention BltSelfAttention
        Cohere2Attention CohereAttention CohereCompassAttention CwmAttention DiffLlamaAttention DogeAttention
        DoryAttention Emu3Attention Ernie4_5Attention Exaone4Attention Gemma2Attention Gemma3Attention
        Gemma3nTextAttention Gemma4TextAttention Gemma4UnifiedTextAttention GemmaAttention GraniteAttention
        GraniteSWAAttention HeliumAttention HrmTextAttention HunYuanDenseV1Attention HyperCLOVAXAttention Jais2Attention
        LlamaAttention Ministral3Attention MinistralAttention MistralAttention MllamaTextCrossAttention
        MllamaTextSelfAttention NanoChatAttention NemotronAttention Olmo2Attention Olmo3Attention OlmoAttention
        OlmoHybridAttention Qwen2Attention Qwen3Attention SeedOssAttention SmolLM3Attention StableLmAttention
        Starcoder2Attention VaultGemmaAttention
        """,
    ),
    # The output gate of the attention: as wide as q, applied to the heads before o_proj.
    entries("attention", "gate_proj", "DoryAttention HrmTextAttention"),
    entries("attention", "q_proj k_proj v_proj out_proj", "GPTJAttention GPTNeoSelfAttention"),
    entries("attention", "q_proj k_proj v_proj dense", "PhiAttention"),
    entries(
        "mlp",
        "gate_proj up_proj down_proj",
        """
        BitNetMLP BltMLP Cohere2MLP CohereCompassMLP CohereMLP CwmMLP DiffLlamaMLP DogeCDMoE DogeMLP DoryMLP Emu3MLP
        Ernie4_5MLP Exaone4MLP Gemma2MLP Gemma3MLP Gemma3nTextMLP Gemma4TextMLP Gemma4UnifiedTextMLP GemmaMLP
        GraniteMLP GraniteSWAMLP HeliumMLP HrmTextMLP HunYuanDenseV1MLP HyperCLOVAXMLP LlamaMLP Ministral3MLP
        MinistralMLP MistralMLP MllamaTextMLP Olmo2MLP Olmo3MLP OlmoHybridMLP OlmoMLP Qwen2MLP Qwen3MLP SeedOssMLP
        SmolLM3MLP StableLmMLP VaultGemmaMLP
        """,
    ),
    # Its rows are scaled by a learned number for each token.
    entries("lm_head", "lm_head", "DoryForCausalLM", module_class="DoryLMHead"),
    entries("mlp", "up_proj down_proj", "Apertus1p5TextMLP ApertusMLP ArceeMLP Jais2MLP NemotronMLP"),
    entries("mlp", "fc1 fc2", "NanoChatMLP PhiMLP"),
    entries("mlp", "fc_in fc_out", "GPTJMLP"),
    entries("mlp", "c_fc c_proj", "GPTNeoMLP Starcoder2MLP"),
    # One (heads, head width) scale, not a matrix.
    entries("norm", "q_norm k_norm", "CohereAttention"),
    entries("router", "router_gate", "DogeCDMoE"),
    # Retrieved experts of one neuron each, kept in nn.Embedding: neither token embeddings nor matrices.
    entries("other", "down_embed up_embed", "DogeCDMoE"),
    entries("other", "dt_proj", "DogeAttention"),
    entries("other", "patch_embedding_projection", "BltLocalDecoder BltLocalEncoder"),
    entries("other", "token_embedding_projection", "BltGlobalTransformer"),
    entries("other", "per_layer_input_gate per_layer_projection", "Gemma3nTextDecoderLayer Gemma4TextDecoderLayer"),
    entries("other", "per_layer_model_projection", "Gemma3nTextModel Gemma4TextModel"),
    entries("other", "altup_projections.* altup_unembed_projections.*", "Gemma3nTextModel"),
    entries("other", "correction_coefs prediction_coefs modality_router", "Gemma3nTextAltUp"),
    entries("other", "linear_left linear_right", "Gemma3nTextLaurelBlock"),
    entries("other", "pre_projection post_projection", "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM"),
)
