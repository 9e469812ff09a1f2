"""Methods that reinitialise hidden units of an MLP while training goes on: which units of a layer, step by step.

Pure decisions: activations in, a mask of units out. A trainer's callback listens to the model, adds up over
micro-batches and ranks, and changes the weights. A unit's activation h is what the MLP's last matrix reads: after the
nonlinearity, and in a gated MLP (SwiGLU) after the product with the gate. A gated unit is a row of gate, a row of up
and a column of down; the papers have no gated MLPs.

Of every unit that is reinitialised, incoming rows are drawn as the model's initialisation draws them, the outgoing
column is zero, and so are the optimizer's moments of both, as in all three papers. What the model computes then changes
only by what the unit had put out. Shapes: tokens of a step, units of a layer.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fire_llm.resets.methods import register_training

Steps = Annotated[int, Field(ge=1)]


class Recycler:
    """Sums of what the units of one hidden layer do in a step, and which of them are reinitialised after it.

    Args:
        units: Width of the layer.
        device: Where the sums live.
    """

    kept: tuple[str, ...] = ()
    """Attributes that last from step to step: (units,) tensors, or ()."""

    def __init__(self, units: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(units + 1, device=device)
        """Of the step so far, what `measure` gives, and last the tokens."""

    def wants(self, step: int) -> bool:
        """Return whether the tokens of an optimizer step, counted from 1, are looked at."""
        return True

    def measure(self, h: Tensor) -> Tensor:
        """Return (units,) sums over the rows of (tokens, units) activations."""
        return h.abs().sum(0, dtype=torch.float32)

    def observe(self, h: Tensor) -> None:
        """Add the activations of a micro-batch; the host waits for nothing.

        Args:
            h: (..., units), any floating dtype.
        """
        rows = h.detach().reshape(-1, h.shape[-1])
        self.sums[:-1] += self.measure(rows)
        self.sums[-1] += rows.shape[0]

    def pop_stale(self, outgoing: Tensor) -> Tensor:
        """End a step: return which units are reinitialised, forget their past, and begin the next step's sums.

        Args:
            outgoing: (units,) Σ|w| over each unit's outgoing weights.

        Returns:
            (units,) bool.
        """
        mask = self._judge(self.sums[:-1], self.sums[-1], outgoing)
        self.sums.zero_()
        return mask

    def _judge(self, sums: Tensor, tokens: Tensor, outgoing: Tensor) -> Tensor:
        raise NotImplementedError


@register_training("redo", roles=("mlp",), kind="recycling")
class ReDo(Recycler):
    """Recycle dormant units: every so many steps those with mean|h| at most `threshold` times the layer's mean of it.

    The mean is over the tokens of that step. The test is the paper's for any activation; a GELU or SiLU unit is seldom
    exactly silent, so that little is recycled at the paper's threshold.
    Source: Sokar et al., arXiv 2302.12902, equation 1 and algorithm 1.
    """

    def __init__(
        self,
        units: int,
        device: torch.device | str = "cpu",
        *,
        every: Steps = 1000,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.025,
    ) -> None:
        super().__init__(units, device)
        self.every, self.threshold = every, threshold

    def wants(self, step: int) -> bool:
        """Return whether a step is one after which units are recycled."""
        return step % self.every == 0

    def _judge(self, sums: Tensor, tokens: Tensor, outgoing: Tensor) -> Tensor:
        return sums <= self.threshold * sums.mean()


@register_training("continual_backprop", roles=("mlp",), kind="recycling")
class ContinualBackprop(Recycler):
    """Replace the least useful of the mature units at a steady rate.

    Utility u ← `decay`·u + (1 − `decay`)·mean|h|·Σ|w_out| a step, the mean over its tokens. Units older than `maturity`
    steps are mature; a share `rate` of them is due each step, and the whole part of what is due is replaced, the rest
    waits. A new unit has no utility and no age. As in the authors' code, u is compared after division by 1 − decay^age,
    so that a unit is not the least useful for its youth, and as many are replaced as are due; their pseudo-code
    replaces one a step and layer at most. Their code also moves what a replaced unit put out on average into the next
    bias; this does not.
    Source: Dohare et al., Nature 632 (2024), algorithm 1 (arXiv 2306.13812).
    """

    kept = ("utility", "age", "due")

    def __init__(
        self,
        units: int,
        device: torch.device | str = "cpu",
        *,
        rate: Annotated[float, Field(ge=0, le=1)] = 1e-4,
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.99,
        maturity: Annotated[int, Field(ge=0)] = 100,
    ) -> None:
        super().__init__(units, device)
        self.rate, self.decay, self.maturity = rate, decay, maturity
        self.utility = torch.zeros(units, device=device)
        self.age = torch.zeros(units, dtype=torch.int64, device=device)
        self.due = torch.zeros((), device=device)

    def _judge(self, sums: Tensor, tokens: Tensor, outgoing: Tensor) -> Tensor:
        self.age += 1
        utility = self.decay * self.utility + (1 - self.decay) * sums / tokens * outgoing
        self.utility = torch.where(utility.isfinite(), utility, self.utility)  # a step that overflowed is left out
        mature = self.age > self.maturity
        self.due += self.rate * mature.sum()
        comparable = self.utility / (1 - self.decay**self.age)
        least = torch.where(mature, comparable, torch.inf).argsort(stable=True)
        place = torch.empty_like(least).scatter_(0, least, torch.arange(len(least), device=least.device))
        mask = mature & (place < self.due.floor())
        self.due -= mask.sum()
        self.utility.masked_fill_(mask, 0)
        self.age.masked_fill_(mask, 0)
        return mask


@register_training("snr", roles=("mlp",), kind="recycling")
class SelfNormalizedResets(Recycler):
    """Reset a unit that has been silent for longer than it ever is: P(A ≥ a) ≤ `eta`, a the steps since it last fired.

    A unit fires in a step where h > 0 for one token at least; GELU and SiLU are positive where their input is, and in a
    gated MLP the product is looked at. A, the time between two firings in steps, is taken to be memoryless, so that its
    mean over the unit's past, since the phase began or it was reset, gives its law: reset where exp(−a / mean) ≤ eta. A
    first time of one step is assumed, so that a unit that never fires is found too. Time in steps, this law and this
    beginning are those of the authors' code for language models. A geometric law would reset no later, often sooner:
    (1 − 1/mean)^a ≤ exp(−a / mean). That code takes the mean again at random times, and doubles a threshold that the
    mean has outgrown; here all of a unit's past counts.
    Source: Farias & Jozefiak, arXiv 2410.20098, algorithm 1.
    """

    kept = ("silent", "waited", "firings")

    def __init__(
        self,
        units: int,
        device: torch.device | str = "cpu",
        *,
        eta: Annotated[float, Field(gt=0, lt=1)] = 0.01,
    ) -> None:
        super().__init__(units, device)
        self.eta = eta
        self.silent = torch.zeros(units, dtype=torch.int64, device=device)
        self.waited = torch.ones_like(self.silent)
        self.firings = torch.ones_like(self.silent)

    def measure(self, h: Tensor) -> Tensor:
        """Return (units,) numbers of tokens that each unit fires for."""
        return (h > 0).sum(0, dtype=torch.float32)

    def _judge(self, sums: Tensor, tokens: Tensor, outgoing: Tensor) -> Tensor:
        fired = sums > 0
        self.silent += 1
        self.waited += self.silent * fired
        self.firings += fired
        self.silent.masked_fill_(fired, 0)
        mask = self.silent >= -math.log(self.eta) * self.waited / self.firings
        for past, beginning in ((self.silent, 0), (self.waited, 1), (self.firings, 1)):
            past.masked_fill_(mask, beginning)
        return mask
