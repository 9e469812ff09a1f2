"""The longest context of every causal LM type, against what its forward pass can read and what its config says."""

from __future__ import annotations

import pytest
import torch
from support.small_models import SMALL, VOCABULARY, build, shrink, stand_ins
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, RobertaConfig, RobertaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fire_llm import perplexity
from fire_llm.architectures.context import choose_context, longest_context, refuse_length
from fire_llm.core.errors import UserError

POSITIONS = 64
"""What every length in the config of a small model is, whatever its name."""
TABLE = {
    # Looked up, learned or computed once; the padding token's position and those before it hold no token.
    **dict.fromkeys(
        ["bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
         "codegen", "ctrl", "electra", "ernie", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "marian",
         "mbart", "megatron-bert", "mpt", "mvp", "openai-gpt", "opt", "pegasus", "plbart", "reformer", "rembert",
         "roc_bert", "roformer", "trocr", "whisper", "xlm"], 64),
    **dict.fromkeys(
        ["camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
         "xlm-roberta-xl", "xmod"], 62),
}  # fmt: skip
"""Types whose forward pass fails beyond a length, and that length."""
NAMELESS = {
    "bloom", "cpmant", "falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "xlnet", "xlstm",
}  # fmt: skip
"""Types whose config names no length."""
STRETCHED = {"gpt_oss": 32 * 4096, "ministral3": 16 * 16384}
"""Types whose default config stretches positions by YaRN, which the small ones do too."""


def can_read(model: torch.nn.Module, length: int) -> bool:
    """Read tokens, none of them padding, and tell whether finite logits come out."""
    tokens = 5 + torch.arange(length)[None] % (VOCABULARY - 5)
    inputs = {"input_ids": tokens}
    if type(model).__name__.startswith("Musicgen"):
        inputs = {"input_ids": tokens.repeat(model.config.num_codebooks, 1)}
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
    except (IndexError, RuntimeError, ValueError):
        return False
    assert logits.shape[-2] == length and bool(logits.isfinite().all())
    return True


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_type_reads_its_longest_context_and_what_has_a_table_no_more(name):
    kind = name.partition("+")[0]
    with stand_ins():
        model = build(name)
        longest = longest_context(model.config)
        assert longest == (None if kind in NAMELESS else TABLE.get(kind, STRETCHED.get(kind, POSITIONS)))
        if kind.endswith("_assistant"):
            return  # reads its main model's states, no text alone
        assert can_read(model, TABLE.get(kind, POSITIONS + 1))
        assert kind not in TABLE or not can_read(model, TABLE[kind] + 1)


def test_the_tables_name_types_that_there_are():
    assert TABLE.keys() | NAMELESS | STRETCHED.keys() <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


@pytest.mark.parametrize(("padding", "tokens"), [(0, 19), (1, 18), (3, 16)])
def test_positions_counted_from_the_padding_token(padding, tokens):
    model = build_roberta(max_position_embeddings=20, pad_token_id=padding)
    assert longest_context(model.config) == tokens
    assert can_read(model, tokens) and not can_read(model, tokens + 1)
    assert perplexity(model, torch.arange(5, 60), prefix=5).context == tokens
    with pytest.raises(UserError, match=f"context {tokens + 1} must lie between 1 and {tokens}, the most tokens"):
        perplexity(model, torch.arange(5, 60), context=tokens + 1)


def build_roberta(**options):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return RobertaForCausalLM(RobertaConfig(**sizes, num_attention_heads=2, is_decoder=True, **options)).eval()


@pytest.mark.parametrize(("axial", "positions", "tokens"), [(True, 64, 16), (True, 12, 12), (False, 64, 64)])
def test_axial_positions_are_those_of_the_grid(axial, positions, tokens):
    config = shrink("reformer", axial_pos_embds=axial, axial_pos_shape=[2, 8], max_position_embeddings=positions)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert longest_context(config) == tokens
    assert can_read(model, tokens) and not can_read(model, tokens + 1)


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("positions", "rope", "tokens"),
    [
        (32768, YARN, 131072),  # as Qwen2.5's model card says to write it
        (131072, YARN, 131072),
        (131072, {**YARN, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                  "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 131072),
        (16384, {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}, 16384),  # deepseek-coder: stretched already
        (32768, {"rope_type": "default", "rope_theta": 1e6}, 32768),
    ],
)  # fmt: skip
def test_stretched_rotary_positions(positions, rope, tokens):
    assert longest_context(LlamaConfig(max_position_embeddings=positions, rope_parameters=rope)) == tokens


def test_a_length_that_yarn_gives_to_one_kind_of_layer():
    config = LlamaConfig(max_position_embeddings=32768)
    config.rope_parameters = {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}
    assert longest_context(config) == 131072


def test_the_default_is_the_longest_context_up_to_1024():
    assert choose_context(AutoConfig.for_model("gpt2", n_positions=300), None) == 300
    assert choose_context(LlamaConfig(max_position_embeddings=4096), None) == 1024
    assert choose_context(LlamaConfig(max_position_embeddings=4096), 4096) == 4096
    for unlimited in ("xlnet", "mamba", "bloom"):
        assert choose_context(AutoConfig.for_model(unlimited), None) == 1024
        assert choose_context(AutoConfig.for_model(unlimited), 10**6) == 10**6


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        ("whisper", 449, "model.context 449 must lie between 1 and 448, the most tokens that the model reads at once"),
        ("opt", 2049, "model.context 2049 must lie between 1 and 2048,"),
        ("roberta", 512, "model.context 512 must lie between 1 and 510,"),
        ("gpt2", 0, "model.context 0 must lie between 1 and 1024,"),
        ("xlnet", 0, "model.context 0 must be at least 1"),
    ],
)
def test_a_context_that_cannot_be_read_is_refused(kind, wanted, message):
    with pytest.raises(UserError, match=f"^{message}"):
        choose_context(AutoConfig.for_model(kind), wanted, "model.context")


def test_a_reformer_is_trained_on_the_length_of_its_axes_alone():
    config = AutoConfig.for_model("reformer", axial_pos_shape=[4, 8], max_position_embeddings=32)
    refuse_length(config, 32)
    with pytest.raises(UserError, match=r"model.context: 16 tokens .* \[4, 8\]: .* exactly 4 x 8 = 32 tokens"):
        refuse_length(config, 16)
    config.axial_pos_embds = False
    refuse_length(config, 16)
