"""Carry out what `recycling` decides: listen to hidden layers, judge their units, draw them again, clear their moments.

Shapes: units of a hidden layer. Weights that lead to units have them along axis 0, weights that lead away along axis 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fire_llm.core.errors import UserError
from fire_llm.distributed import active, optimizer_states
from fire_llm.resets.methods import RESETS
from fire_llm.resets.recycling import Recycler
from fire_llm.resets.spec import ResetSpec


class UnitLayer(Protocol):
    """One hidden layer: the weights of its units, and the modules that read them."""

    @property
    def name(self) -> str:
        """Return what the layer is called in messages and states."""

    @property
    def readers(self) -> Sequence[nn.Module]:
        """Return the modules whose input holds the activations; several share the weights of the layer."""

    @property
    def incoming(self) -> Sequence[Any]:
        """Return slices of what leads to the units: dataclasses with `tensor`, `parameter`, `read` and `write_`."""

    @property
    def outgoing(self) -> Any:
        """Return the slice of what leads away."""

    @property
    def units(self) -> int:
        """Return how many units there are."""

    def rows(self, inputs: Tensor) -> Tensor:
        """Return (..., units) activations, given what the reader reads."""


Draw = Callable[[UnitLayer, Tensor, int], Sequence[Tensor]]
"""Draws the incoming slices of a layer's units, (n,) on the CPU, after a step: one tensor (n, …) a slice."""


