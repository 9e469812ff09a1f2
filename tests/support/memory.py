"""What a run allocates on the CPU, from torch's own record of every allocation; and what its ranks exchange."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes that are held at once of what is allocated while something runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events", category=UserWarning)  # torch 2.11
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class Exchanged(TorchDispatchMode):
    """Count the collectives inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def cut(model: Any, **options: Any) -> None:
    """Cut a GPT-2 or Llama into shards as accelerate does: layers, embedding, and the head with the final norm."""
    from torch.distributed.fsdp import fully_shard

    gpt2 = hasattr(model, "transformer")
    trunk = model.transformer if gpt2 else model.model
    for layer in trunk.h if gpt2 else trunk.layers:
        fully_shard(layer, **options)
    tail = [trunk.ln_f, trunk.wte, model.lm_head] if gpt2 else [trunk.norm, model.lm_head]
    if not gpt2:
        fully_shard(trunk.embed_tokens, **options)
    fully_shard(tail, **{**options, "reshard_after_forward": False})
    fully_shard(model, **options)
