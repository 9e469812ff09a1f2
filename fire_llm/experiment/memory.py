"""Count from a model's shapes how many bytes a rank holds at the peak of a training step.

Shapes: P = parameters, D = width, I = inner width of an MLP, V = vocabulary, S = tokens of a forward pass, N = shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fire_llm.architectures.matrices import logical_matrices
from fire_llm.core.errors import UserError
from fire_llm.core.flops import layer_configs, layer_runs, layer_sizes

STEPWISE = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")
"""Activations that transformers computes in several operations; unless fused, each keeps its inputs."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that memory depends on: numbers of parameters, and bytes that layers keep of a token."""

    parameters: int
    head: int
    """Parameters of the output head, or of the embedding tied to it: FSDP2 gathers them for the loss."""
    layer: int
    """Parameters of the largest layer."""
    root: int
    """Parameters outside of head, layers and an untied embedding, such as a table of positions."""
    layers: int
    """Layers that a forward pass runs; a layer in a loop counts as often as it runs."""
    width: int
    vocabulary: int
    kept: int
    """Bytes that one layer keeps of a token in 16 bits, norms and activations fused; without the residual stream."""
    unfused: int
    """Additional bytes if torch.compile fuses nothing."""

    def kept_a_token(self, *, checkpointed: bool = False, compiled: bool = True, narrow: bool = False) -> int:
        """Return the bytes that all layers keep for the backward pass of a token in 16 bits.

        Args:
            checkpointed: Whether each layer keeps only its input, and is computed again in the backward pass.
            compiled: Whether torch.compile fuses successive operations.
            narrow: Whether the residual stream is in 16 bits too, as under FSDP2 and bf16-params, and not in fp32.
        """
        stream = (2 if narrow else 4) * self.width
        layer = self.kept + 2 * stream + (0 if compiled else self.unfused)
        return layer + self.layers * stream if checkpointed else self.layers * layer


def sizes(model: Any) -> Sizes | None:
    """Return the sizes of a causal LM on any device, also `meta`; None if its config names no width or layers.

    A layer keeps the inputs of two norms, which are the residual stream. In 16 bits it keeps the norms' outputs, q, k,
    v, attention's output (twice: the projection reads a copy), and the MLP's inner values before and after the
    activation: two of them, or four with a gate (the gate's values and the product too).

    Source: counted as Korthikanti et al. do, arXiv 2205.05198, section 4.1, without dropout and scores.
    """
    text = model.config.get_text_config()
    width, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if width is None or layers is None:
        return None
    bytes_a_layer = [_kept(model, layer, width) for layer in layer_configs(text)]
    kept, unfused = (max(each) for each in zip(*bytes_a_layer, strict=True))
    blocks = layer_sizes(model, layers)
    numbers = {id(p): p.numel() for p in model.parameters()}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    head = sum(p.numel() for p in output.parameters()) if output is not None else 0
    tied = output is not None and getattr(output, "weight", None) is getattr(embedding, "weight", None)
    untied = 0 if tied else sum(p.numel() for p in embedding.parameters())
    total = sum(numbers.values())
    return Sizes(
        parameters=total,
        head=head,
        layer=max(blocks, default=0),
        root=max(0, total - head - untied - sum(blocks)),
        layers=sum(layer_runs(text)),
        width=width,
        vocabulary=int(text.vocab_size),
        kept=kept,
        unfused=unfused,
    )


def _kept(model: nn.Module, layer: Any, width: int) -> tuple[int, int]:
    """Return the bytes that a layer keeps of a token, and the additional bytes if nothing is fused."""
    inner = getattr(layer, "intermediate_size", None) or getattr(layer, "n_inner", None) or 4 * width
    inner = max(inner) if isinstance(inner, list) else inner  # one a layer
    heads = getattr(layer, "num_attention_heads", None) or 1
    head_size = getattr(layer, "head_dim", None) or width // heads
    keys = (getattr(layer, "num_key_value_heads", None) or heads) * head_size
    queries = heads * head_size
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    of_heads = queries + keys if "q_norm" in names else 0
    kept = 4 * width + 6 * queries + 4 * keys + (8 if _gated(model) else 4) * inner + 2 * of_heads
    # A norm that is not torch's own keeps its normalised input beside its input, in fp32.
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    plain = all(isinstance(m, nn.LayerNorm | nn.RMSNorm) for m in norms)
    activation = getattr(layer, "hidden_act", None) or getattr(layer, "activation_function", None)
    unfused = (0 if plain else 8 * width + 4 * of_heads) + (6 * inner if activation in STEPWISE else 0)
    return int(kept), int(unfused)


