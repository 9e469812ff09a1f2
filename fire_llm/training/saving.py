"""Save checkpoints that are whole and verified, on all ranks or on none, and go on from them exactly.

A checkpoint is written under another name, listed with sizes and hashes, flushed and renamed once. Where one rank
fails, every rank raises, and earlier checkpoints stay. Older ones are deleted only when the new one was read back.

With `async_save`, weights and moments are copied to the host at the step, and everything else is written at once. A
thread writes the copies and renames the checkpoint while training goes on. The files are the same.

Of a model in shards, each rank writes its own in a thread. The first rank lists them, makes an ordinary folder of the
weights where somebody will read them, and renames.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from fire_llm.core.atomic import (
    AVERAGED,
    AVERAGED_BYTES,
    BYTES_A_PARAMETER,
    CONTINUAL_STATE,
    STAGING_SUFFIX,
    checkpoints,
    clear_partial_checkpoints,
    free_bytes,
    step_of,
    sync,
    write_json,
    writing,
)
from fire_llm.core.compat import spent
from fire_llm.core.errors import UserError
from fire_llm.core.manifest import REPLACED, TRAINER_STATE, damage, newest_intact, prune, read_state, write_manifest
from fire_llm.core.signals import asked
from fire_llm.distributed import active, cpu_group, gather_objects, is_first
from fire_llm.training.arguments import plain
from fire_llm.training.early_stop import EarlyStopCallback
from fire_llm.training.epochs import Epochs
from fire_llm.training.preemption import Stopping
from fire_llm.training.progress import report_line
from fire_llm.training.recycling import RecyclingCallback
from fire_llm.training.sharding import OPTIMIZER, whole_optimizer
from fire_llm.training.trackers import reads_checkpoints
from fire_llm.training.writer import Writer, on_host

RECYCLING = "recycling.safetensors"
"""File in a checkpoint with the state of the `RecyclingCallback`s, by their number."""

_C = TypeVar("_C", bound=TrainerCallback)


@dataclass
class _Save:
    """One checkpoint while it is saved."""

    step: int
    best: int | None
    """Step of the best checkpoint."""
    output: Path
    """The folder that holds the training's checkpoints."""
    state: dict[str, Any]
    """Content of `CONTINUAL_STATE`."""
    recycling: dict[str, Tensor]
    """Content of `RECYCLING`."""
    group: Any
    """All ranks, where each writes its own shards; None where the first one writes everything."""
    shards: Any = None
    """The `ShardedSave` of what the ranks write."""
    copies: tuple[Any, ...] | None = None
    """Weights, the optimizer's state and, where there is one, the weights' average on the host, for a thread."""
    later: list[Callable[[], Any]] = field(default_factory=list)
    """Writes those copies, a file each."""

    @property
    def staging(self) -> Path:
        """Return the temporary folder that `Trainer` writes the checkpoint's folder into."""
        return self.output / f"checkpoint-{self.step}{STAGING_SUFFIX}"

    @property
    def written(self) -> Path:
        """Return the checkpoint's folder before it is renamed."""
        return self.staging / f"checkpoint-{self.step}"


