"""Compute how many steps a phase has, and how the tokens of a step divide into forward passes."""

from __future__ import annotations

import math

from fire_llm.core.errors import UserError
from fire_llm.core.hardware import accelerator_memory, resolve_precision
from fire_llm.core.ranks import launched_in_shards
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import PhaseSection

CPU_TOKENS, ACCELERATOR_TOKENS, MOST_TOKENS = 4_096, 16_384, 65_536
"""Tokens of a forward pass: on a CPU; on an accelerator if its memory or the model is unknown; at most."""

KEPT_SHARE = 0.3
"""The share of an accelerator's memory for the activations that a forward pass keeps for its backward pass."""


def phase_steps(phase: PhaseSection, tokens_per_step: int, epoch_tokens: int) -> int:
    """Return a phase's optimizer steps; an epoch is as many tokens as its corpora hold together."""
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is not None:
        return math.ceil(phase.tokens / tokens_per_step)
    return max(1, int((phase.epochs or 1) * epoch_tokens) // tokens_per_step)


def split_batch(
    run: RunContext, world: int, memory: int | None = None, *, checkpointed: bool | None = None
) -> tuple[int, int]:
    """Return (sequences a forward pass, forward passes a step) of each rank.

    Args:
        run: The run whose batch is divided.
        world: The number of ranks.
        memory: Bytes of each rank's accelerator, 0 for none; by default, this machine's.
        checkpointed: Whether activations are checkpointed; by default, as the recipe says.

    Raises:
        UserError: The tokens of a step do not divide evenly.
    """
    batch, length = run.recipe.batch, run.sequence_length
    tokens, given = batch.tokens_per_step, batch.sequences_per_device
    if tokens % (length * world):
        near = max(1, round(tokens / (length * world))) * length * world
        raise UserError(
            f"batch.tokens_per_step: {tokens} does not divide into sequences of {length} tokens "
            f"on {world} process(es). The nearest that does is {near}"
        )
    sequences = tokens // (length * world)
    if given is not None and sequences % given:
        raise UserError(
            f"batch.sequences_per_device: {given} does not divide the {sequences} sequences a process has a step"
        )
    if given is None:
        checkpointed = run.recipe.gradient_checkpointing if checkpointed is None else checkpointed
        most = max(1, _tokens_at_once(run, accelerator_memory() if memory is None else memory, checkpointed) // length)
        given = max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)
    return given, sequences // given


def _tokens_at_once(run: RunContext, memory: int, checkpointed: bool) -> int:
    """Return how many tokens a forward pass takes. More tokens use a GPU better, until its memory is full."""
    if memory == 0:
        return CPU_TOKENS
    if memory < 0 or run.sizes is None:
        return ACCELERATOR_TOKENS
    compiled = run.recipe.compile is not False and not launched_in_shards()
    kept = run.sizes.kept_a_token(checkpointed=checkpointed, compiled=compiled)
    kept *= 2 if resolve_precision(run.recipe.precision) == "fp32" else 1
    return min(MOST_TOKENS, int(KEPT_SHARE * memory / kept))
