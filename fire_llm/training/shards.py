"""Save a model in shards: what each rank writes of a checkpoint, and the ordinary folder that is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.trainer import TRAINING_ARGS_NAME

from fire_llm.core.atomic import AVERAGED
from fire_llm.core.manifest import OPTIMIZER_SHARDS, SHARDED
from fire_llm.distributed import is_dtensor
from fire_llm.distributed.shards import whole_tensors, write_shards
from fire_llm.training.arguments import plain
from fire_llm.training.sharding import named_once


class ShardedSave:
    """Hold what this rank writes of one checkpoint.

    Args:
        trainer: Of a sharded model of transformers.
        ordinary: Whether weights become an ordinary folder once they are written.
        stager: Copies the tensors to the host, so that training can go on while they are written; None: it waits.
    """

    def __init__(self, trainer: Any, ordinary: bool, stager: Any | None) -> None:
        self.trainer, self.ordinary = trainer, ordinary
        weights, self.names = named_once(trainer.model)
        parts: dict[str, Mapping[str, Tensor]] = {SHARDED: weights}
        if trainer.averaging.on:
            parts[f"{AVERAGED}/{SHARDED}"] = {**weights, **trainer.averaging.placed()}
        if not trainer.args.save_only_model:
            parts[OPTIMIZER_SHARDS] = {
                f"{number}.{key}": value
                for number, values in trainer.optimizer.state_dict()["state"].items()
                for key, value in values.items()
                if is_dtensor(value)
            }
        self.parts = parts if stager is None else stager.stage(parts)
        self.shell = _shell(trainer.model)

    def optimizer(self) -> dict[str, Any]:
        """Return the optimizer's state without its tensors in shards; that is small."""
        state = self.trainer.optimizer.state_dict()
        small = {n: {k: v for k, v in values.items() if not is_dtensor(v)} for n, values in state["state"].items()}
        return {"state": small, "param_groups": state["param_groups"]}

    def describe(self, folder: Path) -> None:
        """Write the files beside the weights, in a checkpoint and in the folder of its average."""
        trainer, shell = self.trainer, self.shell
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        for place in [folder, folder / AVERAGED] if trainer.averaging.on else [folder]:
            place.mkdir(parents=True, exist_ok=True)
            shell.config.save_pretrained(place)
            if shell.can_generate():
                shell.generation_config.save_pretrained(place)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            if plain(trainer.args):
                torch.save(trainer.args, place / TRAINING_ARGS_NAME)

    def write(self, folder: Path, group: Any) -> dict[Path, str]:
        """Write what this rank holds, and free it; collective.

        Returns:
            The hash of each rank's files, on the first rank.
        """
        hashes: dict[Path, str] = {}
        for part in [*self.parts]:
            hashes |= write_shards(self.parts.pop(part), folder / part, group)
        return hashes

    def consolidate(self, folder: Path) -> None:
        """Replace shards of weights by what `save_pretrained` writes of whole weights; on one rank.

        Whole weights lie in files beside the checkpoint meanwhile, not in memory.
        """
        scratch = folder.with_name("whole")
        for shards in [path for path in (folder / SHARDED, folder / AVERAGED / SHARDED) if path.is_dir()]:
            whole = whole_tensors(shards, scratch)
            self.shell.save_pretrained(shards.parent, state_dict={n: whole[once] for n, once in self.names.items()})
            shutil.rmtree(shards)
            shutil.rmtree(scratch)


def _shell(model: Any) -> Any:
    """Return a model of the same class and config without weights, whose names and dtypes a thread can read.

    FSDP2 exchanges the parameters of the trained model while it computes.
    """
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = kind._from_config(deepcopy(model.config), dtype=dtype)
    if hasattr(model, "_weight_conversions"):  # of the checkpoint that it was loaded from, which names follow
        shell._weight_conversions = model._weight_conversions
    shell.generation_config = deepcopy(getattr(model, "generation_config", None))
    shell.config.dtype, shell.config.architectures = str(dtype).removeprefix("torch."), [kind.__name__]
    return shell