class Saver:
    """Write the checkpoints of one `ContinualTrainer`, and read back what `TrainerState` has no room for."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.writer = Writer()
        self.resumed_from: Path | None = None
        """The checkpoint that training goes on from."""
        self._current: _Save | None = None
        """The save whose files `Trainer` is writing."""
        self._stager: Any = None
        """Copies shards to the host, and keeps that memory for the next save."""
        self._resumed: dict[str, Any] = {}
        """The `CONTINUAL_STATE` of `resumed_from`."""
        self._began = time.monotonic()
        self._bytes: int | None = None
        """Size of the last checkpoint."""
        self._written: list[Path] = []
        """Checkpoints of this training."""
        self._needed_again: set[int | None] = set()
        """Steps that `auto_find_batch_size` may go back to: the one training went on from, and its best one."""
        self._sound: set[Path] = set()
        """Checkpoints that were verified: one that was copied without its times would be hashed at each save."""

    # ---- reading

    def begin(self, checkpoint: str | None) -> int:
        """Start the clock, and take over a checkpoint's state where one is given; return its step, or 0."""
        self._began = time.monotonic()
        self._resumed, self._written, self._needed_again = {}, [], set()
        self.resumed_from = folder = Path(checkpoint) if checkpoint else None
        if folder is None:
            return 0
        trainer = self.trainer
        self._resumed = read_state(folder, CONTINUAL_STATE)
        if trainer.args.auto_find_batch_size:
            best = read_state(folder, TRAINER_STATE).get("best_model_checkpoint")
            self._needed_again = {step_of(folder), *([step_of(Path(best))] if best else [])}
        tensors = load_file(folder / RECYCLING) if (folder / RECYCLING).exists() else {}
        for number, callback in enumerate(self._callbacks(RecyclingCallback)):
            prefix = f"{number}."
            callback.restore({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        if trainer.is_world_process_zero():
            trainer.batches_hash.fill_(self._resumed["batches_hash"])
        step, before, now = self._resumed["step"], self._resumed["world_size"], trainer.args.world_size
        changed = f", on {now} process(es) instead of {before}: the same batches" if before != now else ""
        if trainer.args.title is not None:
            report_line(trainer.args, f"goes on from step {step}{changed}")
        return int(step)

    def resumed_samples(self) -> int:
        """Return how many samples the checkpoint had seen that training goes on from.

        Raises:
            UserError: Its steps had another number of samples, and the data are a stream, of which whole batches are
                skipped.
        """
        trainer, resumed = self.trainer, self._resumed
        now, step = trainer.samples_a_step, resumed.get("step", 0)
        before, samples = resumed.get("samples_a_step", now), resumed.get("samples", step * now)
        if before != now:
            if trainer.order == "stream" and not trainer.args.ignore_data_skip:
                raise UserError(
                    f"the checkpoint's steps had {before} samples and these have {now}: a stream would go on "
                    "elsewhere. Keep batch size x accumulation x processes, or begin the data again with "
                    "ignore_data_skip=True"
                )
            if trainer.order == "numbered":
                report_line(trainer.args, f"{now} samples a step instead of {before}: goes on from sample {samples}")
        return int(samples)

    def epochs(self, loader: Any) -> Epochs:
        """Return the place in data with a length: their beginning, or where the checkpoint stopped."""
        args, now = self.trainer.args, self.trainer.samples_a_step
        epochs = Epochs(loader, args.gradient_accumulation_steps, now, self._resumed, args.ignore_data_skip)
        if epochs.samples_before != now:
            place = f"goes on after {epochs.begin.seen} samples of epoch {epochs.begin.epoch + 1}"
            report_line(args, f"{now} samples a step instead of {epochs.samples_before}: {place}")
        return epochs

    def forget(self) -> None:
        """Remove the checkpoints of a training that begins again."""
        for folder in self._written:
            shutil.rmtree(folder, ignore_errors=True)

    def restore_unlogged(self) -> None:
        """Restore the sum of losses since the last log; on another number of ranks each gets the mean."""
        trainer, unlogged = self.trainer, self._resumed["unlogged"]
        losses = unlogged["losses"]
        same = len(losses) == trainer.args.world_size
        trainer._tr_loss.fill_(losses[trainer.args.process_index] if same else sum(losses) / len(losses))
        trainer._globalstep_last_logged = unlogged["since"]

    def _callbacks(self, kind: type[_C]) -> list[_C]:
        return [callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, kind)]

    # ---- one save

    @property
    def staging(self) -> Path | None:
        """Return where `Trainer` puts a checkpoint while one is saved."""
        return None if self._current is None else self._current.staging

    @property
    def puts_off(self) -> bool:
        """Return whether the large files of the checkpoint that is being saved are written later."""
        save = self._current
        return save is not None and (save.copies is not None or save.shards is not None)

    def save(self, write_files: Callable[[], Any]) -> None:
        """Write the checkpoint under a temporary name, list and flush it, and rename it once; collective.

        Args:
            write_files: Writes the files, as `Trainer` does, below `staging`.

        Raises:
            UserError: On every rank, where one of them could not write, this checkpoint or the one before; nothing
                that was there before is lost.
        """
        self.writer.wait()
        trainer, step = self.trainer, self.trainer.state.global_step
        group = cpu_group(dist.group.WORLD, "checkpoints") if self._in_shards() else None
        output, best = Path(trainer.args.output_dir), trainer.state.best_global_step
        save = _Save(step, best, output, self._state(), self._recycling_tensors(), group)
        with self._undone(save):
            in_background = self._write(save, write_files)
            if not in_background:
                self._complete(save)
        if in_background:
            self.writer.start(partial(self._complete_in_background, save))

    def _write(self, save: _Save, write_files: Callable[[], Any]) -> bool:
        """Write what is written at once, and hold the rest in `save`; return whether a thread may write that."""
        trainer, output = self.trainer, save.output
        ordinary = save.group is not None and gather_objects(None, self._is_read())[0]
        _together(partial(writing(output)(self._make_room), output, ordinary), first_only=True)
        in_background = self.writes_beside()
        if save.group is not None:
            from fire_llm.training.shards import ShardedSave

            save.shards = ShardedSave(trainer, ordinary, self._host_stager() if in_background else None)
        elif in_background:
            save.copies = self._copied()
            in_background = save.copies is not None
        self._current = save
        try:
            _together(writing(output)(write_files))
            if trainer.averaging.on and save.shards is None:
                _together(writing(output)(partial(self._save_average, save)))
            self._name_best(save)
        finally:
            self._current = None
        return in_background

    def _complete(self, save: _Save) -> None:
        """Write what `save` holds, and give the checkpoint its name; collective."""
        with writing(save.output):
            save.copies = None
            while save.later:
                save.later.pop(0)()  # which also frees its copies
            hashes = {} if save.shards is None else save.shards.write(save.written, save.group)
            finish = writing(save.output)(self._finish)
            _together(partial(finish, save, hashes), first_only=True, group=save.group)

    def _complete_in_background(self, save: _Save) -> None:
        try:
            with self._undone(save):
                self._complete(save)
        except UserError:
            raise
        except Exception as error:  # it is raised at another step
            raise RuntimeError(f"step {save.step} was not saved: {error!r}") from error

    def _name_best(self, save: _Save) -> None:
        """Note the best checkpoint under its final name, not the one that it is written under."""
        state = self.trainer.state
        best = save.output / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best.is_dir() or best.name == save.written.name):
            state.best_model_checkpoint = str(best)
            if self.trainer.args.should_save:
                state.save_to_json(str(save.written / TRAINER_STATE_NAME))

    def save_model_later(self, folder: Path) -> None:
        """Leave the copied weights to the thread; of shards, write what stands beside them."""
        save = self._current
        assert save is not None
        if save.shards is not None:
            if self.trainer.args.should_save:
                save.shards.describe(folder)
            return
        assert save.copies is not None
        folder.mkdir(parents=True)
        save.later.append(partial(self.trainer._save, str(folder), state_dict=save.copies[0]))

    def _save_average(self, save: _Save) -> None:
        """Save the weights' average as a model of its own, or leave its copy to the thread."""
        folder = str(save.written / AVERAGED)
        if save.copies is not None:
            save.later.append(partial(self.trainer._save, folder, state_dict=save.copies[2]))
            return
        with self.trainer.averaging.applied():
            self.trainer.save_model(folder, _internal_call=True)

    def save_optimizer_and_scheduler(self, folder: Path) -> None:
        """Save the schedule and whole moments; copies are left to the thread, and shards to their ranks."""
        trainer, save = self.trainer, self._current
        assert save is not None
        if save.shards is not None:
            moments = save.shards.optimizer()
        else:
            moments = whole_optimizer(trainer.optimizer) if save.copies is None else save.copies[1]
        if not trainer.args.should_save:
            return
        write = partial(torch.save, moments, folder / OPTIMIZER)
        if save.copies is None:
            write()
        else:
            save.later.append(write)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def writes_beside(self) -> bool:
        """Return whether training goes on while the next checkpoint is written."""
        trainer, args = self.trainer, self.trainer.args
        wanted, shards = args.async_save, self._in_shards()
        if wanted is None:
            wanted = (shards or args.device.type not in ("cpu", "xla")) and not self._read_at_once()
        alone = not active() and not trainer.is_fsdp_enabled
        goes_on = trainer.state.global_step < trainer.state.max_steps and not asked() and not trainer.stopping.number
        # transformers writes the dtype that the parameters have at that moment to config.json: in a pass, bf16.
        steady = (shards or not args.bf16_params) and not args.enable_jit_checkpoint
        return bool(wanted and (shards or (alone and self._plain_model())) and goes_on and steady)

    def _in_shards(self) -> bool:
        """Return whether each rank writes its own shards: of a plain model. Another writes gathered weights itself."""
        return bool(self.trainer.is_fsdp_enabled and self._plain_model())

    def _plain_model(self) -> bool:
        """Return whether the model is one of transformers as it is, and its checkpoints are not pushed when saved."""
        model = self.trainer.model
        own = isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)
        placed = getattr(model, "hf_quantizer", None) is not None or hasattr(model, "hf_device_map")
        return own and not placed and not self.trainer.args.push_to_hub

    def _read_at_once(self) -> bool:
        """Return whether a callback may read a checkpoint as soon as it is saved."""
        return any(reads_checkpoints(c) for c in self._callbacks(TrainerCallback) if not isinstance(c, Stopping))

    def _is_read(self) -> bool:
        """Return whether somebody will read the weights of the next checkpoint: the last, the best, one that stays."""
        trainer, step = self.trainer, self.trainer.state.global_step
        last = step >= trainer.state.max_steps or trainer.control.should_training_stop
        stays = step in trainer.args.keep_steps or step == trainer.state.best_global_step
        return last or stays or trainer.args.save_only_model or self._read_at_once()

    def _host_stager(self) -> Any:
        """Return what copies shards to the host, into page-locked memory where they come from CUDA.

        One serves all saves and keeps their memory, but in torch 2.11, which empties it after a save.
        """
        if self._stager is None or spent(self._stager):
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            on_cuda = self.trainer.args.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(on_cuda, False, False, on_cuda))
        return self._stager

    def _copied(self) -> tuple[Any, ...] | None:
        """Copy weights, the optimizer's state and the weights' average to the host; None where that cannot be done."""
        trainer = self.trainer
        optimizer = None if trainer.args.save_only_model else trainer.optimizer.state_dict()
        copied = on_host(trainer.model.state_dict(), optimizer)
        if copied is None or not trainer.averaging.on:
            return copied
        with trainer.averaging.applied():
            averaged = on_host(trainer.model.state_dict())
        return None if averaged is None else (*copied, *averaged)

    @contextmanager
    def _undone(self, save: _Save) -> Iterator[None]:
        """Remove a checkpoint that could not be completed, and name its step."""
        try:
            yield
        except UserError as error:
            if self.trainer.is_world_process_zero():
                shutil.rmtree(save.staging, ignore_errors=True)
            raise UserError(
                f"{error}\nStep {save.step} was not saved. What was saved before stays, and the same command goes on "
                "from it"
            ) from error

    # ---- what a checkpoint holds beside transformers' files, and which checkpoints stay

    def hash_over_ranks(self) -> int:
        """Return the sum of all ranks' hashes of batches; collective."""
        return int(self.trainer.accelerator.reduce(self.trainer.hash_of_steps(), "sum"))

    def _state(self) -> dict[str, Any]:
        """Return what `TrainerState` has no room for; collective."""
        trainer, step = self.trainer, self.trainer.state.global_step
        return {
            "step": step,
            "batches_hash": self.hash_over_ranks(),
            "seconds": self._resumed.get("seconds", 0.0) + time.monotonic() - self._began,
            "world_size": trainer.args.world_size,
            "samples": trainer.first_sample(step),
            "samples_a_step": trainer.samples_a_step,
            **({} if trainer.epochs is None else {"epochs": trainer.epochs.state(step)}),
            "stopped": any(callback.stopped for callback in self._callbacks(EarlyStopCallback)),
            # A signal saves in the middle of a logged interval, whose mean must be the same after a resumption.
            "unlogged": {
                "since": trainer._globalstep_last_logged,
                "losses": gather_objects(None, float(trainer.guard.before if trainer.waiting else trainer._tr_loss)),
            },
        }

    def _recycling_tensors(self) -> dict[str, Tensor]:
        """Return copies of what the `RecyclingCallback`s keep, by their number and its name."""
        callbacks = enumerate(self._callbacks(RecyclingCallback))
        return {f"{n}.{key}": t.to("cpu", copy=True) for n, c in callbacks for key, t in c.tensors().items()}

    def _make_room(self, output: Path, ordinary: bool) -> None:
        """Remove what a killed process left half-written, and see that there is room before anything is written."""
        clear_partial_checkpoints(output)
        each = BYTES_A_PARAMETER + AVERAGED_BYTES * self.trainer.averaging.on
        weights = sum(p.numel() for p in self.trainer.model.parameters())
        needed = (self._bytes or each * weights) + ordinary * 8 * weights  # whole weights, in scratch and written
        if (free := free_bytes(output)) < needed:
            raise UserError(
                f"'{output}' has {free / 1e9:.3g} GB free and a checkpoint takes {needed / 1e9:.3g} GB: "
                "free some space, or keep fewer checkpoints"
            )

    def _finish(self, save: _Save, hashes: dict[Path, str]) -> None:
        """List, flush and rename a checkpoint, then delete those that it replaces; on the first rank."""
        written, final = save.written, save.output / save.written.name
        replaced = self._replaced(save)
        if save.shards is not None and save.shards.ordinary:
            save.shards.consolidate(written)
        for folder in () if plain(self.trainer.args) else (written, written / AVERAGED):
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which this package never reads
        if (written / AVERAGED).is_dir():
            write_manifest(written / AVERAGED, hashes)
        write_json(written / CONTINUAL_STATE, {**save.state, REPLACED: replaced})
        if save.recycling:
            save_file(save.recycling, written / RECYCLING)
        self._bytes = write_manifest(written, hashes)
        sync(written)
        if final.exists():  # a damaged one of this step; it goes only when the new one has its name
            final.rename(save.staging / "damaged")
            self._sound.discard(final)
        written.rename(final)
        self._written.append(final)
        sync(save.output, below=False)
        shutil.rmtree(save.staging)
        prune(final, replaced)

    def _replaced(self, save: _Save) -> list[int]:
        """Return the steps of older checkpoints that nothing keeps once this one is there."""
        args = self.trainer.args
        if args.save_total_limit is not None and args.save_total_limit <= 0:  # no limit, as in `Trainer`
            return []
        # One that a resumption skipped as damaged is left for inspection, and does not count as kept.
        there = checkpoints(save.output)
        self._sound |= {path for path, _ in there if path not in self._sound and damage(path, contents=False) is None}
        older = [step for folder, step in there if step < save.step and folder in self._sound]
        named = self.trainer.state.best_model_checkpoint  # an older one, where the best step was not saved
        bests = {save.best, step_of(Path(named)) if named else None} - {None}
        if args.save_total_limit is None:
            others = (args.keep_last or 1) - 1
        else:  # the best one counts
            others = args.save_total_limit - 1
            newest = {save.step, *older[max(0, len(older) - others) :]}
            others -= bool(bests & {*older} - newest) and others > 0
        kept = {*args.keep_steps, *bests, *self._needed_again, *older[max(0, len(older) - others) :]}
        return [step for step in older if step not in kept]


