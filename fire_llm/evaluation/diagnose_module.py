"""Measure how plastic any network still is, on a loss and data of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from fire_llm.architectures.modules import ModuleLayout, module_slices
from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.distributed import refuse_engines
from fire_llm.evaluation.diagnose import Plasticity, check_settings, listen, measured, slopes
from fire_llm.evaluation.network import undisturbed
from fire_llm.linalg.activations import Activity, Features


@dataclass(frozen=True)
class ModuleDiagnostics(Plasticity):
    """Measures of a network that is no language model."""

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
    """Measure any network; its mode, gradients, running statistics and the random numbers stay as they are.

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
    activities = {name: Activity() for name in units}
    modules = dict(model.named_modules())
    for name in [*([features] if features is not None else []), *activities]:
        if name not in modules:
            raise UserError(f"the model has no module '{name}'.{did_you_mean(name, modules)}")
    skipped = {} if hessian else {"hessian_eigenvalue": "not asked for"}
    skipped |= {} if features is not None else {"srank": "features names no module"}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        skipped |= dict.fromkeys(["gradient_norm", *["hessian_eigenvalue"] * hessian], "nothing is trained")
    few = batches[:hessian_batches]

    def parts() -> Iterable[Tensor]:
        return (loss(model, batch) / len(few) for batch in few)

    with undisturbed(model):
        feature_rows = _read(modules, partial(loss, model), batches, features, activities)
        of_loss = slopes(parts, trained, (iterations, tolerance, seed) if hessian else None)
    return ModuleDiagnostics(
        **measured(feature_rows, activities, matrices, reference, skipped, delta, tau),
        **of_loss,
        rows=feature_rows.rows,
        batches=len(batches),
        hessian_batches=len(few) if trained else 0,
    )


@torch.no_grad()
def _read(
    modules: dict[str, nn.Module], loss: Any, batches: Sequence[Any], features: str | None, units: dict[str, Activity]
) -> Features:
    """Compute the loss of every batch; gather the inputs of the modules that read features and hidden units."""
    gathered = Features()
    takers: list[tuple[str, Activity | Features]] = [*units.items()]
    takers += [(features, gathered)] if features is not None else []
    with ExitStack() as hooks:
        for name, taker in takers:
            hooks.enter_context(_listen(modules[name], taker.add))
        for batch in batches:
            loss(batch)
    for name, taker in takers:
        if not taker.rows:
            raise UserError(f"'{name}' is not called when the loss is computed: name a module that is")
    return gathered


def _listen(module: nn.Module, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `take` with the module's input, as `listen`, but with the channels of a feature map last."""
    if isinstance(module, _ConvNd):
        axis = -len(module.kernel_size) - 1
        return listen(module, lambda inputs: take(inputs.movedim(axis, -1)))
    return listen(module, take)
