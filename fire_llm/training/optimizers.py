"""Optimizers and schedules by name: Muon for matrices with AdamW for the rest, and rates as functions of the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fire_llm.architectures.matrices import hidden_matrices
from fire_llm.architectures.names import plain_parameters, unwrap
from fire_llm.core.errors import UserError
from fire_llm.distributed import Block, Placement, Redistribution, cost, is_dtensor, placement_of
from fire_llm.training.arguments import ContinualArguments
from fire_llm.training.schedules import multiplier


def scheduled(optimizer: Any, args: ContinualArguments, steps: int) -> LambdaLR:
    """Return the schedule that `args.schedule` describes, for a phase of so many optimizer steps."""
    warmup = args.get_warmup_steps(steps)
    return LambdaLR(optimizer, partial(multiplier, steps=steps, warmup=warmup, **(args.schedule or {})))


def muon_adamw(model: nn.Module, args: ContinualArguments) -> MuonAdamW:
    """Make the optimizer of a model's trainable parameters: Muon for its hidden matrices, AdamW for the rest.

    Raises:
        UserError: The layout of the model is unknown, or none of its matrices is trained.
    """
    hidden = hidden_matrices(model)
    names: dict[nn.Parameter, str] = {}
    for name, p in plain_parameters(unwrap(model)):
        names.setdefault(p, name)  # the first name of a tied one
    trained = {name: p for p, name in names.items() if p.requires_grad}
    matrices = [p for name, p in trained.items() if name in hidden]
    if not matrices:
        raise UserError(
            "Muon trains two-dimensional matrices of attention and MLPs, and none of the model's is trainable: "
            "take another optimizer"
        )
    rest = [p for name, p in trained.items() if name not in hidden]
    decayed = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": args.weight_decay}
    others = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    return MuonAdamW(
        matrices,
        [decayed, others],
        lr=args.learning_rate,
        muon_lr=args.muon_lr,
        momentum=args.muon_momentum,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=args.optim == "adamw_torch_fused",
    )


class MuonAdamW(torch.optim.Optimizer):
    """Step `torch.optim.Muon` on matrices and `torch.optim.AdamW` on the rest, as one optimizer.

    Groups and state are those of both, matrices first, so that schedules, checkpoints and resets see one optimizer.
    Muon's updates are scaled to the RMS of AdamW's, so that one learning rate and one weight decay serve both.

    Where FSDP2 holds matrices in shards, each is computed whole on one rank, and the result goes back to the shards.
    Ranks share the matrices by their cost. The gradients hold the updates afterwards.

    Args:
        matrices: Two-dimensional parameters.
        others: Groups of the other parameters, for AdamW.
        lr: Peak learning rate.
        muon_lr: That of the matrices; None: `lr`.
        momentum: Share of Muon's momentum that a step keeps.
        weight_decay: Of the matrices.
        betas, eps, fused: AdamW's.

    Source: Jordan et al., Muon, 2024; the scaling, Liu et al., arXiv 2502.16982.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        self._muon = torch.optim.Muon(
            matrices,
            lr=lr if muon_lr is None else muon_lr,
            momentum=momentum,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW([*others], lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        # Loading a state and sharding the model replace the groups and the state.
        for inner in (self._muon, self._adamw):
            inner.param_groups = [g for g in self.param_groups if ("momentum" in g) == (inner is self._muon)]
            inner.state = self.state
        sharded = any(is_dtensor(p) for group in self._muon.param_groups for p in group["params"])
        if sharded:
            self._step_shards()
        else:
            self._muon.step()
        self._adamw.step()
        return loss

    def _step_shards(self) -> None:
        """Do what `torch.optim.Muon` does, each matrix whole on one rank."""
        by_placement: dict[Placement, list[Block]] = defaultdict(list)
        settings: dict[int, dict[str, Any]] = {}
        trained = [(p, group) for group in self._muon.param_groups for p in group["params"] if p.grad is not None]
        for p, group in trained:
            placement = placement_of(p.grad)
            if placement is None:
                raise UserError(
                    f"Muon cannot train a matrix of shape {tuple(p.shape)} that is placed neither whole nor in shards "
                    "along one axis: take adamw, or FSDP2 alone"
                )
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            p.grad.lerp_(state["momentum_buffer"], group["momentum"])  # Nesterov's
            settings[id(p.grad)] = group
            by_placement[placement].append(Block(p.grad, range(p.shape[0]), (), cost(p.shape)))
        for placement, blocks in by_placement.items():
            for mine in Redistribution(placement, blocks):
                for block, matrix in mine:
                    matrix.copy_(_update(matrix, settings[id(block.tensor)]))
        for p, group in trained:
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad)


def _update(direction: Tensor, group: dict[str, Any]) -> Tensor:
    """Return what `torch.optim.Muon` adds to a matrix, learning rate included: its step from zeros.

    Args:
        direction: (out, in), with the momentum.
        group: The matrix's parameter group.
    """
    zeros = nn.Parameter(torch.zeros_like(direction))
    zeros.grad = direction
    settings = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([zeros], momentum=0.0, nesterov=False, weight_decay=0.0, **settings).step()
    return zeros.detach()
