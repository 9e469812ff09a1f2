"""Recycle hidden units in a training loop of one's own: the layers are named, in any torch module.

Shapes: units of a hidden layer, P = positions that a flattened feature map has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fire_llm.architectures.lookup import class_of
from fire_llm.architectures.matrices import refuse_uninitialised
from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.resets.memory import refuse_memory, refuse_other_optimizer, refuse_replaced
from fire_llm.resets.renewal import Renewal, UnitLayer, generator
from fire_llm.resets.spec import ResetSpec, parse_one


@dataclass(frozen=True)
class UnitSlot:
    """A tensor of a module, seen as (units, …) where it leads to units, as (out, units, …) where it leads away."""

    parameter: str
    tensor: Tensor
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return it in that shape, outside autograd; do not write into it."""
        return self.tensor.detach().reshape(self.shape)

    def write_(self, new: Tensor) -> None:
        """Write it back."""
        stored = self.tensor.detach()
        stored.copy_(new.reshape(stored.shape))


@dataclass(frozen=True)
class ModuleLayer:
    """The units that one module writes, norms between scale, and another module reads."""

    name: str
    writers: tuple[tuple[str, nn.Module], ...]
    """The module that writes them, and the norms."""
    reader: nn.Module
    incoming: tuple[UnitSlot, ...]
    outgoing: UnitSlot

    @property
    def readers(self) -> tuple[nn.Module]:
        """Return the one module that reads the units."""
        return (self.reader,)

    @property
    def units(self) -> int:
        """Return how many units there are."""
        return self.outgoing.shape[1]

    def rows(self, inputs: Tensor) -> Tensor:
        """Return (..., units) activations; of a feature map each position is a row."""
        if isinstance(self.reader, _ConvNd):
            return inputs.movedim(-len(self.reader.kernel_size) - 1, -1)
        positions = self.outgoing.shape[2]
        return inputs if positions == 1 else inputs.unflatten(-1, (self.units, positions)).transpose(-1, -2)


def named_layers(model: nn.Module, hidden: Iterable[Sequence[str]]) -> list[ModuleLayer]:
    """Find the hidden layers that are named.

    Args:
        model: Unwrapped module.
        hidden: Of each layer the module that writes its units, the norms between if there are any, and the module that
            reads them: `("conv1", "bn1", "conv2")`.

    Raises:
        UserError: There is none, or a name, a kind of module or a shape does not fit.
    """
    if not isinstance(hidden, Iterable):
        raise UserError(f"hidden: {hidden!r} is not allowed: give a list of layers, such as [('fc1', 'fc2')]")
    layers = [_layer(model, names) for names in hidden]
    if not layers:
        raise UserError("hidden: no layer is named; give pairs such as [('fc1', 'fc2')], first the module that writes")
    for which in (0, -1):
        names = [layer.name.split(" → ")[which] for layer in layers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"hidden: '{twice}' {'writes' if which == 0 else 'reads'} units of two layers: name one")
    slots = [slot for layer in layers for slot in (*layer.incoming, layer.outgoing)]
    refuse_memory(slots, slots)
    _refuse_tied(model, slots)
    return layers


def _refuse_tied(model: nn.Module, slots: Iterable[UnitSlot]) -> None:
    """Refuse weights that another module holds too: drawing a unit again would change what that computes."""
    holders: dict[int, list[str]] = {}
    for place, module in model.named_modules():
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            holders.setdefault(id(tensor), []).append(f"{place}.{key}" if place else key)
    for slot in slots:
        if len(names := holders[id(slot.tensor)]) > 1:
            raise UserError(
                f"hidden: '{names[0]}' and '{names[1]}' are one weight, and a unit that is drawn again in one would "
                "change the other: leave that layer out, or untie them"
            )