def _gated(model: Any) -> bool:
    """Return whether the MLPs have a gate, that is three matrices instead of two; true if the layout is unknown."""
    try:
        matrices = [m for m in logical_matrices(model, ["mlp"]) if m.spec is not None and m.spec.index is None]
        matrices = matrices or [*logical_matrices(model, ["mlp"])]
    except UserError:
        return True
    wide = sum(m.shape[0] > m.shape[1] for m in matrices)
    return wide > len(matrices) - wide


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as memory depends on it."""

    tokens: int
    """Tokens of a forward pass."""
    logits: int
    """Logits in memory at once."""
    accumulated: bool = False
    """Whether a step has several passes, whose gradients are added up."""
    half: bool = True
    """Whether products are in 16 bits."""
    narrow: bool = False
    """Whether the residual stream is in 16 bits; under FSDP2 it always is."""
    checkpointed: bool = False
    compiled: bool = True
    at_rest: int = 12
    """Bytes of a parameter between steps: weights and AdamW's moments in fp32, and an average where there is one."""
    a_logit: int = 8
    """Bytes of a logit with its gradient, and with its softmax in fp32 if torch.compile does not fuse it."""
    replicas: bool = False
    """Whether there are several replicas, which exchange gradients in buckets."""
    shards: int = 0
    """Number of FSDP2's shards; 0 without FSDP2."""
    reshard: bool = True
    """Whether layers are gathered again in the backward pass."""
    offload: bool = False
    """Whether shards of weights, gradients and moments are in the host's memory."""
    reduce_bytes: int = 4
    """Bytes of a gradient that ranks exchange."""
    sync_each_batch: bool = False


def peak_bytes(model: Sizes, run: Training) -> int:
    """Return the bytes that a rank holds at the peak of a training step, without an allocator's slack.

    The peak is at one of three moments: when the loss is computed, with all that the layers keep; when the backward
    pass begins, with the head's gradient; or when the optimizer steps, with all gradients.
    """
    cast = 2 if run.half else 4
    narrow = run.half and (run.narrow or run.shards > 0)
    kept = run.tokens * model.kept_a_token(checkpointed=run.checkpointed, compiled=run.compiled, narrow=narrow)
    kept = kept if run.half else 2 * kept
    hidden = run.tokens * model.width * 8  # the trunk's output and its gradient
    loss = run.logits * run.a_logit
    several = 2 if run.tokens * model.vocabulary > run.logits else 1  # slices, whose gradients are added up
    if not run.shards:
        copies = 2 * model.parameters if run.half else 0
        at_rest = model.parameters * (run.at_rest + (4 if run.replicas else 0))
        gradients = 4 * model.parameters if run.accumulated else 0
        return at_rest + max(gradients + copies + kept + hidden + loss + 4 * several * model.head, 4 * model.parameters)
    shard = 0 if run.offload else -(-model.parameters // run.shards)
    at_rest, gradients = run.at_rest * shard, 0
    if run.accumulated:
        gradients = 4 * shard if run.sync_each_batch else run.reduce_bytes * model.parameters
    gathered = cast * (model.head + model.root + (0 if run.reshard else model.parameters - model.head - model.root))
    # In 16 bits, the gradients of slices are in 16 bits and their sum is in fp32.
    head = model.head * ((4 if several > 1 and run.half else 0) + cast * (1 if run.half else several))
    # Two gathered layers, the gradients of one, and the buffer in which ranks exchange them.
    moving = model.layer * (2 * cast + cast + run.reduce_bytes)
    exchanged = run.reduce_bytes * (model.head + model.head // run.shards)
    return at_rest + max(
        gradients + gathered + kept + hidden + loss + head,
        gradients + gathered + kept + hidden + cast * model.head + exchanged,
        gradients + gathered + kept + moving,
        4 * shard,
    )
