"""A simulated GPU: tensors that say `cuda:0`, compute on the CPU, and log what a real GPU would make the host wait for.

`with simulated_cuda() as log:` patches torch's probes, so that code on the accelerator's branches runs on a machine
without one. What it tells:

- `log.waits`: where the host waits for the device: `item` (bool, int, float, tolist), shapes that depend on data
  (`nonzero`, masks as indices, `unique`), blocking copies to the host, checks inside `linalg`, `synchronize`.
- `log.uploads`: blocking copies to the device. CUDA waits for these too, but for what is queued before them alone.
- A tensor of the device beside one of the CPU with dimensions raises RuntimeError, as on CUDA.
- A copy to pinned memory that nobody waits for holds NaN (integers: their least value) until the host has waited.

What it does not: kernels' own rounding, Triton, times, memory, streams side by side, several devices, threads,
torch.compile.

C++ sees the tensors on `meta`: its autograd engine insists on a driver for `cuda`. Hence autocast is done in Python.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch._dynamo  # before torch's functions are patched: it lists them
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
PACKAGE = str(Path(__file__).parents[2] / "fire_llm")
LIBRARIES = (str(Path(torch.__file__).parent), __file__, contextlib.__file__, functools.__file__, "<")

SHAPES_FROM_DATA = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "bincount", "multinomial",
}  # fmt: skip
READS = {"_local_scalar_dense", "equal", "allclose"}
CHECKED_LINALG = {"_linalg_eigh", "_linalg_svd", "_linalg_eigvals", "linalg_eig", "_linalg_check_errors"}
ONE_DEVICE = {"cat", "stack", "mm", "bmm", "addmm", "baddbmm", "index_add_", "index_add", "gather", "scatter_add_"}

_inside = threading.local()  # its `depth`: how many calls with simulated tensors are running in C++
_log: Log | None = None


@dataclass(frozen=True)
class Wait:
    """Hold one wait of the host."""

    kind: str
    """item, shape, copy, linalg, synchronize, event or upload."""
    op: str
    ours: str | None
    """Innermost frame in the package: `fire_llm/resets/execute.py:194 _measured`."""
    cause: str
    """Innermost frame outside torch."""

    def __str__(self) -> str:
        more = f" ({self.cause})" if self.ours and self.cause != self.ours else ""
        return f"{self.kind} {self.op} at {self.ours or self.cause}{more}"


@dataclass
class Log:
    """Hold what happened to the simulated device."""

    waits: list[Wait] = field(default_factory=list)
    uploads: list[Wait] = field(default_factory=list)
    attention: list[tuple[bool, bool]] = field(default_factory=list)
    """Calls of scaled_dot_product_attention: whether with a mask, whether causal."""
    pinned: dict[int, Tensor] = field(default_factory=dict)
    pending: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    clock: int = 0
    paused: bool = False

    def note(self, kind: str, op: str, until: int | None = None) -> None:
        """Note a wait; copies that were queued before it have arrived (those before `until`, for an event)."""
        if kind != "upload":
            self.arrive(until)
        if not self.paused:
            (self.uploads if kind == "upload" else self.waits).append(Wait(kind, op, *_frames()))

    def arrive(self, until: int | None = None) -> None:
        """Let queued copies to pinned memory arrive."""
        left = []
        for number, target, source in self.pending:
            if until is None or number <= until:
                with torch.inference_mode(source.is_inference() or target.is_inference()), torch.no_grad():
                    target.copy_(source)
            else:
                left.append((number, target, source))
        self.pending = left

    def queue(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy to pinned memory, whose target holds what must not be used yet."""
        self.clock += 1
        self.pending.append((self.clock, target, source.clone()))
        if target.is_floating_point():
            target.fill_(float("nan"))
        elif target.dtype != torch.bool:
            target.fill_(torch.iinfo(target.dtype).min)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Log no waits inside: what the test itself reads."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def clear(self) -> None:
        """Forget the waits so far."""
        self.waits.clear()
        self.uploads.clear()
        self.attention.clear()

    def where(self) -> dict[str, int]:
        """Count the waits by what caused them."""
        return dict(Counter(map(str, self.waits)))


