"""Measure how plastic a causal LM still is; the measures of any network, and their names in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fire_llm.architectures.hidden_layers import down_projections
from fire_llm.architectures.matrices import ParameterSlice, logical_matrices
from fire_llm.architectures.names import plain_name, plain_parameters, unwrap
from fire_llm.core.errors import UserError
from fire_llm.distributed import refuse_engines
from fire_llm.evaluation.network import Network, sample, undisturbed
from fire_llm.linalg.activations import Activity, Features, dormant_share
from fire_llm.linalg.curvature import Loss, gradient_norm, top_hessian_eigenvalue
from fire_llm.linalg.measures import dfi, sfe, srank

MEASURES = (
    "srank", "srank_share", "dormant_share", "hessian_eigenvalue", "hessian_residual", "gradient_norm", "dfi_mean",
    "dfi_median", "sfe",
)  # fmt: skip
"""The numbers among the fields of `Diagnostics`."""
LOG_PREFIX = "diag_"
"""Prefix of these names in a training log."""


@dataclass(frozen=True)
class Plasticity:
    """Measures of any network and their settings; a measure is None if `not_measured` says why it was not taken."""

    srank: int | None
    """srank_delta of the features, the input of the last layer; a language model's features are its hidden states."""
    srank_share: float | None
    """srank over the width of the features."""
    dormant_share: float | None
    """Share of the hidden units whose score is at most tau; a language model's hidden units are those of its MLPs."""
    hessian_eigenvalue: float | None
    """Eigenvalue of the Hessian of the loss (mean NLL, nats per token) with the largest magnitude, with its sign."""
    hessian_residual: float | None
    """||H x - eigenvalue x||: some eigenvalue lies within this distance."""
    gradient_norm: float | None
    """Norm of the gradient of the loss on the same data, over all trainable parameters."""
    dfi_mean: float
    """Mean DfI of the logical matrices; `dfi_median` and `sfe` are of the same matrices."""
    dfi_median: float
    sfe: float | None
    """Total SFE against the reference."""
    dormant: dict[str, float]
    """Dormant share of each layer, by the name of the module that reads its units: in an MLP the down projection."""
    not_measured: dict[str, str]
    """By field, why it was not measured; `dormant` may lack some layers."""
    delta: float
    tau: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def measures(self) -> dict[str, float]:
        """Return the measures by name, for a log: those that were taken, and none of single layers."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Diagnostics(Plasticity):
    """Measures of a causal LM on a text."""

    tokens: int
    """Tokens read for the features and the units."""
    hessian_tokens: int
    """Tokens predicted for the Hessian and the gradient."""
    context: int
    roles: tuple[str, ...]


def diagnose(
    model: nn.Module,
    tokens: Any,
    *,
    context: int | None = None,
    sequences: int = 16,
    batch_size: int = 4,
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    roles: Iterable[str] = ("attention", "mlp"),
    delta: float = 0.01,
    tau: float = 0.025,
    hessian: bool = True,
    hessian_sequences: int = 4,
    iterations: int = 20,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Diagnostics:
    """Measure a causal LM on a text; its mode, gradients, attention and the random numbers stay as they are.

    All in fp32 (fp64 for fp64 weights), however the model is stored or trained: the rounding of bf16 alone fills a
    feature matrix to nearly its full rank. Shards are the exception: they are run as they are, and without the Hessian
    and the gradient. On several ranks every rank must call this, with the same tokens; each does all of the work.

    Args:
        model: From transformers, wrapped or not, of a known layout.
        tokens: (N,) token ids: a tensor, an array, a memory map or a list.
        context: Tokens a sequence; the model's longest by default, at most 1024 and what the text holds.
        sequences: Sequences read for features and units, evenly spaced, fewer where the text is short. No srank
            exceeds sequences x context: read several times as many tokens as the model is wide.
        batch_size: Sequences a forward pass; it changes memory and speed, not what is measured.
        reference: What SFE is taken from: a model, or tensors by the names of the parameters.
        roles: Roles of the matrices whose DfI and SFE are taken, as in `logical_matrices`.
        delta: See `measures.srank`.
        tau: See `activations.dormant_share`.
        hessian: Whether to measure the Hessian, by far the costliest part.
        hessian_sequences: How many of the sequences serve the Hessian and the gradient.
        iterations: See `curvature.top_hessian_eigenvalue`, like the next two.
        tolerance: Relative change at which it stops.
        seed: Of its first vector.

    Raises:
        UserError: For a setting out of range, too few tokens or such as the model does not know, an unknown layout, no
            causal head, a reference of another architecture, an operation without a second derivative, FSDP1 or
            DeepSpeed; and, by name, for what is not finite.
    """
    check_settings(
        delta, tau, sequences=sequences, batch_size=batch_size, hessian_sequences=hessian_sequences,
        iterations=iterations,
    )  # fmt: skip
    refuse_engines(model)
    model, roles = unwrap(model), (roles,) if isinstance(roles, str) else tuple(roles)
    matrices = list(logical_matrices(model, roles))
    if not matrices:
        raise UserError(f"the model holds no matrix of the roles {', '.join(roles)}: choose other roles")
    ids = sample(model, tokens, context, sequences).to(next(model.parameters()).device)
    few = ids[:: -(-len(ids) // hessian_sequences)]
    skipped = {} if hessian else {"hessian_eigenvalue": "not asked for"}
    with undisturbed(model):
        network = Network(model)
        features, activities = _read(network, ids[:, :-1], batch_size, skipped)
        if not network.trained:
            reason = "the weights lie in shards" if network.sharded else "no parameter requires gradients"
            skipped |= {"gradient_norm": reason} | ({"hessian_eigenvalue": reason} if hessian else {})
        loss, power_iteration = partial(network.losses, few), (iterations, tolerance, seed)
        of_loss = slopes(loss, network.trained, power_iteration if hessian else None)
    return Diagnostics(
        **measured(features, activities, matrices, reference, skipped, delta, tau),
        **of_loss,
        tokens=ids[:, 1:].numel(),
        hessian_tokens=few[:, 1:].numel() if network.trained else 0,
        context=ids.shape[1] - 1,
        roles=roles,
    )


def measured(
    features: Features,
    activities: Mapping[str, Activity],
    matrices: Sequence[ParameterSlice],
    reference: nn.Module | Mapping[str, Tensor] | None,
    skipped: dict[str, str],
    delta: float,
    tau: float,
) -> dict[str, Any]:
    """Return the fields of `Plasticity` about features, units and matrices."""
    deviations, moved = _distances(matrices, reference)
    if moved is None:
        skipped["sfe"] = "no reference was given"
    rank = srank(features.singular_values(), delta) if features.rows else None
    scores = {name: activity.scores() for name, activity in activities.items()}
    return {
        "srank": rank,
        "srank_share": None if rank is None else rank / features.width,
        "dormant_share": dormant_share(torch.cat([*scores.values()]), tau) if scores else None,
        "dfi_mean": fmean(deviations),
        "dfi_median": median(deviations),
        "sfe": moved,
        "dormant": {name: dormant_share(units, tau) for name, units in scores.items()},
        "not_measured": skipped,
        "delta": delta,
        "tau": tau,
    }


def slopes(loss: Loss, trained: Sequence[Tensor], hessian: tuple[int, float, int] | None) -> dict[str, Any]:
    """Return the fields of `Plasticity` about gradient and Hessian, None where nothing is trained.

    `hessian` holds iterations, tolerance and seed of `top_hessian_eigenvalue`; None leaves the Hessian out.
    """
    gradient = gradient_norm(loss, trained) if trained else None
    top = top_hessian_eigenvalue(loss, trained, *hessian) if trained and hessian else None
    eigenvalue, residual = (top.value, top.residual) if top else (None, None)
    return {"gradient_norm": gradient, "hessian_eigenvalue": eigenvalue, "hessian_residual": residual}


def check_settings(delta: float, tau: float, **counts: int) -> None:
    """Refuse settings that are out of range."""
    if not 0 <= delta < 1 or tau < 0:
        raise UserError(f"delta {delta} must lie in [0, 1) and tau {tau} must not be negative")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}: {value} is not a number of {name.rpartition('_')[2]}; give 1 or more")


@torch.no_grad()
def _read(
    network: Network, ids: Tensor, batch_size: int, skipped: dict[str, str]
) -> tuple[Features, dict[str, Activity]]:
    """Read the sequences once; gather the inputs of the head and of every down projection."""
    features = Features()
    projections, missing = down_projections(network.model)
    activities = {name: Activity() for name in projections}
    model: Any = network.model
    head = model.get_output_embeddings()
    with ExitStack() as hooks:
        for name, readers in projections.items():
            for reader in readers:
                hooks.enter_context(listen(reader, activities[name].add))
        if head is not None:
            hooks.enter_context(listen(head, features.add))
        for batch in ids.split(batch_size):
            network.logits(batch)
    if not features.rows:
        skipped["srank"] = "the model has no one module as its head, or does not call it"
    if unreached := [name for name, activity in activities.items() if not activity.rows]:
        missing["no token reached it"] = unreached
    if missing:
        skipped["dormant"] = "; ".join(f"{_some(names)}: {reason}" for reason, names in missing.items())
    return features, {name: activity for name, activity in activities.items() if activity.rows}


def listen(module: nn.Module, take: Callable[[Tensor], object]) -> RemovableHandle:
    """Call `take` with the module's input before each of its forward passes, until the handle is closed."""
    return module.register_forward_pre_hook(lambda _, inputs: take(inputs[0]))


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _distances(
    matrices: Sequence[ParameterSlice], reference: nn.Module | Mapping[str, Tensor] | None
) -> tuple[list[float], float | None]:
    """Return the DfI of every matrix, and their total SFE; sharded parameters are gathered one at a time."""
    if isinstance(reference, nn.Module):
        reference = dict(plain_parameters(unwrap(reference)))
    if reference is not None:
        reference = {plain_name(name): tensor for name, tensor in reference.items()}
    deviations, total = [], 0.0
    parameter, whole, other = None, torch.empty(0), torch.empty(0)
    for matrix in matrices:
        if matrix.parameter != parameter:
            parameter, whole = matrix.parameter, _whole(matrix.tensor)
            if reference is not None:
                other = _whole(_counterpart(reference, parameter, whole))
        rows = slice(matrix.rows.start, matrix.rows.stop)
        values = matrix.within(whole[rows]).read()
        for plane in values if values.ndim == 3 else [values]:  # a kernel has a matrix at each of its positions
            deviation = dfi(plane)
            if deviation != deviation or deviation == float("inf"):
                raise UserError(
                    f"'{matrix.name}' holds NaN or infinity: it has no DfI. Go back to an earlier checkpoint"
                )
            deviations.append(deviation)
        total += sfe(values, matrix.within(other[rows]).read()) if reference is not None else 0.0
    return deviations, None if reference is None else total


def _counterpart(reference: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    tensor = reference.get(name)
    if tensor is None or tensor.shape != like.shape:
        shape = "no tensor" if tensor is None else f"the shape {tuple(tensor.shape)}"
        raise UserError(
            f"reference: '{name}' has {shape} there and {tuple(like.shape)} here: give a model of one architecture"
        )
    return tensor


def _whole(tensor: Tensor) -> Tensor:
    gather: Any = getattr(tensor.detach(), "full_tensor", None)
    return gather() if gather is not None else tensor.detach()
