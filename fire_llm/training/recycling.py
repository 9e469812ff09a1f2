"""Recycle hidden units while a `Trainer` trains: found in the model, judged by a method, drawn again, counted.

Shapes: width of the residual stream, units of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from fire_llm.architectures.hidden_layers import HiddenLayer, hidden_layers
from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.architectures.names import plain_parameters, unwrap
from fire_llm.core.errors import UserError
from fire_llm.distributed import active, fsdp_modules, is_sharded
from fire_llm.models import fresh_model
from fire_llm.resets import RESETS, ResetSpec, parse_resets
from fire_llm.resets.plan import slices_of
from fire_llm.resets.recycling import Recycler
from fire_llm.resets.spec import refuse_kinds
from fire_llm.resets.unfound import refuse_unfound
from fire_llm.training.beginning import Beginning

RECYCLED = "recycled"
"""Key of a trainer's log: hidden units recycled so far, over all layers."""


def recycled_layers(model: nn.Module, spec: ResetSpec) -> list[HiddenLayer]:
    """Return the hidden layers of a model's MLPs that a method is to act on.

    Args:
        model: Unwrapped causal LM, on any device, `meta` included.
        spec: Its roles and exclude, and what is frozen, decide which layers are left alone.

    Raises:
        UserError: There is none, or units of an MLP lie elsewhere than in rows and columns of matrices (experts).
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


def _within(slice_: ParameterSlice, tensor: Tensor) -> ParameterSlice:
    """Return the same slice of a tensor of its parameter's shape, such as a moment of an optimizer."""
    return replace(slice_, tensor=tensor.detach()[:, None] if tensor.ndim == 1 else tensor)


