"""Checkpoints of a `Trainer` that are whole, verified, and made by all ranks or by none."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from fire_llm.core.atomic import (
    BYTES_A_PARAMETER,
    CONTINUAL_STATE,
    STAGING_SUFFIX,
    checkpoints,
    free_bytes,
    partial_of,
    sync,
    write_json,
    writing,
)
from fire_llm.core.errors import UserError
from fire_llm.core.manifest import damage, newest_intact, write_manifest
from fire_llm.core.signals import asked
from fire_llm.distributed import active, gather_objects
from fire_llm.training.preemption import Stopping
from fire_llm.training.recycling import RecyclingCallback
from fire_llm.training.sharding import OPTIMIZER, load_optimizer, load_weights, whole_optimizer, whole_weights
from fire_llm.training.writer import Writer, on_host

RECYCLING = "recycling.safetensors"
"""File in a checkpoint with what the `RecyclingCallback`s know of hidden units, by their number among them."""


class SavingTrainer(Trainer):
    """Save a phase's state so that it can be gone on from exactly, whatever ends the process, and keep what is asked.

    A checkpoint is written under another name, listed with sizes and hashes, flushed and renamed once. What one rank
    cannot do, every rank raises; what was there before stays. Older ones go only when the new one was read back.

    With `async_save`, weights and moments are copied to the host at the step, everything else is written at once, and
    a thread writes the copies and does the rest while training goes on. The files are the same.
    """

    args: Any
    batches_hash: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging: Path | None = None
        self._copies: tuple[Any, Any] | None = None
        self._later: list[Callable[[], Any]] = []
        self._writer = Writer()
        self._resumed: dict[str, Any] = {}
        self._began = time.monotonic()
        self._checkpoint_bytes: int | None = None
        super().__init__(*args, **kwargs)

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Take over what `TrainerState` has no room for, and return it."""
        self._resumed = json.loads((checkpoint / CONTINUAL_STATE).read_text(encoding="utf-8"))
        kept = load_file(checkpoint / RECYCLING) if (checkpoint / RECYCLING).exists() else {}
        for number, callback in enumerate(self._recycling()):
            start = f"{number}."
            callback.restore({k.removeprefix(start): t for k, t in kept.items() if k.startswith(start)})
        if self.is_world_process_zero():
            self.batches_hash.fill_(self._resumed["batches_hash"])
        return self._resumed

    def _recycling(self) -> list[RecyclingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, RecyclingCallback)]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name, list and flush it, and rename it once.

        Raises:
            UserError: On every rank, where one of them could not write, this checkpoint or the one before; nothing
                that was there before is lost.
        """
        self.settle()
        output, step = Path(self.args.output_dir), self.state.global_step
        name = f"checkpoint-{step}"
        staging, state = output / f"{name}{STAGING_SUFFIX}", self._own_state()
        recycled = {f"{n}.{key}": t for n, c in enumerate(self._recycling()) for key, t in c.tensors().items()}
        recycled = {key: t.to("cpu", copy=True) for key, t in recycled.items()}
        best, write_all = self.state.best_global_step, super()._save_checkpoint

        def finish() -> None:
            self._finish(output, staging / name, state, recycled)
            self._prune(output, output / name, step, best)

        with self._undone(staging, step):
            self._together(lambda: self._make_room(output), first_only=True)
            self._staging, self._later = staging, []
            self._copies = self._copied() if self._writes_beside() else None
            beside = self._copies is not None
            try:
                self._together(lambda: write_all(model, trial))
            finally:
                self._staging, self._copies, later, self._later = None, None, self._later, []
            if not beside:
                self._together(finish, first_only=True)
                return

        def write() -> None:
            try:
                with self._undone(staging, step), writing(output):
                    while later:
                        later.pop(0)()  # and let go of its copies
                    finish()
            except UserError:
                raise
            except Exception as error:  # it is raised at another step
                raise RuntimeError(f"step {step} was not saved: {error!r}") from error

        self._writer.start(write)

    @contextmanager
    def _undone(self, staging: Path, step: int) -> Iterator[None]:
        """Remove what could not be completed, and say which step it was."""
        try:
            yield
        except UserError as error:
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            raise UserError(
                f"{error}\nStep {step} was not saved. What was saved before stays, and the same command goes on from it"
            ) from error

    def _writes_beside(self) -> bool:
        """Tell whether training goes on while the next checkpoint is written."""
        wanted, model = self.args.async_save, self.model
        if wanted is None:
            # What others do when something is saved, they may do with the folder.
            others = [c for c in self.callback_handler.callbacks if not isinstance(c, Stopping)]
            looked_at = any(type(c).on_save is not TrainerCallback.on_save for c in others)
            wanted = self.args.device.type not in ("cpu", "xla") and not looked_at
        own = isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)
        placed = getattr(model, "hf_quantizer", None) is not None or hasattr(model, "hf_device_map")
        alone = not active() and not self.is_fsdp_enabled
        goes_on = self.state.global_step < self.state.max_steps and not asked()
        # transformers writes to config.json the dtype that the parameters have just then: bf16 in the middle of a pass.
        still = not self.args.bf16_params
        return bool(wanted and own and not placed and alone and goes_on and still and not self.args.push_to_hub)

    def _copied(self) -> tuple[Any, Any] | None:
        """Copy weights and the optimizer's state to the host; None where that cannot be."""
        optimizer = None if self.args.save_only_model else self.optimizer.state_dict()
        return on_host(self.model.state_dict(), optimizer)

    def settle(self, *, say: bool = False) -> None:
        """Wait until the last checkpoint is written.

        Args:
            say: Say on stderr that it could not be, because something else is about to be raised.

        Raises:
            UserError: It could not be, for a reason that the user can do something about.
            RuntimeError: It could not be, for another.
        """
        try:
            self._writer.wait()
        except Exception as error:
            if not say:
                raise
            sys.stderr.write(f"{self.args.title or 'training'}: {error}\n")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._writer.check()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _together(self, work: Callable[[], Any], first_only: bool = False) -> None:
        """Do a part of a save, wait for the others, and raise everywhere what one of them ran into.

        A rank that alone gave up would leave the others waiting for it.
        """
        fault = None
        if not first_only or self.is_world_process_zero():
            try:
                with writing(Path(self.args.output_dir)):
                    work()
            except UserError as error:
                fault = str(error)
        faults = [told for told in gather_objects(None, fault) if told is not None]
        if faults:
            raise UserError(faults[0])

    def _own_state(self) -> dict[str, Any]:
        """Return what `TrainerState` has no room for; collective."""
        return {
            "step": self.state.global_step,
            "batches_hash": self._hash_over_ranks(),
            "seconds": self._resumed.get("seconds", 0.0) + time.monotonic() - self._began,
            "world_size": self.args.world_size,
            # A signal saves in the middle of a logged interval; its mean must come out as if it had not.
            "unlogged": {
                "since": self._globalstep_last_logged,
                "losses": gather_objects(None, float(self._tr_loss)),
            },
        }

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators, and what of an interval's losses was summed but not logged."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        unlogged, rank = self._resumed["unlogged"], self.args.process_index
        losses = unlogged["losses"]
        same = len(losses) == self.args.world_size
        self._tr_loss.fill_(losses[rank] if same else sum(losses) / len(losses))
        self._globalstep_last_logged = unlogged["since"]

    def _make_room(self, output: Path) -> None:
        """Remove what a killed process left half-written, and see that there is room before anything is written."""
        for left in output.glob(f"checkpoint-*{STAGING_SUFFIX}"):
            shutil.rmtree(left)
        needed = self._checkpoint_bytes or BYTES_A_PARAMETER * self.model.num_parameters()
        if (free := free_bytes(output)) < needed:
            raise UserError(
                f"'{output}' has {free / 1e9:.3g} GB free and a checkpoint takes {needed / 1e9:.3g} GB: "
                "free some space, or keep fewer checkpoints"
            )

    def _finish(self, output: Path, written: Path, state: dict[str, Any], recycled: dict[str, Tensor]) -> None:
        """Complete, list, flush and rename a checkpoint."""
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing reads it
        write_json(written / CONTINUAL_STATE, state)
        if recycled:
            save_file(recycled, written / RECYCLING)
        self._checkpoint_bytes = write_manifest(written)
        sync(written)
        final = output / written.name
        if final.exists():  # one of this step that was damaged; it goes only when the new one has its name
            final.rename(written.parent / "damaged")
        written.rename(final)
        sync(output, below=False)
        shutil.rmtree(written.parent)

    def _prune(self, output: Path, newest: Path, step: int, best: int | None) -> None:
        """Delete older checkpoints that nothing keeps, once the new one was read back from the disk."""
        args = self.args
        # One with a higher number was skipped when this training was resumed: it is left to be looked at.
        older = [(folder, n) for folder, n in checkpoints(output) if n < step]
        kept = {*args.keep_steps, *(n for _, n in older[max(0, len(older) - args.keep_last + 1) :])}
        if args.keep_best:
            kept.add(best)
        unwanted = [folder for folder, n in older if n not in kept]
        if unwanted and (wrong := damage(newest, from_disk=True)):
            raise UserError(f"'{newest}' cannot be read back as it was written: {wrong}. Nothing older was deleted")
        for folder in unwanted:
            shutil.rmtree(folder.rename(partial_of(folder)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary folder; of shards, `Trainer` would keep pickles beside it."""
        if self._copies is not None and output_dir is not None and _internal_call:
            Path(output_dir).mkdir(parents=True)
            weights = self._copies[0]
            self._later.append(lambda: self._save(output_dir, state_dict=weights))
            return
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(self.model)
        self._save(output_dir or self.args.output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled and self._copies is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self._copies is not None:
            moments = self._copies[1]
            self._later.append(lambda: torch.save(moments, Path(output_dir) / OPTIMIZER))
        else:
            moments = whole_optimizer(self.optimizer)
            if self.args.should_save:
                torch.save(moments, Path(output_dir) / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        # transformers below 5.18 cannot load replicas' states on CPUs: torch knows no place "cpu:0".
        load_optimizer(self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _hash_over_ranks(self) -> int:
        return int(self.accelerator.reduce(self.batches_hash.clone(), "sum"))

    def hash_of_batches(self) -> str:
        """Return the hash over all ranks of every batch so far, 16 hexadecimal digits."""
        return f"{self._hash_over_ranks() & (2**64 - 1):016x}"


def resumption(folder: Path, title: str) -> str | None:
    """Return the checkpoint that a unit goes on from, None for none, and say which were skipped; collective.

    Raises:
        UserError: On every rank, where there are checkpoints and none is whole.
    """

    def find() -> tuple[Path | None, list[str], str | None]:
        try:
            return *newest_intact(folder), None
        except UserError as error:
            return None, [], str(error)

    newest, said, fault = _first_to_all(find)
    if fault is not None:
        raise UserError(fault)
    if _is_first():
        sys.stderr.writelines(f"{title}: {line}\n" for line in said)
    return str(newest) if newest else None


def verified(checkpoint: Path) -> Path:
    """Return a checkpoint that another unit starts from, if it is what was written; collective.

    Raises:
        UserError: On every rank, with what is wrong and what to do.
    """
    if wrong := _first_to_all(lambda: damage(checkpoint)):
        raise UserError(
            f"'{checkpoint}' is damaged: {wrong}. Put back a copy of it, or delete it: the same command then trains "
            "that phase again, from its newest checkpoint that is whole"
        )
    return checkpoint


def _is_first() -> bool:
    return not active() or torch.distributed.get_rank() == 0


def _first_to_all(find: Callable[[], Any]) -> Any:
    """Return on every rank what the first one finds, so that files are read once."""
    return gather_objects(None, find() if _is_first() else None)[0]
