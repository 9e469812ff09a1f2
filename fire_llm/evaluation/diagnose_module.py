"""Measure how plastic any network still is, on a loss and data of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fire_llm.architectures.modules import ModuleLayout, module_slices
from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.distributed import refuse_engines
from fire_llm.evaluation.diagnose import Plasticity, check_settings, listen, measured
from fire_llm.evaluation.network import undisturbed
from fire_llm.linalg.activations import Activity, Features
from fire_llm.linalg.curvature import gradient_norm, top_hessian_eigenvalue


@dataclass(frozen=True)
class ModuleDiagnostics(Plasticity):
    """What was measured of a network that is no language model."""

    rows: int
    """Rows of the feature matrix: samples, or the positions of all of them."""
    batches: int
    """Batches read for the features and the units."""
    hessian_batches: int
    """Batches read for the Hessian and the gradient."""


def diagnose_module(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Sequence[Any],
    *,
    features: str | None = None,
    units: Iterable[str] = (),
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    split: Any = None,
    delta: float = 0.01,
    tau: float = 0.025,
    hessian: bool = True,
    hessian_batches: int = 1,
    iterations: int = 20,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> ModuleDiagnostics:
    """Measure any network, and leave it as found: mode, gradients, running statistics, random numbers.

        found = diagnose_module(
            model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), [(images, labels)],
            features="head", units=["conv2", "head"], reference=model_before,
        )

    Args:
        model: Any module in fp32 or fp64, wrapped or not.
        loss: Given the model and a batch, the mean loss of the batch.
        batches: What `loss` takes, of equal sizes.
        features: Name of the module that reads the features: their srank is taken. Of a convolution's input a channel
            is a feature, and each position is a row.
        units: Names of the modules that read hidden units: what goes in, after the nonlinearity, is looked at.
        reference: What SFE is taken from: a model, or tensors by the names of the parameters.
        split: Weights that hold several matrices, as in `apply_reset(…, layout="modules")`. DfI and SFE are of the
            matrices of that layout, those of a convolution one at each position of its kernel.
        delta: See `measures.srank`.
        tau: See `activations.dormant_share`.
        hessian: Whether to measure the Hessian, by far the costliest part.
        hessian_batches: How many of the batches serve the Hessian and the gradient.
        iterations: See `curvature.top_hessian_eigenvalue`, like the next two.
        tolerance: Relative change at which it stops.
        seed: Of its first vector.

    Raises:
        UserError: For a setting out of range, no batches, a module that is not there or not called, a model without
            matrices, a reference of another architecture, an operation without a second derivative, FSDP or DeepSpeed;
            and, by name, for what is not finite.
    """
    check_settings(delta, tau, hessian_batches=hessian_batches, iterations=iterations)
    refuse_engines(model)
    model = unwrap(model)
    if not len(batches):
        raise UserError("batches: none are given, and nothing can be measured without data")
    matrices = [p for p in module_slices(model, ModuleLayout.of(split), buffers=False) if p.matrix]
    if not matrices:
        raise UserError("the model holds no matrix (Linear, convolution, MultiheadAttention): there is no DfI")
    readers = dict(model.named_modules())
    wanted = [*([features] if features is not None else []), *units]
    if unknown := next((name for name in wanted if name not in readers), None):
        raise UserError(f"the model has no module '{unknown}'.{did_you_mean(unknown, readers)}")
    skipped = {} if hessian else {"hessian_eigenvalue": "not asked for"}
    skipped |= {} if features is not None else {"srank": "features names no module"}
    seen, activities = Features(), {name: Activity() for name in wanted[features is not None :]}
    trained = [p for p in model.parameters() if p.requires_grad]
    few = batches[:hessian_batches]

    def parts() -> Iterable[Tensor]:
        return (loss(model, batch) / len(few) for batch in few)

    top, gradient = None, None
    with undisturbed(model):
        hooks = [_listen(readers[name], activity.add) for name, activity in activities.items()]
        hooks += [_listen(readers[features], seen.add)] if features is not None else []
        try:
            with torch.no_grad():
                for batch in batches:
                    loss(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if trained:
            gradient = gradient_norm(parts, trained)
            top = top_hessian_eigenvalue(parts, trained, iterations, tolerance, seed) if hessian else None
        else:
            skipped |= dict.fromkeys(["gradient_norm", *["hessian_eigenvalue"] * hessian], "nothing is trained")
    calls = {name: activity.rows for name, activity in activities.items()}
    calls |= {features: seen.rows} if features is not None else {}
    if silent := [name for name, rows in calls.items() if not rows]:
        raise UserError(f"'{silent[0]}' is not called when the loss is computed: name a module that is")
    return ModuleDiagnostics(
        **measured(seen, activities, matrices, reference, skipped, delta, tau),
        hessian_eigenvalue=top.value if top else None,
        hessian_residual=top.residual if top else None,
        gradient_norm=gradient,
        rows=seen.rows,
        batches=len(batches),
        hessian_batches=len(few) if gradient is not None else 0,
    )


def _listen(module: nn.Module, take: Callable[[Tensor], None]) -> Any:
    """Pass a module's input on, its channels last where it is a feature map."""
    if isinstance(module, _ConvNd):
        axis = -len(module.kernel_size) - 1
        return listen(module, lambda inputs: take(inputs.movedim(axis, -1)))
    return listen(module, take)