def _frames() -> tuple[str | None, str]:
    frame, ours, cause = sys._getframe(1), None, "?"
    while frame is not None and ours is None:
        file = frame.f_code.co_filename
        if not file.startswith(LIBRARIES):
            inside = file.startswith(PACKAGE)
            short = f"fire_llm{file[len(PACKAGE) :]}" if inside else "/".join(Path(file).parts[-3:])
            short = f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
            cause = short if cause == "?" else cause
            ours = short if inside else None
        frame = frame.f_back
    return ours, cause


# ---- the tensor


class Simulated(Tensor):
    """Stand for a tensor of `cuda:0`; `inner` is the CPU tensor that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Simulated:
        if inner.is_inference() != torch.is_inference_mode_enabled():  # a view in inference mode of what is older
            with torch.inference_mode(inner.is_inference()):
                return Simulated(inner)
        it = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=META,
        )  # fmt: skip
        it.inner = inner
        return it

    def __init__(self, inner: Tensor) -> None:
        super().__init__()

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, new: self._replace(new))

    def get_device(self) -> int:
        return 0

    def _replace(self, new: Tensor) -> None:
        if not isinstance(new, Simulated):
            raise NotImplementedError("simulated: .data is set to a tensor of another device")
        if new.shape != self.shape or new.dtype != self.dtype:
            raise NotImplementedError("simulated: .data is set to a tensor of another shape or dtype")
        self.inner = new.inner

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _to(self, *args, **kwargs)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return self.to(CPU)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def __setitem__(self, where: Any, value: Any) -> None:
        if isinstance(value, bool | int | float):  # torch keeps the numbers that CUDA's tensors are set to on the host
            value = torch.tensor(value, dtype=self.dtype)
        with _running(), torch._C.DisableTorchFunctionSubclass():
            super().__setitem__(where, value)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist() if self.ndim else self.item()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    __array__ = numpy

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def type(self, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return self.inner.type().replace("torch.", "torch.cuda.")
        return self.to(dtype) if isinstance(dtype, torch.dtype) else NotImplemented

    def __repr__(self, **kwargs: Any) -> str:
        return f"simulated cuda:0 {self.inner!r}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulated:
        if id(self) not in memo:
            new = Simulated(self.inner.detach().clone()).requires_grad_(self.requires_grad)
            if hasattr(self, "_is_param"):
                new._is_param = True
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Simulated:
        return Simulated(inner["inner"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _autocast(name, args, kwargs)
        if name == "scaled_dot_product_attention" and _log is not None:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            given |= kwargs
            _log.attention.append((given.get("attn_mask") is not None, bool(given.get("is_causal", False))))
        with _running(), torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


_torch_to = Tensor.to


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do as `Tensor.to`, which asks CUDA's driver for the current device."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    elif "other" in kwargs:
        other = kwargs.pop("other")
        args = (other.device, other.dtype, *args)
    copy = kwargs.pop("copy", False)
    if len(args) > 1 and isinstance(args[-1], bool) and isinstance(args[-2], bool):
        copy, args = args[-1], args[:-1]
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or self.device, dtype or self.dtype
    kind = {"memory_format": layout} if layout is not None else {}
    if "cuda" not in (device.type, self.device.type):
        return _torch_to(self, device, dtype, non_blocking, copy, **kind)
    if device.type == self.device.type and dtype == self.dtype and not copy and layout in (None, torch.preserve_format):
        return self
    device = CUDA if device.type == "cuda" else device
    with _running(), torch._C.DisableTorchFunctionSubclass():
        return torch.ops.aten._to_copy(self, dtype=dtype, device=device, non_blocking=non_blocking, **kind)


@contextlib.contextmanager
def _running() -> Iterator[None]:
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        yield
    finally:
        _inside.depth -= 1


# ---- autocast, by torch's own lists of 2.11 and 2.13 (ATen/autocast_mode.h)

LOW = {
    "conv1d", "conv2d", "conv3d", "prelu", "addmm", "addmv", "addr", "matmul", "__matmul__", "__rmatmul__",
    "einsum", "mm", "mv", "vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "multi_dot",
    "scaled_dot_product_attention",
}  # fmt: skip
FP32 = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow", "__pow__", "__rpow__", "softplus", "layer_norm", "native_layer_norm", "rms_norm",
    "group_norm", "norm", "cosine_similarity", "nll_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss",
    "mse_loss", "binary_cross_entropy_with_logits", "dist", "cdist", "logsumexp", "cross_entropy",
}  # fmt: skip
FP32_DTYPE = {
    "prod", "softmax", "log_softmax", "cumprod", "cumsum", "vector_norm", "matrix_norm", "sum",
}  # fmt: skip
WIDEST = {
    "addcdiv", "addcmul", "atan2", "cross", "dot", "vdot", "index_put", "tensordot", "scatter_add",
}  # fmt: skip


def _autocast(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if name in LOW:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in FP32 or (name in FP32_DTYPE and kwargs.get("dtype") is None):
        dtype = torch.float32
    elif name in WIDEST:
        floats = [x.dtype for x in args if isinstance(x, Simulated) and x.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, floats, torch.get_autocast_dtype("cuda"))
    else:
        return args, kwargs

    def cast(x: Any) -> Any:
        fits = isinstance(x, Simulated) and x.is_floating_point() and x.dtype not in (torch.float64, dtype)
        return x.to(dtype) if fits else x

    return _map(cast, args), _map(cast, kwargs)


# ---- every operation


def _map(function: Callable[[Any], Any], it: Any) -> Any:
    if isinstance(it, list | tuple):
        items = [_map(function, x) for x in it]
        return type(it)(*items) if hasattr(it, "_fields") else type(it)(items)
    return {k: _map(function, x) for k, x in it.items()} if isinstance(it, dict) else function(it)


def _unwrapped(x: Any) -> Any:
    return x.inner if isinstance(x, Simulated) else x


def _wrapped(x: Any) -> Any:
    return Simulated(x) if isinstance(x, Tensor) and not isinstance(x, Simulated) else x


@dataclass(frozen=True)
class Operation:
    """Hold what a schema says of an operation."""

    name: str
    composite: bool
    written: tuple[tuple[int, str, str], ...]
    """Arguments that are written to: place, name, and the set of aliases they belong to."""
    returned: tuple[str | None, ...]
    """For each result, the aliases that it is of an argument that was written to; None of what is new or a view."""

    @staticmethod
    @functools.cache
    def of(func: Any) -> Operation:
        def alias(it: Any) -> str | None:
            info = it.alias_info
            return next(iter(info.before_set), "") if info is not None and info.is_write else None

        schema = func._schema
        written = [(i, x.name, found) for i, x in enumerate(schema.arguments) if (found := alias(x)) is not None]
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        name = schema.name.partition("::")[2]
        return Operation(name, composite, tuple(written), tuple(map(alias, schema.returns)))


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    _gather(args, tensors)
    _gather(kwargs.values(), tensors)
    ours = [x for x in tensors if isinstance(x, Simulated)]
    target = kwargs.get("device")
    if not ours and target is None and "pin_memory" not in kwargs:
        return func(*args, **kwargs)
    operation = Operation.of(func)
    if ours and operation.composite:  # inference mode leaves it to us to take these apart
        with _running(), _Factories():
            return func.decompose(*args, **kwargs)
    target = torch.device(target) if target is not None else None
    if target == META and getattr(_inside, "depth", 0):
        target = CUDA  # C++ asks for the device of the tensors it was given
    on_device = target.type == "cuda" if target is not None else bool(ours)
    if kwargs.pop("pin_memory", None) and not on_device:
        return _pin(func(*args, **kwargs))
    if not ours and not on_device:
        return func(*args, **kwargs)
    if target is not None:
        kwargs["device"] = CPU if on_device else target
    log, name = _log or Log(), operation.name
    if name in ("_to_copy", "copy_"):
        return _copy(func, name, args, kwargs, on_device, log)
    _check_devices(func, name, args, kwargs, tensors, ours)
    _note_wait(func, name, args, kwargs, log)
    if name in ("mm", "bmm", "addmm", "baddbmm") and func._overloadname.startswith("dtype"):
        result = _wide_product(func, args, kwargs)
    else:
        result = func(*_map(_unwrapped, args), **_map(_unwrapped, kwargs))
    return _returned(operation, args, kwargs, result, on_device)


def _gather(it: Any, tensors: list[Tensor]) -> None:
    for x in it:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, list | tuple):
            _gather(x, tensors)


def _returned(operation: Operation, args: Any, kwargs: Any, result: Any, on_device: bool) -> Any:
    """Wrap what is new; give back the very tensors that were written to."""
    written: dict[str, Any] = {}
    for place, name, aliases in operation.written:
        value = args[place] if place < len(args) else kwargs.get(name)
        written[aliases] = value
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, Simulated) and x.inner.shape != x.shape:
                raise NotImplementedError(f"simulated: {operation.name} changes a tensor's shape in place")
    returned = operation.returned
    results = list(result) if len(returned) > 1 else [result][: len(returned)]
    for i, aliases in enumerate(returned):
        if aliases is not None:
            results[i] = written[aliases]
        elif on_device:
            results[i] = _map(_wrapped, results[i])
    return tuple(results) if len(returned) > 1 else next(iter(results), None)


def _copy(func: Any, name: str, args: Any, kwargs: Any, on_device: bool, log: Log) -> Any:
    """Copy within the device, to it or from it."""
    non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
    source = args[1] if name == "copy_" else args[0]
    to_device = isinstance(args[0], Simulated) if name == "copy_" else on_device
    from_device = isinstance(source, Simulated)
    if to_device and not from_device and not (non_blocking and _pinned(source)):
        log.note("upload", name)
    if name == "_to_copy":
        result = func(_unwrapped(source), **kwargs)
        if to_device:
            return Simulated(result)
        if from_device and result.device == CPU:
            if non_blocking:
                log.queue(_pin(result), result)  # torch gives pinned memory then
            else:
                log.note("copy", name)
        return result
    if from_device and not to_device and non_blocking and _pinned(args[0]):
        log.queue(args[0], source.inner.to(args[0].dtype).expand_as(args[0]))
        return args[0]
    if from_device and not to_device:
        log.note("copy", name)
    func(_unwrapped(args[0]), _unwrapped(source))
    return args[0]


def _check_devices(func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], ours: list[Simulated]) -> None:
    """Refuse a mix of devices as CUDA does."""
    if ours and name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # indices may lie on the host
        tensors = [args[0], *args[2:3]]
    for x in tensors if ours else ():
        strict = x.ndim > 0 or name in ONE_DEVICE or name.startswith("_fused_")
        if not isinstance(x, Simulated) and x.device != META and (strict or (x is args[0] and name.endswith("_"))):
            found = "expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"E{found[1:]} ({func}, {tuple(x.shape)} is on the cpu)")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in Generator.made:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _note_wait(func: Any, name: str, args: Any, kwargs: Any, log: Log) -> None:
    """Note what CUDA makes the host wait for."""
    if name in READS:
        log.note("item", name)
    elif name in SHAPES_FROM_DATA or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        log.note("shape", name)
    elif name in CHECKED_LINALG:
        log.note("linalg", name)
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        one = name != "index" and args[2].numel() == 1 and not isinstance(args[2], Simulated)
        if one and len(masks) == len(args[1]) == 1 and not (len(args) > 3 and args[3]):
            return  # a single value for what a mask marks: masked_fill_
        for _ in masks:
            log.note("shape", name)


def _wide_product(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Multiply low-precision matrices with a product in fp32 (`out_dtype`), which torch's CPU lacks."""
    *matrices, dtype = (*_map(_unwrapped, args), *([kwargs["out_dtype"]] if "out_dtype" in kwargs else []))
    if dtype != torch.float32 or any(m.dtype not in (torch.float16, torch.bfloat16) for m in matrices[-2:]):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    more = {k: v for k, v in kwargs.items() if k not in ("out", "out_dtype")}
    product = func.overloadpacket.default(*(m.float() for m in matrices), **more)
    return kwargs["out"].inner.copy_(product) if "out" in kwargs else product


