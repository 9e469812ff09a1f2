"""Learning rates that transformers does not have: as functions of the step, which a resumed run evaluates where it is.

    warm-up      cooldown                 constant                decay
    0 ──▶ 1   1 ──cosine──▶ constant   constant ──────▶ constant ──shape──▶ floor

A schedule that goes straight from the warm-up to its constant rate, 1, is WSD; one that cools down to less is infinite.
"""

from __future__ import annotations

import math


def multiplier(
    step: int,
    *,
    steps: int,
    warmup: int,
    decay: int,
    floor: float,
    shape: str,
    cooldown: int = 0,
    constant: float = 1.0,
) -> float:
    """Return what the peak learning rate is multiplied by at a step.

    Args:
        step: Optimizer step, counted from zero; at `steps`, which is never taken, the floor is reached.
        steps: Of the phase; at least warmup + cooldown + decay.
        warmup: Steps of the linear way from 0 to 1.
        decay: Last steps, which lead to `floor`; 0 for none.
        floor: Share of the peak at the end.
        shape: Of the decay: `linear`, `1-sqrt` or `exponential`, which needs a floor above 0.
        cooldown: Steps of the half cosine from 1 to `constant`, after the warm-up.
        constant: Share of the peak between cooldown and decay.

    Source: infinite, Ibrahim et al., arXiv 2403.08763, section 7; Singh et al., arXiv 2503.02844, equation 1.
        WSD, Hu et al., arXiv 2404.06395; its decay `1-sqrt`, Hägele et al., arXiv 2405.18392.
    """
    if step < warmup:
        return step / warmup
    if step < warmup + cooldown:
        return constant + (1 - constant) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / cooldown))
    if not decay or step < steps - decay:
        return constant
    share = (step - (steps - decay)) / decay
    if shape == "exponential":
        return constant * math.pow(floor / constant, share)
    remaining = 1 - (share if shape == "linear" else math.sqrt(share))
    return floor + (constant - floor) * remaining
