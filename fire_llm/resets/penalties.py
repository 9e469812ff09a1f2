"""Penalties: what an arm adds to the loss of every step, each given by its gradient with respect to one tensor."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from fire_llm.linalg.matmul import exact_products
from fire_llm.resets.methods import register_training

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@register_training("l2_init", kind="penalty", elementwise=True)
def l2_init(w: Tensor, initial: Tensor, *, strength: Strength = 1e-3) -> Tensor:
    """Draw towards the initial weights θ₀: λ·‖θ − θ₀‖² in the loss, λ = `strength`; its gradient is 2λ(θ − θ₀).

    Source: Kumar et al., arXiv 2308.11958, section 3, where λ is swept over 1e-2, 1e-3, 1e-4 and 1e-5.
    """
    return (w - initial) * (2 * strength)


@register_training("parseval", roles=("attention", "mlp"), kind="penalty")
def parseval(
    w: Tensor,
    positions: int = 0,
    *,
    strength: Strength = 1e-3,
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0,
) -> Tensor:
    """Keep rows orthogonal: λ·‖W Wᵀ − s·I‖²_F in the loss, λ = `strength`, s = `scale`.

    Its gradient, 4λ(W Wᵀ − s·I)W, is that of λ·‖Wᵀ W − s·I‖²_F too: the two differ by a constant, (out − in)·s²·λ. So
    the smaller Gram matrix is taken, and a tall matrix, whose rows cannot be orthogonal, gets orthogonal columns. The
    kernel of a convolution is one matrix, (out, in · positions), as in that code.

    Source: Chung et al., arXiv 2412.07224, section 3; λ and s as in the authors' code, at their width of 64.
    """
    if positions:  # the order of columns does not matter
        flat = w.movedim(0, 1).reshape(w.shape[1], -1)
        slope = parseval(flat, strength=strength, scale=scale)
        return slope.reshape(w.shape[1], positions, -1).movedim(1, 0)
    out, into = w.shape
    with exact_products(w.device):
        product = (w @ w.mT) @ w if out <= into else w @ (w.mT @ w)
    return (product - scale * w) * (4 * strength)
