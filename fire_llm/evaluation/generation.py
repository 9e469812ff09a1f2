"""Text that a model writes after prompts, for people to read; the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError
from fire_llm.distributed import active, fsdp_modules
from fire_llm.evaluation.measurement import first_token
from fire_llm.evaluation.precision import device_of, evaluating, own_precision


@dataclass(frozen=True)
class Prompts:
    """Prompts as tokens of one tokenizer, and the settings of generation."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    """Token ids of each text, after the prefix token that is also read before held-out text: so none is empty."""
    tokenizer: Any
    max_new_tokens: int
    temperature: float = 0.0
    """Divisor of the logits before a token is drawn; 0 always takes the likeliest token."""
    seed: int = 0
    """Seed of the draws, set again before each prompt."""

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Any, context: int, **how: Any) -> Prompts:
        """Return prompts as tokens.

        Args:
            texts: One or more; after "" the model writes freely.
            tokenizer: A tokenizer of transformers.
            context: Tokens that the model is trained to read; a prompt and the new tokens must fit into it.
            **how: `max_new_tokens`, `temperature` and `seed`.

        Raises:
            UserError: For a prompt that is too long, with the numbers.
        """
        first = first_token(tokenizer)
        ids = [[first, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        new = how["max_new_tokens"]
        for n, (text, own) in enumerate(zip(texts, ids, strict=True)):
            if len(own) + new > context:
                room = context - len(own)
                instead = f"at most {room} are left for max_new_tokens" if room > 0 else "shorten it"
                raise UserError(
                    f"generate.prompts[{n}]: {text[:40]!r} takes {len(own)} tokens, the one that is read first "
                    f"included, and with {new} new ones more than the context, {context}: {instead}"
                )
        return cls(texts, ids, tokenizer, **how)


@torch.no_grad()
def continuations(model: Any, prompts: Prompts) -> list[str]:
    """Return what a causal LM writes after each prompt, to the end-of-text token or `max_new_tokens`.

    It uses transformers' `generate` in the precision of the weights, without the checkpoint's generation settings.
    Modes, settings and random numbers are left as they were. On several ranks every rank must call this.

    Raises:
        UserError: The model has no `generate`.
    """
    inner: Any = unwrap(model)
    if not (hasattr(inner, "can_generate") and inner.can_generate()):
        raise UserError(f"generate: {type(inner).__name__} cannot write text; leave generate out")
    device, tokenizer = device_of(inner), prompts.tokenizer
    written = []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device.index] if device.type == "cuda" else []))
        for block in (own_precision(inner), evaluating(inner), _own_settings(inner, prompts)):
            stack.enter_context(block)
        for ids in prompts.ids:
            torch.manual_seed(prompts.seed)
            prompt = torch.tensor([ids], device=device)
            synced = active() and bool(fsdp_modules(inner))
            text = inner.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), synced_gpus=synced)
            written.append(tokenizer.decode(text[0, len(ids) :], skip_special_tokens=True))
    return written


@contextmanager
def _own_settings(model: Any, prompts: Prompts) -> Iterator[None]:
    """Let `generate` follow the prompts' settings alone inside the block."""
    from transformers import GenerationConfig

    end = prompts.tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": prompts.temperature, "top_k": 0, "remove_invalid_values": True}
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=prompts.max_new_tokens,
        eos_token_id=end,
        pad_token_id=0 if end is None else end,
        use_cache=True,
        **(drawn if prompts.temperature > 0 else {"do_sample": False}),
    )
    try:
        yield
    finally:
        model.generation_config = before