class Renewal:
    """The hidden layers that one method recycles, from step to step.

    Args:
        spec: The method with its options.
        layers: What it acts on.
        draw: How units are drawn again.
    """

    def __init__(self, spec: ResetSpec, layers: Sequence[UnitLayer], draw: Draw) -> None:
        make = RESETS[spec.method].function
        self.spec, self.layers, self.draw = spec, layers, draw
        self.recyclers: list[Recycler] = [make(e.units, e.outgoing.tensor.device, **spec.options) for e in layers]
        self.recycled = 0
        self.listening = False
        self._hooks: list[Any] = []
        self._checked = False

    def tensors(self) -> dict[str, Tensor]:
        """Return what lasts from step to step, by name."""
        tensors = {"recycled": torch.tensor(self.recycled)}
        for layer, recycler in zip(self.layers, self.recyclers, strict=True):
            tensors |= {f"{layer.name}.{key}": getattr(recycler, key) for key in recycler.kept}
        return tensors

    def go_on(self, saved: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned.

        Raises:
            UserError: It is of other layers or of another method.
        """
        own = self.tensors()
        if {key: t.shape for key, t in saved.items()} != {key: t.shape for key, t in own.items()}:
            raise UserError(
                f"the checkpoint holds no state of '{self.spec.method}' for this model: go on from one of a run with "
                "the same arm, or start over"
            )
        self.recycled = int(saved["recycled"])
        for key, tensor in own.items():
            tensor.copy_(saved[key])

    def listen(self) -> None:
        """Hook into the readers; activations count while `listening`, in training mode."""
        for layer, recycler in zip(self.layers, self.recyclers, strict=True):
            hook = partial(self._hear, layer, recycler)
            self._hooks += [reader.register_forward_pre_hook(hook, with_kwargs=True) for reader in layer.readers]

    def _hear(self, layer: UnitLayer, recycler: Recycler, module: nn.Module, inputs: Any, named: Any) -> None:
        """Observe what a reader is about to read, but not while something is measured."""
        if self.listening and module.training:
            recycler.observe(layer.rows(inputs[0] if inputs else next(iter(named.values()))))

    def unhook(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, step: int) -> None:
        """Begin an optimizer step, counted from 1: its activations are read where the method wants them."""
        self.listening = self.recyclers[0].wants(step)

    @torch.no_grad()
    def end(self, step: int, optimizer: Any) -> None:
        """Judge the units by the step's activations, on all ranks alike, and renew those that the method names.

        Raises:
            UserError: Nothing passed a reader, or the optimizer keeps what cannot be cleared for a unit.
        """
        if not self._checked:  # at the first step that has moments, not at the first unit, hours later
            self._checked = any([*moments(optimizer, p)] for e in self.layers for p in (*e.incoming, e.outgoing))
        if not self.listening:
            return
        sums = torch.cat([r.sums for r in self.recyclers])
        if active():
            dist.all_reduce(sums)
        masks = []  # of each layer: whether it saw no token, and of each unit, whether it is stale
        for layer, recycler, total in zip(self.layers, self.recyclers, self._split(sums), strict=True):
            recycler.sums.copy_(total)
            weights = layer.outgoing.read().abs()
            outgoing = weights.sum(dim=[axis for axis in range(weights.ndim) if axis != 1])
            masks.append(torch.cat([total[-1:] == 0, recycler.pop_stale(outgoing)]))
        stale: dict[int, Tensor] = {}
        for number, mask in enumerate(self._split(torch.cat(masks).cpu())):  # the one time a step that the host waits
            if mask[0]:
                raise UserError(
                    f"'{self.spec.method}': no token passed the module of '{self.layers[number].name}': exclude that "
                    "layer; a network that is no language model has to be in training mode"
                )
            if mask[1:].any():
                stale[number] = mask[1:].nonzero().flatten()
        self.renew(stale, step, optimizer)

    def _split(self, joined: Tensor) -> tuple[Tensor, ...]:
        return torch.split(joined, [layer.units + 1 for layer in self.layers])

    def renew(self, stale: dict[int, Tensor], step: int, optimizer: Any) -> None:
        """Draw what leads to units again, and then zero what leads away from them, and all moments of both.

        Where one layer reads another, what leads from a new unit to a new unit is zero too.

        Args:
            stale: By number of the layer, (n,) int64 on the CPU.
            step: Optimizer steps so far.
            optimizer: Whose moments are cleared.
        """
        for number, units in stale.items():
            layer = self.layers[number]
            self.recycled += len(units)
            for slice_, drawn in zip(layer.incoming, self.draw(layer, units, step), strict=True):
                _put(slice_, 0, units, drawn, optimizer)
        for number, units in stale.items():
            _put(self.layers[number].outgoing, 1, units, None, optimizer)


def generator(*what: Any) -> torch.Generator:
    """Return a generator of its own for each seed, step and slice."""
    digest = blake2b(repr(what).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def within(slice_: Any, tensor: Tensor) -> Any:
    """Return the same slice of a tensor of its parameter's shape, such as a moment of an optimizer."""
    return replace(slice_, tensor=tensor.detach()[:, None] if tensor.ndim == 1 else tensor)


def _put(slice_: Any, axis: int, units: Tensor, values: Tensor | None, optimizer: Any) -> None:
    """Write what a slice holds for units, zeros where no values are given, and zero the optimizer's moments of it.

    The optimizer's count of steps is one for a whole tensor, and stays.
    """
    units = units.to(slice_.tensor.device)
    for tensor in (slice_.tensor, *moments(optimizer, slice_)):
        part = within(slice_, tensor)
        new = part.read().clone()
        if values is None:
            new.index_fill_(axis, units, 0)
        else:
            new.index_copy_(axis, units, values.to(new))
        part.write_(new)
        values = None  # the moments, which come next, are zeroed


MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
    "sum",
}  # fmt: skip
"""Means and sums of gradients that torch's optimizers keep a number a weight of, by their names; 0 clears them."""


def moments(optimizer: Any, slice_: Any) -> Iterator[Tensor]:
    """Yield the moments that an optimizer keeps of a slice's parameter, a number a weight.

    Raises:
        UserError: It keeps something else: rows and columns (Adafactor), 8-bit moments, weights (schedule-free).
    """
    parameter = slice_.tensor
    for key, state in (item for held in optimizer_states(optimizer) for item in held.get(parameter, {}).items()):
        if not isinstance(state, Tensor) or (state.numel() == 1 and state.shape != parameter.shape):
            continue
        number_a_weight = state.shape == parameter.shape and state.is_floating_point()
        if not number_a_weight or key not in MOMENTS:
            what = "a moment that is known" if number_a_weight else "one number a weight"
            raise UserError(
                f"the optimizer's '{key}' of '{slice_.parameter}' is not {what}, so that a unit's part of it cannot be "
                "cleared: take adamw or muon"
            )
        yield state
