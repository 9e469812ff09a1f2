"""Initial weights from a config and a seed, one parameter in memory at a time: the very numbers `fresh_model` draws.

The model is built once with hollow weights. Whatever would have been drawn is drawn, into scratch, so that the
generator moves on as it would, and what was done to each weight is written down with the generator's state. A weight is
made by doing that again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fire_llm.architectures.matrices import ParameterSlice, slices_by_name
from fire_llm.architectures.names import plain_buffers
from fire_llm.checkpoint.stored import Slices
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import free_memory
from fire_llm.core.progress import progress_bar
from fire_llm.models import fresh_model, model_on_meta

HOLLOW = 1 << 20
"""Elements from which a tensor is kept hollow; smaller ones are real."""

_aten: Any = torch.ops.aten
_EMPTY = (_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty)
_FILLED = {_aten.zeros: 0.0, _aten.ones: 1.0}


@dataclass
class _Step:
    """What was done in place to a view of a weight."""

    function: Any
    view: Tensor
    """The hollow view; it also keeps its storage, by which weights are distinguished, from being freed."""
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    generator: Tensor | None
    """State of the generator before, where the step draws."""


@dataclass
class _Recorder(TorchDispatchMode):
    """Make large tensors hollow (on the meta device) while a model is built, and record what is done to them."""

    advance: Callable[[int], Any]
    """Called with the number of elements after each draw."""
    steps: dict[int, list[_Step]] = field(default_factory=dict)
    """By storage, in the order they were done."""

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        packet = func.overloadpacket
        if packet in _EMPTY or packet in _FILLED:
            return self._made(func, args, options)
        tensors = [a for a in tree_leaves((args, options)) if isinstance(a, Tensor)]
        if not func._schema.is_mutable or not any(t.is_meta for t in tensors):
            return func(*args, **options)  # of hollow tensors only views come of use: reading numbers raises
        target = args[0]
        key = target.untyped_storage()._cdata
        if key not in self.steps or any(t.is_meta for t in tensors if t is not target):
            raise NotImplementedError(f"{func} takes a hollow tensor, whose numbers nobody knows")
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            func(torch.empty(target.shape, dtype=target.dtype), *args[1:], **options)
            self.advance(target.numel())
        arguments = tuple(a.clone() if isinstance(a, Tensor) else a for a in args[1:])
        self.steps[key].append(_Step(func, target.detach(), arguments, options, state))
        return target

    def _made(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        real = options.get("device") or torch.device("cpu")
        made: Tensor = func(*args, **{**options, "device": torch.device("meta")})
        if made.numel() < HOLLOW or torch.device(real).type != "cpu":
            made = func(*args, **options)
            return made
        # The first step fills it, and keeps it, so that no other storage gets its address.
        value = _FILLED.get(func.overloadpacket, float("nan"))
        self.steps[made.untyped_storage()._cdata] = [_Step(_aten.fill_.Scalar, made, (value,), {}, None)]
        return made


class _Pretending(TorchFunctionMode):
    """Make hollow tensors pass for tensors on the CPU: initialisers ask, and skip what is on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]  # stubs call it a bool
            return False
        if func == Tensor.device.__get__ and result.type == "meta":
            return torch.device("cpu")
        return result


class Drawn(Slices):
    """The slices of a freshly drawn model by name, each parameter drawn when it is asked for.

    Args:
        config: A transformers config; it is not modified.
        seed: As `fresh_model` takes it.
        advance: Called with the number of elements after each draw, of which there are about two a weight.
        kind: As in `fresh_model`.

    Raises:
        NotImplementedError: The architecture draws some weights from the numbers of others, which is not followed.
    """

    def __init__(
        self, config: Any, seed: int, advance: Callable[[int], Any] = lambda _: None, kind: Any = None
    ) -> None:
        self._recorder = _Recorder(advance)
        try:
            with self._recorder, _Pretending():
                self.model = fresh_model(copy.deepcopy(config), seed, kind)
        except RuntimeError as error:  # NotImplementedError among them, and reading a number of a hollow tensor
            raise NotImplementedError(str(error)) from error
        for name, parameter in [*self.model.named_parameters(), *plain_buffers(self.model)]:
            if parameter.is_meta and parameter.untyped_storage()._cdata not in self._recorder.steps:
                raise NotImplementedError(f"{name} is made from the numbers of another weight")
        self._last: tuple[int, Tensor | None] = (0, None)
        super().__init__(self.model, self._drawn)

    def _drawn(self, weight: ParameterSlice) -> ParameterSlice:
        if not weight.tensor.is_meta:
            return weight
        return weight.within(self.parameter(weight.tensor)[weight.rows.start : weight.rows.stop])

    @torch.no_grad()
    def parameter(self, hollow: Tensor) -> Tensor:
        """Draw a parameter of the model; the last one is kept."""
        key = hollow.untyped_storage()._cdata
        if self._last[1] is None or self._last[0] != key:
            self._last = (0, None)
            size = hollow.untyped_storage().nbytes() // hollow.element_size()
            storage = torch.empty(size, dtype=hollow.dtype)
            with torch.random.fork_rng(devices=[]):
                for step in self._recorder.steps[key]:
                    if step.generator is not None:
                        torch.set_rng_state(step.generator)
                    view = storage.as_strided(step.view.shape, step.view.stride(), step.view.storage_offset())
                    step.function(view, *step.arguments, **step.options)
            self._last = (key, storage)
        stored = self._last[1]
        assert stored is not None
        return stored.as_strided(hollow.shape, hollow.stride(), hollow.storage_offset())


def draw_initial(
    config: Any, seed: int, progress: bool = False, kind: Any = None
) -> tuple[Any, Mapping[str, ParameterSlice]]:
    """Draw initial weights: the model, hollow or whole, and its slices by name.

    Args:
        config: A transformers config; it is not modified.
        seed: As `fresh_model` takes it.
        progress: Show a progress bar.
        kind: As in `fresh_model`.

    Raises:
        UserError: They can only be drawn all at once, and the memory does not hold a whole model.
    """
    total = sum(p.numel() for p in model_on_meta(copy.deepcopy(config), kind).parameters())
    try:
        with progress_bar("drawing", 2 * total, "weight", shown=progress) as bar:
            drawn = Drawn(config, seed, bar.update, kind)
        return drawn.model, drawn
    except NotImplementedError:
        needed, free = 4 * total, free_memory()
        if free is not None and needed > free:
            raise UserError(
                f"--seed {seed}: drawing the initial weights of this architecture takes {needed / 1e9:.1f} GB of "
                f"memory, and {free / 1e9:.1f} GB are free: draw and save them on a larger machine, and give that "
                "folder as --init"
            ) from None
    model = fresh_model(copy.deepcopy(config), seed, kind)
    return model, slices_by_name(model)