def _pin(x: Tensor) -> Tensor:
    if _log is not None:
        _log.pinned[x.untyped_storage().data_ptr()] = x
    return x


def _pinned(x: Tensor) -> bool:
    return _log is not None and x.untyped_storage().data_ptr() in _log.pinned


class _Factories(TorchDispatchMode):
    """Catch what holds no simulated tensor yet: factories and copies to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


# ---- torch's own functions, patched


class _AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, it: Any) -> bool:
        return isinstance(it, TorchGenerator) if cls is MadeGenerator else super().__instancecheck__(it)


TorchGenerator = torch.Generator


class Generator(TorchGenerator):
    """A generator of the simulated device: it draws as the CPU's does."""

    made: ClassVar[dict[int, Generator]] = {}  # C++ knows them by these numbers, and by no class

    def __new__(cls) -> Generator:
        it = super().__new__(cls, "cpu")
        return cls.made.setdefault(it._cdata, it)

    device = property(lambda self: CUDA)


class MadeGenerator(metaclass=_AnyGenerator):
    """Stand for `torch.Generator`."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return Generator() if torch.device(device).type == "cuda" else TorchGenerator(device)


class Event:
    """A CUDA event: what was queued before `record` has arrived after `synchronize`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at = 0

    def record(self, stream: Any = None) -> None:
        self.at = _log.clock if _log else 0

    def query(self) -> bool:
        if _log:
            _log.arrive(self.at)
        return True

    def synchronize(self) -> None:
        if _log:
            _log.note("event", "synchronize", self.at)

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Stream(contextlib.nullcontext):
    """The device's one stream."""

    device, device_index, cuda_stream = CUDA, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        _synchronize()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