# ---- before a training


def try_configs(model: Any) -> None:
    """Write, before hours of training, what a save writes beside the weights.

    Raises:
        UserError: A config can be read, but not written.
    """
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        try:
            with TemporaryDirectory() as folder:
                if hasattr(config, "save_pretrained") and (name == "config" or model.can_generate()):
                    config.save_pretrained(folder)
        except OSError:  # of the temporary folder, which says nothing of the checkpoints' folder
            continue
        except Exception as error:  # the classes' own checks raise anything
            reason = " ".join(str(error).split())
            raise UserError(
                f"{name}.json of the model cannot be written, so that no checkpoint could be saved: {reason} "
                f"Correct it in the checkpoint's folder, or on model.{name}"
            ) from error


class Verified(str):
    """The folder of a checkpoint that was verified."""


def checkpoint_to_resume(args: Any, asked: str | bool | None) -> str | None:
    """Return the checkpoint that `Trainer.train` is asked to go on from, verified; None for none; collective.

    Args:
        args: `TrainingArguments`.
        asked: A folder, or True for the newest whole one in `output_dir`.

    Raises:
        UserError: On every rank, where there is none, it is damaged, or it cannot be gone on from.
    """
    if asked is None or asked is False:
        return None
    if asked is True:
        newest, skipped = _together(lambda: newest_intact(Path(args.output_dir)), first_only=True)
        for line in skipped:
            report_line(args, line)
        if newest is None:
            raise UserError(
                f"resume_from_checkpoint=True: No valid checkpoint found in output directory ({args.output_dir}): it "
                "holds no checkpoint; leave it out to begin"
            )
        folder = Path(newest)
    else:
        folder = Path(asked)
        if not (folder / CONTINUAL_STATE).is_file():
            fault = "is no checkpoint of a ContinualTrainer" if folder.is_dir() else "does not exist"
            raise UserError(
                f"Can't find a valid checkpoint at {folder}: resume_from_checkpoint='{folder}' {fault}: "
                f"{CONTINUAL_STATE} is missing. Give a folder checkpoint-<step> of a ContinualTrainer, True for the "
                "newest one, or begin from its weights with from_pretrained"
            )
        if not isinstance(asked, Verified) and (wrong := _together(lambda: damage(folder), first_only=True)):
            raise UserError(
                f"resume_from_checkpoint='{folder}' is damaged: {wrong}. Put back a copy of it, or give True for the "
                "newest checkpoint that is whole"
            )
    if not (folder / OPTIMIZER).is_file():
        raise UserError(
            f"resume_from_checkpoint='{folder}' has no {OPTIMIZER} (save_only_model?): training cannot go on as it "
            "was. Begin a new one from its weights with from_pretrained"
        )
    return str(folder)


