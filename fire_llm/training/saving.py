"""Checkpoints that are whole and verified, made by all ranks or by none, and gone on from exactly.

A checkpoint is written under another name, listed with sizes and hashes, flushed and renamed once. What one rank cannot
do, every rank raises; what was there before stays. Older ones go only when the new one was read back.

With `async_save`, weights and moments are copied to the host at the step, everything else is written at once, and a
thread writes the copies and does the rest while training goes on. The files are the same.

Of a model in shards each rank writes its own, in a thread of its own. The first one lists them, makes an ordinary
folder of the weights where somebody will read them, and renames.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
"""File in a checkpoint with what the `RecyclingCallback`s know of hidden units, by their number among them."""


class Saver:
    """Write the checkpoints of one `ContinualTrainer`, and read back what `TrainerState` has no room for.

    Args:
        trainer: Its `args` say what is kept.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.writer = Writer()
        self.staging: Path | None = None
        """Where `Trainer` puts a checkpoint while one is saved."""
        self.shards: Any = None
        """What the ranks write, while a checkpoint of a model in shards is saved."""
        self._stager: Any = None
        """Of copies of shards, whose memory it keeps for the next save."""
        self.copies: tuple[Any, ...] | None = None
        """Weights, the optimizer's state and, where there is one, the weights' average on the host, while a checkpoint
        is saved whose rest a thread will write."""
        self.resumed_from: Path | None = None
        """The checkpoint that training goes on from."""
        self._later: list[Callable[[], Any]] = []
        self._resumed: dict[str, Any] = {}
        self._began = time.monotonic()
        self._bytes: int | None = None
        self._written: list[Path] = []
        """Checkpoints of this training."""
        self._needed_again: set[int | None] = set()
        """Steps of what `auto_find_batch_size` may begin again from: where this began, and the best one of then."""
        self._sound: set[Path] = set()
        """Checkpoints that were verified once: a copy without times would be hashed at each save."""

    # ---- reading

    def begin(self, checkpoint: str | bool | None) -> int:
        """Start the clock, and take over a checkpoint's state where one is given; return the step of it, or 0."""
        self._began = time.monotonic()
        self._resumed, self._written, self._needed_again = {}, [], set()
        self.resumed_from = Path(str(checkpoint)) if checkpoint else None
        if not checkpoint:
            return 0
        folder, trainer = Path(str(checkpoint)), self.trainer
        self._resumed = read_state(folder, CONTINUAL_STATE)
        if trainer.args.auto_find_batch_size:
            best = read_state(folder, TRAINER_STATE).get("best_model_checkpoint")
            self._needed_again = {step_of(folder), *([step_of(Path(best))] if best else [])}
        kept = load_file(folder / RECYCLING) if (folder / RECYCLING).exists() else {}
        for number, callback in enumerate(self._recycling()):
            start = f"{number}."
            callback.restore({k.removeprefix(start): t for k, t in kept.items() if k.startswith(start)})
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
            UserError: Its steps were of another number of samples, in a stream, which is skipped by whole batches.
        """
        trainer, found = self.trainer, self._resumed
        a_step, step = trainer.samples_a_step, found.get("step", 0)
        before, samples = found.get("samples_a_step", a_step), found.get("samples", step * a_step)
        if before != a_step:
            if trainer.order == "stream" and not trainer.args.ignore_data_skip:
                raise UserError(
                    f"the checkpoint's steps had {before} samples and these have {a_step}: a stream would go on "
                    "elsewhere. Keep batch size x accumulation x processes, or begin the data again with "
                    "ignore_data_skip=True"
                )
            if trainer.order == "numbered":
                report_line(trainer.args, f"{a_step} samples a step instead of {before}: goes on from sample {samples}")
        return int(samples)

    def epochs(self, loader: Any) -> Epochs:
        """Return where data with a length stand, at their beginning or where the checkpoint stopped.

        Raises:
            UserError: The checkpoint's place cannot be found again.
        """
        trainer, args, found = self.trainer, self.trainer.args, self._resumed
        a_step, step = trainer.samples_a_step, found.get("step", 0)
        before = found.get("samples_a_step", a_step)
        accumulation = args.gradient_accumulation_steps
        epochs = Epochs(loader, accumulation, a_step, step, found.get("epochs"), before, args.ignore_data_skip)
        if before != a_step:
            place = epochs.begin
            said = f"goes on after {place.seen} samples of epoch {place.epoch + 1}"
            report_line(args, f"{a_step} samples a step instead of {before}: {said}")
        return epochs

    def micro_batch(self, checkpoint: str | None) -> int | None:
        """Return the size of a checkpoint's micro-batches."""
        if checkpoint is None:
            return None
        size: int | None = read_state(Path(checkpoint), TRAINER_STATE).get("train_batch_size")
        return size

    def forget(self) -> None:
        """Remove the checkpoints of a training that begins again."""
        for folder in self._written:
            shutil.rmtree(folder, ignore_errors=True)

    def restore_unlogged(self) -> None:
        """Restore what of an interval's losses was summed but not logged."""
        trainer, unlogged = self.trainer, self._resumed["unlogged"]
        losses = unlogged["losses"]
        same = len(losses) == trainer.args.world_size
        trainer._tr_loss.fill_(losses[trainer.args.process_index] if same else sum(losses) / len(losses))
        trainer._globalstep_last_logged = unlogged["since"]

    def _recycling(self) -> list[RecyclingCallback]:
        return [c for c in self._callbacks() if isinstance(c, RecyclingCallback)]

    def _callbacks(self) -> list[TrainerCallback]:
        return list(self.trainer.callback_handler.callbacks)

    # ---- one save

    @property
    def puts_off(self) -> bool:
        """Return whether the large files of the checkpoint that is being saved are written later."""
        return self.copies is not None or self.shards is not None

    def save(self, write_all: Callable[[], Any]) -> None:
        """Write the checkpoint under a temporary name, list and flush it, and rename it once; collective.

        Args:
            write_all: Writes the files, as `Trainer` does, below `staging`.

        Raises:
            UserError: On every rank, where one of them could not write, this checkpoint or the one before; nothing
                that was there before is lost.
        """
        self.writer.wait()
        trainer = self.trainer
        output, step, best = Path(trainer.args.output_dir), trainer.state.global_step, trainer.state.best_global_step
        guarded, name = writing(output), f"checkpoint-{step}"
        group = cpu_group(dist.group.WORLD, "checkpoints") if self._in_shards() else None
        staging, state = output / f"{name}{STAGING_SUFFIX}", self._state()
        recycled = {f"{n}.{key}": t for n, c in enumerate(self._recycling()) for key, t in c.tensors().items()}
        recycled = {key: t.to("cpu", copy=True) for key, t in recycled.items()}

        def finish(hashes: dict[Path, str]) -> None:
            replaced = self._replaced(output, step, best)
            if shards is not None and shards.ordinary:
                shards.consolidate(staging / name)
            self._finish(output, staging / name, {**state, REPLACED: replaced}, recycled, hashes)
            prune(output / name, replaced)

        def complete() -> None:
            while later:
                later.pop(0)()  # and let go of its copies
            hashes = {} if shards is None else shards.write(staging / name, group)
            _together(partial(guarded(finish), hashes), first_only=True, group=group)

        with self._undone(staging, step):
            ordinary = group is not None and gather_objects(None, self._is_read())[0]
            _together(partial(guarded(self._make_room), output, ordinary), first_only=True)
            self.staging, self._later = staging, []
            beside = self.writes_beside()
            if group is not None:
                from fire_llm.training.shards import ShardedSave

                self.shards = ShardedSave(trainer, ordinary, self._stages() if beside else None)
            elif beside:
                self.copies = self._copied()
                beside = self.copies is not None
            try:
                _together(guarded(write_all))
                if trainer.averaging.on and self.shards is None:
                    _together(guarded(lambda: self._save_average(staging / name / AVERAGED)))
                self._name_best(output, staging / name)
            finally:
                shards, later = self.shards, self._later
                self.staging, self.shards, self.copies, self._later = None, None, None, []
            if not beside:
                guarded(complete)()
                return

        def write() -> None:
            try:
                with self._undone(staging, step), writing(output):
                    complete()
            except UserError:
                raise
            except Exception as error:  # it is raised at another step
                raise RuntimeError(f"step {step} was not saved: {error!r}") from error

        self.writer.start(write)

    def _name_best(self, output: Path, written: Path) -> None:
        """Note the best checkpoint under the name that it will have, not the one it is written under."""
        state = self.trainer.state
        best = output / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best.is_dir() or best.name == written.name):
            state.best_model_checkpoint = str(best)
            if self.trainer.args.should_save:
                state.save_to_json(str(written / TRAINER_STATE_NAME))

    def save_model_later(self, folder: Path) -> None:
        """Leave the weights that were copied to the thread; of shards, write what stands beside them."""
        if self.shards is not None:
            if self.trainer.args.should_save:
                self.shards.describe(folder)
            return
        folder.mkdir(parents=True)
        assert self.copies is not None
        weights = self.copies[0]
        self._later.append(lambda: self.trainer._save(str(folder), state_dict=weights))

    def _save_average(self, folder: Path) -> None:
        """Save the weights' average as a model of its own; a copy is left to the thread."""
        if self.copies is not None:
            weights = self.copies[2]
            self._later.append(lambda: self.trainer._save(str(folder), state_dict=weights))
            return
        with self.trainer.averaging.applied():
            self.trainer.save_model(str(folder), _internal_call=True)

    def save_optimizer_and_scheduler(self, folder: Path) -> None:
        """Save the schedule and whole moments; copies are left to the thread, and shards to their ranks."""
        trainer, file = self.trainer, folder / OPTIMIZER
        if self.shards is not None:
            moments = self.shards.optimizer()
        else:
            moments = whole_optimizer(trainer.optimizer) if self.copies is None else self.copies[1]
        if not trainer.args.should_save:
            return
        if self.copies is None:
            torch.save(moments, file)
        else:
            self._later.append(lambda: torch.save(moments, file))
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def writes_beside(self) -> bool:
        """Return whether training goes on while the next checkpoint is written."""
        trainer, args = self.trainer, self.trainer.args
        wanted, shards = args.async_save, self._in_shards()
        if wanted is None:
            wanted = (shards or args.device.type not in ("cpu", "xla")) and not self._looked_at()
        alone = not active() and not trainer.is_fsdp_enabled
        goes_on = trainer.state.global_step < trainer.state.max_steps and not asked() and not trainer.stopping.number
        # transformers writes to config.json the dtype that the parameters have just then: bf16 in the middle of a pass.
        still = (shards or not args.bf16_params) and not args.enable_jit_checkpoint
        return bool(wanted and (shards or (alone and self._plain_model())) and goes_on and still)

    def _in_shards(self) -> bool:
        """Return whether each rank writes its own shards; what others write by their own code is gathered for them."""
        return bool(self.trainer.is_fsdp_enabled and self._plain_model())

    def _plain_model(self) -> bool:
        """Return whether the model is one of transformers as it is, and no checkpoint of it is pushed while saved."""
        model = self.trainer.model
        own = isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)
        placed = getattr(model, "hf_quantizer", None) is not None or hasattr(model, "hf_device_map")
        return own and not placed and not self.trainer.args.push_to_hub

    def _looked_at(self) -> bool:
        """Return whether something may read a checkpoint as soon as it is saved."""
        return any(reads_checkpoints(c) for c in self._callbacks() if not isinstance(c, Stopping))

    def _is_read(self) -> bool:
        """Return whether somebody will read the weights of the next checkpoint: the last, the best, one that stays."""
        trainer, step = self.trainer, self.trainer.state.global_step
        last = step >= trainer.state.max_steps or trainer.control.should_training_stop
        stays = step in trainer.args.keep_steps or step == trainer.state.best_global_step
        return last or stays or trainer.args.save_only_model or self._looked_at()

    def _stages(self) -> Any:
        """Return what copies shards to the host, into page-locked memory where they come from CUDA.

        One serves all saves and keeps their memory, but in torch 2.11, which empties it after a save.
        """
        if self._stager is None or spent(self._stager):
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            on_cuda = self.trainer.args.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(on_cuda, False, False, on_cuda))
        return self._stager

    def _copied(self) -> tuple[Any, ...] | None:
        """Copy weights, the optimizer's state and the weights' average to the host; None where that cannot be."""
        trainer = self.trainer
        optimizer = None if trainer.args.save_only_model else trainer.optimizer.state_dict()
        copied = on_host(trainer.model.state_dict(), optimizer)
        if copied is None or not trainer.averaging.on:
            return copied
        with trainer.averaging.applied():
            averaged = on_host(trainer.model.state_dict())
        return None if averaged is None else (*copied, *averaged)

    @contextmanager
    def _undone(self, staging: Path, step: int) -> Iterator[None]:
        """Remove what could not be completed, and name its step."""
        try:
            yield
        except UserError as error:
            if self.trainer.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            raise UserError(
                f"{error}\nStep {step} was not saved. What was saved before stays, and the same command goes on from it"
            ) from error

    # ---- what a checkpoint holds beside transformers' files, and which stay

    def hash_over_ranks(self) -> int:
        """Return the sum of all ranks' hashes of batches; collective."""
        return int(self.trainer.accelerator.reduce(self.trainer.hash_of_steps(), "sum"))

    def _state(self) -> dict[str, Any]:
        """Return what `TrainerState` has no room for; collective."""
        trainer = self.trainer
        return {
            "step": trainer.state.global_step,
            "batches_hash": self.hash_over_ranks(),
            "seconds": self._resumed.get("seconds", 0.0) + time.monotonic() - self._began,
            "world_size": trainer.args.world_size,
            "samples": trainer.first_sample(trainer.state.global_step),
            "samples_a_step": trainer.samples_a_step,
            **({} if trainer.epochs is None else {"epochs": trainer.epochs.state(trainer.state.global_step)}),
            "stopped": any(isinstance(c, EarlyStopCallback) and c.stopped for c in self._callbacks()),
            # A signal saves in the middle of a logged interval; its mean must come out as if it had not.
            "unlogged": {
                "since": trainer._globalstep_last_logged,
                "losses": gather_objects(None, float(trainer.guard.before if trainer.waiting else trainer._tr_loss)),
            },
        }

    def _make_room(self, output: Path, ordinary: bool) -> None:
        """Remove what a killed process left half-written, and see that there is room before anything is written."""
        clear_partial_checkpoints(output)
        each = BYTES_A_PARAMETER + AVERAGED_BYTES * self.trainer.averaging.on
        weights = sum(p.numel() for p in self.trainer.model.parameters())
        needed = (self._bytes or each * weights) + ordinary * 8 * weights  # in shards, whole in scratch, and written
        if (free := free_bytes(output)) < needed:
            raise UserError(
                f"'{output}' has {free / 1e9:.3g} GB free and a checkpoint takes {needed / 1e9:.3g} GB: "
                "free some space, or keep fewer checkpoints"
            )

    def _finish(
        self, output: Path, written: Path, state: dict[str, Any], recycled: dict[str, Tensor], hashes: dict[Path, str]
    ) -> None:
        """Complete, list, flush and rename a checkpoint."""
        for folder in () if plain(self.trainer.args) else (written, written / AVERAGED):
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and nothing of ours reads it
        if (written / AVERAGED).is_dir():
            write_manifest(written / AVERAGED, hashes)
        write_json(written / CONTINUAL_STATE, state)
        if recycled:
            save_file(recycled, written / RECYCLING)
        self._bytes = write_manifest(written, hashes)
        sync(written)
        final = output / written.name
        if final.exists():  # one of this step that was damaged; it goes only when the new one has its name
            final.rename(written.parent / "damaged")
            self._sound.discard(final)
        written.rename(final)
        self._written.append(final)
        sync(output, below=False)
        shutil.rmtree(written.parent)

    def _replaced(self, output: Path, step: int, best: int | None) -> list[int]:
        """Return the steps of older checkpoints that nothing keeps once one of this step is there."""
        args = self.trainer.args
        if args.save_total_limit is not None and args.save_total_limit <= 0:  # no limit, as in `Trainer`
            return []
        # One that was skipped when this training was resumed is left for inspection, and does not count as kept.
        there = checkpoints(output)
        self._sound |= {path for path, _ in there if path not in self._sound and damage(path, contents=False) is None}
        older = [n for folder, n in there if n < step and folder in self._sound]
        named = self.trainer.state.best_model_checkpoint  # an older one, where the best step was not saved
        bests = {best, step_of(Path(named)) if named else None} - {None}
        if args.save_total_limit is None:
            others = (args.keep_last or 1) - 1
        else:  # the best one is among them
            others = args.save_total_limit - 1
            newest_ones = {step, *older[max(0, len(older) - others) :]}
            others -= bool(bests & {*older} - newest_ones) and others > 0
        kept = {*args.keep_steps, *bests, *self._needed_again, *older[max(0, len(older) - others) :]}
        return [n for n in older if n not in kept]