def _synchronize(*_: Any) -> None:
    if _log:
        _log.note("synchronize", "synchronize")


def _made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a tensor of Python's numbers on the CPU and send it, as torch does behind a guard that wants a driver."""

    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if isinstance(data, Simulated):
            made = data.detach().clone() if function is torch.tensor else data
            return made.to(*args, device=device, **kwargs).requires_grad_(requires_grad or made.requires_grad)
        if device is None or torch.device(device).type != "cuda":
            kwargs |= {"requires_grad": True} if requires_grad else {}
            return function(data, *args, **({"device": device} if device is not None else {}), **kwargs)
        return function(data, *args, **kwargs).to(device).requires_grad_(requires_grad)

    return make


def _gives(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


MEMORY = {
    "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved",
}  # fmt: skip
QUIET = {
    "_lazy_init", "init", "set_device", "set_device_index", "set_device_idx", "set_stream", "empty_cache",
    "reset_peak_memory_stats", "reset_accumulated_memory_stats", "ipc_collect", "manual_seed", "manual_seed_all",
    "seed", "seed_all", "empty_host_cache",
}  # fmt: skip
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
)
PROBES: dict[str, Any] = {
    **dict.fromkeys(MEMORY, _gives(0)),
    **dict.fromkeys(QUIET, _gives(None)),
    "is_available": _gives(True),
    "is_initialized": _gives(True),
    "device_count": _gives(1),
    "current_device": _gives(0),
    "current_device_index": _gives(0),
    "current_device_idx": _gives(0),
    "current_accelerator": _gives(torch.device("cuda")),
    "is_bf16_supported": _gives(True),
    "is_current_stream_capturing": _gives(False),
    "get_device_name": _gives(PROPERTIES.name),
    "get_device_capability": _gives((9, 0)),
    "get_device_properties": _gives(PROPERTIES),
    "mem_get_info": _gives((79 * 2**30, 80 * 2**30)),
    "memory_stats": _gives({}),
    "synchronize": _synchronize,
    "current_stream": lambda *_: Stream(),
    "default_stream": lambda *_: Stream(),
    "stream": lambda *_: contextlib.nullcontext(),
    "device": lambda *_: contextlib.nullcontext(),
    "device_of": lambda *_: contextlib.nullcontext(),
    "Event": Event,
    "Stream": Stream,
    "initial_seed": torch.initial_seed,
    # One generator draws for both devices, so that a run is the CPU's own.
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "get_rng_state_all": lambda *_: [torch.get_rng_state()],
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "set_rng_state_all": lambda states, *_: torch.set_rng_state(states[0]),
}