def resumption(folder: Path, title: str) -> str | None:
    """Return the newest whole checkpoint of a stage, None for none, and report which were skipped; collective.

    Raises:
        UserError: On every rank, where there are checkpoints and none is whole.
    """
    newest, skipped = _together(lambda: newest_intact(folder), first_only=True)
    if is_first():
        sys.stderr.writelines(f"{title}: {line}\n" for line in skipped)
    return Verified(newest) if newest else None


def verified(checkpoint: Path) -> Path:
    """Return a checkpoint that another stage starts from, once it is verified; collective."""
    if wrong := _together(lambda: damage(checkpoint), first_only=True):
        last = checkpoint in [path for path, _ in checkpoints(checkpoint.parent)[-1:]]
        deletion = "delete it" if last else f"delete '{checkpoint.parent}'"
        where = "its newest checkpoint that is whole" if last else "its beginning"
        raise UserError(
            f"'{checkpoint}' is damaged: {wrong}. Put back a copy of it, or {deletion}: the same command then trains "
            f"that phase again, from {where}"
        )
    return checkpoint


def _together(work: Callable[[], Any], first_only: bool = False, group: Any = None) -> Any:
    """Do some work on each rank; return the first rank's result, or raise on every rank what one of them raised.

    A rank that alone gave up would leave the others waiting for it.

    Args:
        work: What is to be done.
        first_only: On the first rank alone.
        group: A thread's own group of all ranks, in which every error is raised on every rank. Without one, only a
            `UserError` is.
    """
    result, fault, users = None, None, True
    if not first_only or is_first():
        try:
            result = work()
        except UserError as error:
            fault = str(error)
        except Exception as error:
            if group is None:
                raise
            fault, users = repr(error), False
    everywhere = gather_objects(group, (result if is_first() else None, fault, users))
    for _, fault, users in everywhere:
        if fault is not None:
            raise (UserError if users else RuntimeError)(fault)
    return everywhere[0][0]
