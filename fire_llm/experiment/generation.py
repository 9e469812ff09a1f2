"""The prompts of a recipe as tokens, which are checked before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fire_llm.evaluation.generation import Prompts
from fire_llm.experiment.context import RunContext

if TYPE_CHECKING:
    from fire_llm.training import GenerationCallback


def prompts_of(run: RunContext, tokenizer: Any, seed: int = 0) -> Prompts:
    """Return the prompts of a run's recipe as tokens.

    Args:
        run: A run whose recipe has a section `generate`.
        tokenizer: The run's tokenizer.
        seed: The seed of the tokens that are drawn.

    Raises:
        UserError: A prompt does not fit into the context.
    """
    section = run.recipe.generate
    assert section is not None
    how = {"max_new_tokens": section.max_new_tokens, "temperature": section.temperature, "seed": seed}
    return Prompts.of(section.prompts, tokenizer, run.sequence_length, **how)


def check_prompts(run: RunContext, tokenizer: Any = None) -> None:
    """Refuse prompts that are too long.

    Args:
        run: The run, whose recipe may have prompts.
        tokenizer: The run's tokenizer, if it is loaded. If the run has to train one first, nothing is checked without.

    Raises:
        UserError: Naming the first prompt that is too long.
    """
    if run.recipe.generate is not None and (tokenizer is not None or not run.tokenizer_corpora):
        prompts_of(run, tokenizer or run.tokenizer)


def generation(run: RunContext, seed: int) -> GenerationCallback | None:
    """Return the callback that generates text in a stage of a seed; None if the recipe asks for none."""
    from fire_llm.training import GenerationCallback  # the trainer takes seconds to import

    section = run.recipe.generate
    if section is None:
        return None
    return GenerationCallback(prompts_of(run, run.tokenizer, seed), section.every_steps)