def _forget_probes() -> None:
    """Forget what was remembered of this machine: whether it has a GPU, what that can do."""
    for name, module in [*sys.modules.items()]:
        if name.startswith(("fire_llm", "transformers.utils", "accelerate.utils")):
            for it in vars(module).values():
                if isinstance(it, functools._lru_cache_wrapper) and it.__module__ == name:
                    it.cache_clear()
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Log]:
    """Give the machine a simulated GPU.

    Yields:
        The log of its waits.
    """
    global _log
    if torch.cuda.is_available():
        raise RuntimeError("a GPU is here: test on that one")
    groups = torch._C._group_tensors_by_device_and_dtype

    def grouped(*args: Any) -> Any:
        return {((CUDA if d == META else d), t): found for (d, t), found in groups(*args).items()}

    _forget_probes()
    log = Log()
    with contextlib.ExitStack() as stack:
        modules = (torch.cuda, torch.cuda.random, torch.cuda.memory, torch.accelerator, torch.accelerator.memory)
        for module in modules:
            for name, probe in PROBES.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, probe))
        for owner, name, new in (
            (torch, "Generator", MadeGenerator),
            (torch, "Event", Event),
            (torch._C, "_group_tensors_by_device_and_dtype", grouped),
            (torch, "tensor", _made(torch.tensor)),
            (torch, "as_tensor", _made(torch.as_tensor)),
            (Tensor, "to", _to),
            (
                Tensor,
                "cuda",
                lambda self, device=None, non_blocking=False, **_: self.to(CUDA, non_blocking=non_blocking),
            ),
            (Tensor, "pin_memory", lambda self, *_: _pin(self.clone())),
            (Tensor, "is_pinned", lambda self, *_: _pinned(self)),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        from torch.utils import _foreach_utils

        from fire_llm.evaluation import kernels

        stack.enter_context(mock.patch.object(kernels, "triton", None))  # its kernels want real memory
        supported = [*_foreach_utils._foreach_supported_types, Simulated]
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", supported))
        swapping = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay so, as with `.data`
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        stack.enter_context(_Factories())
        _log = log
        try:
            yield log
        finally:
            log.arrive()
            _log = None
            Generator.made.clear()
    _forget_probes()


def plain(it: Any) -> Any:
    """Give simulated tensors as CPU tensors, without a wait: for the test to read."""
    return _map(lambda x: x.inner.detach().clone() if isinstance(x, Simulated) else x, it)


# ---- graphs of torch.compile


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


def attention_calls(graphs: Iterable[torch.fx.GraphModule]) -> list[torch.fx.Node]:
    """List the calls of scaled_dot_product_attention in graphs."""
    function = torch.nn.functional.scaled_dot_product_attention
    return [node for graph in graphs for node in graph.graph.nodes if node.target is function]


def given_masks(graphs: Iterable[torch.fx.GraphModule]) -> list[torch.fx.Node | None]:
    """List the mask, or None, of each call of scaled_dot_product_attention in graphs."""
    return [n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask") for n in attention_calls(graphs)]


def attention_masks(graphs: Iterable[torch.fx.GraphModule]) -> list[torch.fx.Node]:
    """List the masks: they leave out the kernels that take none, flash attention's among them."""
    return [mask for mask in given_masks(graphs) if mask is not None]