def _layer(model: nn.Module, names: Sequence[str]) -> ModuleLayer:
    listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not listed or len(names) < 2:
        raise UserError(
            f"hidden: {names!r} is not allowed: name the module that writes the units, norms between, and the one that "
            "reads them, such as ('conv1', 'bn1', 'conv2')"
        )
    known = dict(model.named_modules())
    if unknown := next((name for name in names if name not in known), None):
        raise UserError(f"hidden: the model has no module '{unknown}'.{did_you_mean(unknown, known)}")
    modules = [(name, known[name]) for name in names]
    for name, module in (modules[0], modules[-1]):
        _check_weight(name, module)
    (first, writer), (last, reader) = modules[0], modules[-1]
    weight: Any = writer.weight
    units = weight.shape[0]
    incoming = [UnitSlot(f"{first}.weight", weight, (units, math.prod(weight.shape[1:])))]
    if writer.bias is not None and writer.bias.requires_grad:
        incoming.append(UnitSlot(f"{first}.bias", writer.bias, (units, 1)))
    for name, between in modules[1:-1]:
        incoming += _rows_of(name, between, units)
    return ModuleLayer(
        f"{first} → {last}", tuple(modules[:-1]), reader, tuple(incoming), _outgoing(last, reader, units, writer)
    )


def _check_weight(name: str, module: nn.Module) -> None:
    """Refuse a module whose weight has no row a unit, or whose weight is not the one that is trained."""
    kind = class_of(module).__name__
    if not isinstance(module, (nn.Linear, _ConvNd)) or isinstance(module, _ConvTransposeNd):
        raise UserError(f"hidden: '{name}' is a {kind}: units are written and read by a Linear or a convolution")
    weight = module._parameters.get("weight")
    if weight is None:
        raise UserError(f"hidden: the weight of '{name}' is computed at each pass, so what is written to it is lost")
    refuse_uninitialised(weight, f"{name}.weight")
    if not weight.requires_grad:
        raise UserError(f"hidden: '{name}' is frozen: leave it out, or call requires_grad_(True) first")