class RecyclingCallback(TrainerCallback):
    """Train with `redo`, `continual_backprop` or `snr`.

    Works in any `Trainer`; a `ContinualTrainer` also keeps its state in checkpoints, so that a run that was cut off
    ends as if it had not been. Replicas decide alike, over the tokens of all of them. Of a unit, exactly its rows, its
    column and the optimizer's moments of these change, at the end of a step: what is then measured or saved has it.

    Args:
        spec: A method's name, or a spec.
        seed: With the step and the layer it decides what is drawn; no other generator is touched.
        **options: Options of the method, where `spec` is its name: `RecyclingCallback("redo", seed=1, every=100)`.

    Raises:
        UserError: At once, for an unknown method or option, or one of another kind; when training begins, for a model
            whose units are out of reach (experts, FSDP2's shards), or a checkpoint without this method's state.
    """

    def __init__(self, spec: str | Mapping[str, Any] | ResetSpec, *, seed: int, **options: Any) -> None:
        [self.spec] = parse_resets(spec, options)
        refuse_kinds([self.spec], "recycling")
        self.seed = seed
        self.recycled = 0
        self.layers: list[HiddenLayer] = []
        self.recyclers: list[Recycler] = []
        self._listening = False
        self._hooks: list[Any] = []
        self._scales: dict[str, float] = {}
        self._saved: dict[str, Tensor] = {}
        self._checked = False
        self._beginning, self._trainer = Beginning(), None

    def attach(self, trainer: Any) -> None:
        """Note the `ContinualTrainer` that this runs in, which calls it."""
        self._trainer = trainer

    def tensors(self) -> dict[str, Tensor]:
        """Return what lasts from step to step, by name."""
        found = {"recycled": torch.tensor(self.recycled)}
        for layer, recycler in zip(self.layers, self.recyclers, strict=True):
            found |= {f"{layer.name}.{key}": getattr(recycler, key) for key in recycler.kept}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Keep what `tensors` returned when a checkpoint was written; training goes on from it when it begins."""
        self._saved = tensors

    def _go_on(self) -> None:
        saved, own = self._saved, self.tensors()
        if {key: t.shape for key, t in saved.items()} != {key: t.shape for key, t in own.items()}:
            raise UserError(
                f"the checkpoint holds no state of '{self.spec.method}' for this model: go on from one of a run with "
                "the same arm, or start over"
            )
        self.recycled = int(saved["recycled"])
        for key, tensor in own.items():
            tensor.copy_(saved[key])

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Find the units, the scales at which they are drawn, and what a checkpoint kept; hook into the model."""
        self._unhook()
        if fsdp_modules(model) or any(map(is_sharded, model.parameters())) or args.n_gpu > 1:
            raise UserError(
                f"'{self.spec.method}' needs whole weights, which FSDP2 shards and DataParallel copies: train "
                "replicas, one process a device"
            )
        if self._trainer is None:
            self._beginning.again(args, state, model, optimizer)
        model = unwrap(model)
        self.layers = recycled_layers(model, self.spec)
        make = RESETS[self.spec.method].function
        self.recyclers = [make(e.units, e.outgoing.tensor.device, **self.spec.options) for e in self.layers]
        self.recycled, self._checked = 0, False
        self._scales = _scales(fresh_model(model.config, self.seed), self.layers)
        if state.global_step:
            self._go_on()
        if args.torch_compile:
            _guard_hooks()
        for layer, recycler in zip(self.layers, self.recyclers, strict=True):
            self._hooks.append(layer.reader.register_forward_pre_hook(self._listener(recycler)))

    def _listener(self, recycler: Recycler) -> Any:
        def listen(module: nn.Module, inputs: Any) -> None:
            if self._listening and module.training:  # not while something is measured
                recycler.observe(inputs[0])

        return listen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the step's activations where the method wants them."""
        self._listening = self.recyclers[0].wants(state.global_step + 1)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Judge the units by the step's tokens, and recycle those that the method names."""
        if not self._checked:  # at the first step that has moments, not at the first unit, hours later
            self._checked = any([*_moments(optimizer, p)] for e in self.layers for p in (*e.incoming, e.outgoing))
        if not self._listening:
            return
        sums = torch.cat([r.sums for r in self.recyclers])
        if active():
            dist.all_reduce(sums)
        masks = []
        for layer, recycler, whole in zip(self.layers, self.recyclers, self._split(sums), strict=True):
            recycler.sums.copy_(whole)
            masks.append(torch.cat([whole[-1:] == 0, recycler.pop_stale(layer.outgoing.read().abs().sum(0))]))
        # The one time a step that the host waits.
        for number, mask in enumerate(self._split(torch.cat(masks).cpu())):
            if mask[0]:
                name = self.layers[number].name
                raise UserError(f"'{self.spec.method}': no token passed the module of '{name}': exclude that MLP")
            units = mask[1:].nonzero().flatten()
            if len(units):
                self._renew(number, units, state.global_step, optimizer)

    def _split(self, joined: Tensor) -> tuple[Tensor, ...]:
        return torch.split(joined, [layer.units + 1 for layer in self.layers])

    def _renew(self, number: int, units: Tensor, step: int, optimizer: Any) -> None:
        """Draw incoming rows of a layer's units again, and zero their outgoing columns and all moments of both.

        Args:
            number: Of the layer.
            units: (n,) int64 on the CPU.
            step: Optimizer steps so far.
            optimizer: Whose moments are cleared.
        """
        layer = self.layers[number]
        self.recycled += len(units)
        here = units.to(layer.outgoing.tensor.device)
        for slice_ in layer.incoming:
            generator = _generator(self.seed, step, self.spec.method, slice_.name)
            drawn = torch.randn(len(units), slice_.shape[1], generator=generator)
            _put(slice_, 0, here, drawn * self._scales[slice_.name], optimizer)
        _put(layer.outgoing, 1, here, torch.zeros(layer.outgoing.shape[0], len(units)), optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Count the units beside each training loss; several methods count together."""
        if "loss" in logs:
            for entry in (logs, state.log_history[-1]):
                entry[RECYCLED] = entry.get(RECYCLED, 0) + self.recycled

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks out of the model, and let go of the weights that training began with."""
        self._unhook()
        self._beginning.end()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _guard_hooks() -> None:
    """Have torch.compile look at a module's hooks before it takes a graph; by default one made without them is taken.

    Such a graph was left by an earlier training of the same class in this process, and would leave the hooks out.
    """
    import torch._dynamo.config as dynamo

    if dynamo.skip_nnmodule_hook_guards:
        dynamo.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # graphs made until now never look


def _scales(fresh: nn.Module, layers: list[HiddenLayer]) -> dict[str, float]:
    """Return the root mean square that newly drawn weights have, by slice: transformers draws them about zero."""
    weights = dict(plain_parameters(fresh))
    slices = [slice_ for layer in layers for slice_ in layer.incoming]
    return {p.name: float(_within(p, weights[p.parameter]).read().square().mean().sqrt()) for p in slices}


def _generator(*what: Any) -> torch.Generator:
    """Return a generator of its own for each step and slice."""
    digest = blake2b(repr(what).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _put(slice_: ParameterSlice, axis: int, units: Tensor, values: Tensor, optimizer: Any) -> None:
    """Write rows (axis 0) or columns (axis 1) of a slice, and zero the optimizer's moments of them.

    The optimizer's count of steps is one for a whole tensor, and stays.
    """
    for tensor in (slice_.tensor, *_moments(optimizer, slice_)):
        where = _within(slice_, tensor)
        whole = where.read().clone()
        whole.index_copy_(axis, units, values.to(whole))
        where.write_(whole)
        values = torch.zeros_like(values)


def _moments(optimizer: Any, slice_: ParameterSlice) -> Iterator[Tensor]:
    """Yield what an optimizer keeps of a slice's parameter, a number a weight.

    Raises:
        UserError: It keeps something else (Adafactor, 8-bit moments).
    """
    parameter = slice_.tensor
    for key, kept in optimizer.state.get(parameter, {}).items():
        if not isinstance(kept, Tensor) or kept.numel() == 1:
            continue
        if kept.shape != parameter.shape or not kept.is_floating_point():
            raise UserError(
                f"the optimizer's '{key}' of '{slice_.parameter}' is not one number a weight, so that a unit's part of "
                "it cannot be cleared: take adamw or muon"
            )
        yield kept
