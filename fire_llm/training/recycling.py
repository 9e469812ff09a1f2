"""Recycle hidden units while a `Trainer` trains: find them, judge them by a method, draw them again, count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fire_llm.architectures.hidden_layers import HiddenLayer, hidden_layers
from fire_llm.architectures.names import plain_parameters, unwrap
from fire_llm.core.errors import UserError
from fire_llm.distributed import fsdp_modules, is_dtensor
from fire_llm.models import fresh_like
from fire_llm.resets import ResetSpec
from fire_llm.resets.plan import slices_of
from fire_llm.resets.renewal import Renewal, UnitLayer, generator, within
from fire_llm.resets.spec import parse_one
from fire_llm.resets.unfound import refuse_unfound
from fire_llm.training.beginning import Beginning

RECYCLED = "recycled"
"""Key of a trainer's log: hidden units recycled so far, over all layers."""


def recycled_layers(model: nn.Module, spec: ResetSpec) -> list[HiddenLayer]:
    """Return the hidden layers of a model's MLPs that a method acts on.

    Args:
        model: Unwrapped causal LM, on any device, `meta` included.
        spec: Its roles and exclude decide which layers are left alone, and frozen parameters do.

    Raises:
        UserError: There is none, or the units of an MLP are not rows and columns of matrices (experts).
    """
    refuse_unfound([spec], slices_of(model, [spec], "recycling"))
    layers, unreached = hidden_layers(model, lambda matrix: spec.why_not(matrix) is None)
    if unreached or not layers:
        name, reason = next(iter(unreached.items()), ("every MLP", "excluded or frozen, in part at least"))
        raise UserError(
            f"'{spec.method}' recycles hidden units of dense MLPs, each a row of one or two matrices and a column of "
            f"another (GPT-2, Llama and the like). It cannot reach {name}: {reason}. Leave such parts out with "
            "exclude, or take another method"
        )
    return layers


class RecyclingCallback(TrainerCallback):
    """Train with `redo`, `continual_backprop` or `snr`.

    Works in any `Trainer`; a `ContinualTrainer` also keeps its state in checkpoints, so that a resumed run ends as an
    uninterrupted one. Replicas decide alike, over the tokens of all of them. Of a unit, exactly its rows, its column
    and the optimizer's moments of these change, at the end of a step, before anything is measured or saved.

    Args:
        spec: A method's name, or a spec.
        seed: With the step and the layer it decides what is drawn; no other random generator advances.
        **options: Options of the method, where `spec` is its name: `RecyclingCallback("redo", seed=1, every=100)`.

    Raises:
        UserError: At once, for an unknown method or option, or one of another kind; when training begins, for a model
            whose units are out of reach (experts, FSDP2's shards), or a checkpoint without this method's state.
    """

    def __init__(self, spec: str | Mapping[str, Any] | ResetSpec, *, seed: int, **options: Any) -> None:
        self.spec = parse_one(spec, options, "recycling")
        self.seed = seed
        self.work: Renewal | None = None
        """The layers and the statistics of their units, during training."""
        self._saved: dict[str, Tensor] = {}
        self._beginning, self._trainer = Beginning(), None

    def attach(self, trainer: Any) -> None:
        """Note the `ContinualTrainer` that this runs in, which calls it."""
        self._trainer = trainer

    @property
    def recycled(self) -> int:
        """Return how many units were recycled so far, over all layers."""
        return self.work.recycled if self.work is not None else 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the method, by name."""
        return self.work.tensors() if self.work is not None else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the state of a checkpoint, from `tensors`: training begins with it."""
        self._saved = tensors

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Find the units and the scales at which they are drawn, restore the state, and hook into the model."""
        if self.work is not None:
            self.work.unhook()
        if fsdp_modules(model) or any(map(is_dtensor, model.parameters())) or args.n_gpu > 1:
            raise UserError(
                f"'{self.spec.method}' needs whole weights, which FSDP2 shards and DataParallel copies: train "
                "replicas, one process a device"
            )
        if self._trainer is None:
            self._beginning.again(args, state, model, optimizer)
        model = unwrap(model)
        layers = recycled_layers(model, self.spec)
        scales = _scales(fresh_like(model, self.seed), layers)

        def draw(layer: UnitLayer, units: Tensor, step: int) -> list[Tensor]:
            return [
                torch.randn(len(units), p.shape[1], generator=generator(self.seed, step, self.spec.method, p.name))
                * scales[p.name]
                for p in layer.incoming
            ]

        self.work = Renewal(self.spec, layers, draw)
        if state.global_step:
            self.work.go_on(self._saved)
        if args.torch_compile:
            _guard_hooks()
        self.work.listen()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the step's activations where the method needs them."""
        assert self.work is not None
        self.work.begin(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Judge the units by the step's tokens, and recycle those that the method chooses."""
        assert self.work is not None
        self.work.end(state.global_step, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Count the units beside each training loss; several methods count together."""
        if "loss" in logs:
            for entry in (logs, state.log_history[-1]):
                entry[RECYCLED] = entry.get(RECYCLED, 0) + self.recycled

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the hooks, and free the copy of the weights that training began with."""
        if self.work is not None:
            self.work.unhook()
        self._beginning.end()


def _guard_hooks() -> None:
    """Have torch.compile check a module's hooks before it reuses a graph.

    By default it reuses one without hooks, which an earlier training of the same class in this process has left.
    """
    import torch._dynamo.config as dynamo

    if dynamo.skip_nnmodule_hook_guards:
        dynamo.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # graphs made until now never look


def _scales(fresh: nn.Module, layers: list[HiddenLayer]) -> dict[str, float]:
    """Return the root mean square of newly drawn weights, by slice; transformers draws them about zero."""
    weights = dict(plain_parameters(fresh))
    slices = [slice_ for layer in layers for slice_ in layer.incoming]
    return {p.name: float(within(p, weights[p.parameter]).read().square().mean().sqrt()) for p in slices}