def _rows_of(name: str, module: nn.Module, units: int) -> list[UnitSlot]:
    """Return what a norm holds of each unit and is not frozen: scale, shift, and statistics unless all of it is."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for key, tensor in tensors:
        refuse_uninitialised(tensor, f"{name}.{key}")
    by_unit = [(key, tensor) for key, tensor in tensors if tensor.ndim]
    if not hasattr(module, "reset_parameters") or any(tensor.shape[:1] != (units,) for _, tensor in by_unit):
        raise UserError(
            f"hidden: '{name}' is a {class_of(module).__name__} between the two, and does not hold one number for each "
            f"of {units} units: name norms only"
        )
    requires_grad = [parameter.requires_grad for parameter in module.parameters()]
    trained = not requires_grad or any(requires_grad)
    return [
        UnitSlot(f"{name}.{key}", tensor, (units, math.prod(tensor.shape[1:])))
        for key, tensor in by_unit
        if (tensor.requires_grad if isinstance(tensor, nn.Parameter) else trained)
    ]


def _outgoing(name: str, reader: Any, units: int, writer: nn.Module) -> UnitSlot:
    """Return the columns that read each unit, (out, units, …)."""
    out, into = reader.weight.shape[:2]
    positions = into // units
    if isinstance(reader, _ConvNd):
        fits = into == units and reader.groups == 1
    else:
        fits = into == positions * units and (positions == 1 or isinstance(writer, _ConvNd))
    if not fits:
        groups = f" in {reader.groups} groups" if getattr(reader, "groups", 1) > 1 else ""
        raise UserError(f"hidden: '{name}' reads {into} inputs{groups}, and not the {units} units: name its reader")
    return UnitSlot(f"{name}.weight", reader.weight, (out, units, reader.weight.numel() // (out * units)))


def _fresh(module: nn.Module) -> nn.Module:
    """Return a module of the same kind, drawn on the CPU by its own `reset_parameters`; hooks are not copied."""

    def zeros(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {key: None if t is None else torch.zeros_like(t, device="cpu") for key, t in tensors.items()}

    drawn: Any = copy.copy(module)
    parameters = {key: None if t is None else nn.Parameter(t) for key, t in zeros(module._parameters).items()}
    vars(drawn).update(_parameters=parameters, _buffers=zeros(module._buffers))
    drawn.reset_parameters()
    return cast(nn.Module, drawn)


class Recycling:
    """Train any torch module with `redo`, `continual_backprop` or `snr`, in a loop of your own.

        recycling = Recycling(model, "redo", hidden=[("conv1", "bn1", "conv2"), ("conv2", "fc")], seed=1, every=100)
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            recycling.step(optimizer)
            optimizer.zero_grad()

    A unit is an output of the first module, of a convolution a channel, whose activations are taken at all positions.
    What the last module reads is judged: after the nonlinearity. A Linear that reads a flattened feature map reads a
    channel at P positions, one after another, as `flatten(1)` has them. Of a unit that is recycled, what leads to it is
    drawn by the modules' own `reset_parameters`, norms and their statistics too; what leads away is zero, and so are
    the optimizer's moments of both. Replicas under torch.distributed decide alike.

    Args:
        model: Any module, wrapped or not.
        method: A method's name, or a spec with its options.
        hidden: Of each layer the names of the module that writes its units, of norms between, and of the module that
            reads them.
        seed: With the step and the layer it decides what is drawn; no other generator is touched.
        **options: Options of the method, where `method` is its name.

    Raises:
        UserError: For an unknown method, option or module, or one that does not fit; at a step where no activations
            were seen, or with an optimizer whose moments are not a number a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Mapping[str, Any] | ResetSpec,
        *,
        hidden: Iterable[Sequence[str]],
        seed: int = 0,
        **options: Any,
    ) -> None:
        spec = parse_one(method, options, "recycling")
        given = {**options, **(method if isinstance(method, Mapping) else {})}
        if unread := [key for key in ("roles", "include", "exclude", "layers") if key in given]:
            raise UserError(f"{unread[0]}: not read here, where `hidden` names the layers: leave it out")
        self.seed, self.steps = seed, 0
        self._modules = dict(unwrap(model).named_modules())
        self._work = Renewal(spec, named_layers(unwrap(model), hidden), self._draw)
        self._work.begin(1)
        self._work.listen()
        self._slots = [slot for layer in self._work.layers for slot in (*layer.incoming, layer.outgoing)]
        self._optimizer: torch.optim.Optimizer | None = None
        """The optimizer that was last found to train this model."""

    def _draw(self, layer: UnitLayer, units: Tensor, step: int) -> list[Tensor]:
        assert isinstance(layer, ModuleLayer)
        drawn: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(generator(self.seed, step, self._work.spec.method, layer.name).get_state())
            for name, module in layer.writers:
                fresh = _fresh(module)
                tensors = (*fresh.named_parameters(), *fresh.named_buffers())
                drawn |= {f"{name}.{key}": tensor for key, tensor in tensors}
        return [drawn[slot.parameter].detach().reshape(slot.shape)[units] for slot in layer.incoming]

    @property
    def recycled(self) -> int:
        """Return how many units were recycled so far, over all layers."""
        return self._work.recycled

    def step(self, optimizer: Any) -> int:
        """End an optimizer step: recycle what the method names.

        Args:
            optimizer: Whose moments of the recycled units are cleared, or a list of several; call this after its step.

        Returns:
            How many units were recycled.

        Raises:
            UserError: The optimizer is another model's, or the model holds other tensors than it did.
        """
        refuse_replaced(self._modules, self._slots)
        if optimizer is not self._optimizer:
            refuse_other_optimizer(optimizer, self._slots)
            self._optimizer = optimizer
        before = self.recycled
        self.steps += 1
        self._work.end(self.steps, optimizer)
        self._work.begin(self.steps + 1)
        return self.recycled - before

    def remove(self) -> None:
        """Take the hooks out of the model."""
        self._work.unhook()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed loop needs, beside the model's and the optimizer's own."""
        return {"steps": torch.tensor(self.steps), **{key: t.clone() for key, t in self._work.tensors().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            UserError: It is of other layers or of another method.
        """
        saved = dict(state)
        steps = saved.pop("steps", torch.tensor(0))
        self._work.go_on(saved)
        self.steps = int(steps)
        self._work.begin(self.steps + 1)