# ---- before a training


def try_configs(model: Any) -> None:
    """Try, before hours of training, what a save writes beside the weights.

    Raises:
        UserError: A config can be read, but not written.
    """
    for name in ("config", "generation_config"):
        written: Any = getattr(model, name, None)
        try:
            with TemporaryDirectory() as folder:
                if hasattr(written, "save_pretrained") and (name == "config" or model.can_generate()):
                    written.save_pretrained(folder)
        except OSError:  # of the place for temporary files, where no checkpoint goes
            continue
        except Exception as error:  # the classes' own checks raise what they like
            said = " ".join(str(error).split())
            raise UserError(
                f"{name}.json of the model cannot be written, so that no checkpoint could be saved: {said} "
                f"Correct it in the checkpoint's folder, or on model.{name}"
            ) from error


class Verified(str):
    """A checkpoint's folder whose files were read and are what was written."""


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
            held = "is no checkpoint of a ContinualTrainer" if folder.is_dir() else "does not exist"
            raise UserError(
                f"Can't find a valid checkpoint at {folder}: resume_from_checkpoint='{folder}' {held}: "
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
    """Return the checkpoint that a stage goes on from, None for none, and report which were skipped; collective.

    Raises:
        UserError: On every rank, where there are checkpoints and none is whole.
    """
    newest, skipped = _together(lambda: newest_intact(folder), first_only=True)
    if is_first():
        sys.stderr.writelines(f"{title}: {line}\n" for line in skipped)
    return Verified(newest) if newest else None


def verified(checkpoint: Path) -> Path:
    """Return a checkpoint that another stage starts from, if it is what was written; collective.

    Raises:
        UserError: On every rank, with what is wrong and what to do.
    """
    if wrong := _together(lambda: damage(checkpoint), first_only=True):
        last = checkpoint in [path for path, _ in checkpoints(checkpoint.parent)[-1:]]
        again = "delete it" if last else f"delete '{checkpoint.parent}'"
        where = "its newest checkpoint that is whole" if last else "its beginning"
        raise UserError(
            f"'{checkpoint}' is damaged: {wrong}. Put back a copy of it, or {again}: the same command then trains "
            f"that phase again, from {where}"
        )
    return checkpoint


def _together(work: Callable[[], Any], first_only: bool = False, group: Any = None) -> Any:
    """Return on every rank what the work gives on the first one, or raise on every rank what one of them ran into.

    A rank that alone gave up would leave the others waiting for it.

    Args:
        work: What is to be done.
        first_only: On the first rank alone.
        group: Of all ranks; of a thread its own, in which no fault may be raised on one rank alone.
    """
    found, fault, known = None, None, True
    if not first_only or is_first():
        try:
            found = work()
        except UserError as error:
            fault = str(error)
        except Exception as error:
            if group is None:
                raise
            fault, known = repr(error), False
    everywhere = gather_objects(group, (found if is_first() else None, fault, known))
    if faults := [(fault, known) for _, fault, known in everywhere if fault is not None]:
        raise (UserError if faults[0][1] else RuntimeError)(faults[0][0])
    return everywhere[0][0]
