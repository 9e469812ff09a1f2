"""Measure what a network makes of its data: the rank of its features, the units that have gone dormant.

Both are gathered a batch at a time, in float64. Shapes: n = tokens, d = features, units = width of a hidden layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg.measures import srank


class Features:
    """Gather a feature matrix (n, d) of any n in at most (d, d): the R of its QR decomposition.

    R has the singular values of the features to float64's rounding of the largest, however small they are; of a Gram
    matrix only the square root of that would be left (1e-16 against 1e-8).
    """

    def __init__(self) -> None:
        self.rows = 0
        self._r: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Add rows.

        Args:
            features: (..., d), any floating dtype.

        Raises:
            UserError: They are no rows, of another width than the ones before, or not finite.
        """
        if features.ndim < 2 or (self._r is not None and features.shape[-1] != self._r.shape[1]):
            before = "(..., d)" if self._r is None else f"(..., {self._r.shape[1]})"
            raise UserError(f"features: shape {tuple(features.shape)} is not {before}: give a row a token")
        rows = features.detach().reshape(-1, features.shape[-1])
        if not torch.isfinite(rows).all():
            raise UserError(
                "the features hold NaN or infinity: they have no singular values. Look at the weights first"
            )
        # Twice the width: R is decomposed again with every chunk, which then costs half as much again and no more.
        for chunk in torch.split(rows, 2 * rows.shape[1]):
            stack = chunk.double() if self._r is None else torch.cat([self._r, chunk.double()])
            self._r = torch.linalg.qr(stack, mode="r").R
        self.rows += len(rows)

    @property
    def width(self) -> int:
        """Return d; 0 before the first rows."""
        return 0 if self._r is None else self._r.shape[1]

    def singular_values(self) -> Tensor:
        """Return the (min(n, d),) singular values, descending, float64.

        Raises:
            UserError: There are no rows.
        """
        if self._r is None or not self.rows:
            raise UserError("features: no rows were given")
        sigma: Tensor = torch.linalg.svdvals(self._r)
        return sigma


def feature_srank(features: Tensor, delta: float = 0.01) -> int:
    """Return the least k whose k largest singular values of a feature matrix sum to (1 - delta) of all.

    Args:
        features: (n, d), a row a token. It is at most min(n, d): give many more rows than features.
        delta: Share that may be left out, 0 <= delta < 1.

    Raises:
        UserError: `features` is no matrix, empty or not finite.

    Source: Kumar et al., arXiv 2010.14498, srank_delta.
    """
    gathered = Features()
    gathered.add(features)
    return srank(gathered.singular_values(), delta)


class Activity:
    """Gather the mean |h_j| of every unit of one layer."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Tensor | None = None

    def add(self, activations: Tensor) -> None:
        """Add rows.

        Args:
            activations: (..., units), after the nonlinearity, any floating dtype.

        Raises:
            UserError: They are no rows, or not finite.
        """
        if activations.ndim < 2:
            raise UserError(f"activations: shape {tuple(activations.shape)} is not (..., units): give a row a token")
        rows = activations.detach().reshape(-1, activations.shape[-1])
        total = rows.abs().sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise UserError("the activations hold NaN or infinity: no unit has a score. Look at the weights first")
        self._sum = total if self._sum is None else self._sum + total
        self.rows += len(rows)

    def scores(self) -> Tensor:
        """Return s_j = mean|h_j| / (mean of that over the layer), (units,) float64; zeros where all units are silent.

        Raises:
            UserError: There are no rows.
        """
        if self._sum is None or not self.rows:
            raise UserError("activations: no rows were given")
        mean = self._sum.mean()
        return self._sum / mean if mean > 0 else self._sum


def dormant_scores(activations: Tensor) -> Tensor:
    """Return every unit's score s_j = mean|h_j| / (mean of that over the layer); their mean is 1.

    Args:
        activations: (n, units), after the nonlinearity, a row a token.

    Returns:
        (units,) float64; zeros where all units are silent.

    Raises:
        UserError: `activations` is no matrix, empty or not finite.

    Source: Sokar et al., "The dormant neuron phenomenon", arXiv 2302.12902, equation 1.
    """
    gathered = Activity()
    gathered.add(activations)
    return gathered.scores()


def dormant_share(scores: Tensor, tau: float = 0.025) -> float:
    """Return the share of units whose score is at most tau.

    Args:
        scores: (units,) from `dormant_scores`.
        tau: Threshold; 0.025 is ReDo's (arXiv 2302.12902), FIRE's authors use 0.1 (arXiv 2602.08040).
    """
    return float((scores <= tau).double().mean())
