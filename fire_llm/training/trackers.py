"""Report a training to TensorBoard, Trackio, W&B and all that transformers integrates, by transformers' own callbacks.

A tracker cannot change a training: an error ends only its reports, and the random generators are put back. Of a
recipe's stage, its name, its settings and where it was interrupted are reported too.
"""

from __future__ import annotations

import copy
import math
import os
import random
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fire_llm.core.atomic import read_json, remove, write_json
from fire_llm.core.errors import UserError, did_you_mean, first_line, redact
from fire_llm.training.callbacks import ResetCallback
from fire_llm.training.generating import SAMPLES
from fire_llm.training.loss_jump import LossJumpCallback, loss_jump
from fire_llm.training.progress import report_line

RECORD = "trackers.json"
"""File in a stage's folder: for each tracker its run, and the last log that it was sent, [step, number]."""

FINISH_SECONDS = 300.0
"""How long W&B may upload after a stage. The rest stays in the run's folder, for `wandb sync`."""

_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
_OWN_EVENTS = ("on_train_begin", "on_log", "on_train_end")
_NOTHING = (-1, 0)
_SIZES = ("_tokens", "_bytes")
"""Ends of keys that are not sent: lengths of evaluated texts, which make no curves."""

_UPLOADS = {
    "wandb": ("WANDB_LOG_MODEL", ("checkpoint",)),
    "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS", ("1", "on", "yes", "true")),
    "trackio": ("", ()),
}
"""Trackers that read a saved checkpoint only where an environment variable has one of these values."""


def reads_checkpoints(callback: TrainerCallback) -> bool:
    """Return whether a callback may read the folder of a checkpoint as soon as it is saved."""
    if type(callback).on_save is TrainerCallback.on_save:
        return False
    name = next((name for name, kind in INTEGRATION_TO_CALLBACK.items() if kind is type(callback)), "")
    variable, values = _UPLOADS.get(name, (None, ()))
    return variable is None or os.environ.get(variable, "").lower() in values


def name_faults(names: Iterable[str]) -> Iterator[str]:
    """Yield a message for each name of a tracker that is given twice or that the installed transformers lacks."""
    names = list(names)
    for name in dict.fromkeys(names):
        if name not in INTEGRATION_TO_CALLBACK:
            near = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            yield f"report_to: there is no tracker '{name}'.{near} Known: {', '.join(INTEGRATION_TO_CALLBACK)}, or none"
        elif names.count(name) > 1:
            yield f"report_to: '{name}' is named twice"


def check_trackers(names: Iterable[str], project: str, *, begin: bool = False) -> None:
    """Check, before hours of training, that trackers can be used: installed, logged in, allowed to write.

    Args:
        names: Of `report_to`.
        project: Name of the recipe, which a tracker's project is called.
        begin: Training is about to begin: ask W&B's server, and make Trackio's data base.

    Raises:
        UserError: With every fault, and what to do about each.
    """
    faults = []
    for name in names:
        try:
            if not _available(name):
                raise UserError(f"it is not installed, or not set up: {_HINTS.get(name, f'pip install {name}')}")
            INTEGRATION_TO_CALLBACK[name]()
            if name in _CHECKS:
                _CHECKS[name](project, begin)
        except Exception as error:  # each library raises its own
            faults.append(f"report_to: {name} cannot be used: {redact(first_line(error))}")
    if faults:
        raise UserError("\n  ".join(faults))


def _available(name: str) -> bool:
    """Return whether transformers finds what an integration needs; True where it has no test for that."""
    stems = (name, name.replace("_", ""), name.removesuffix("_ml"), f"{name}kit")
    tests = (getattr(integration_utils, f"is_{stem}_available", None) for stem in stems)
    return next((bool(test()) for test in tests if test is not None), True)


def _offline() -> bool:
    import wandb

    return wandb.setup().settings.mode not in ("online", "shared")


def _check_wandb(project: str, begin: bool) -> None:
    import wandb

    if not _offline() and not wandb.login(verify=begin, prompt=False):
        raise UserError("nobody is logged in. Run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later")


def _check_trackio(project: str, begin: bool) -> None:
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    SQLiteStorage.validate_project_name(project)
    try:
        if begin:
            SQLiteStorage.init_db(project)
    except Exception as error:
        raise UserError(
            f"'{TRACKIO_DIR}' cannot be written ({first_line(error)}). Set TRACKIO_DIR to a folder of yours"
        ) from error


_HINTS = {
    "azure_ml": "pip install azureml-sdk",
    "comet_ml": "pip install comet-ml, and set COMET_API_KEY",
    "flyte": "pip install flytekit",
    "kubeflow": "it reports from a job of Kubeflow's trainer alone, which sets KUBEFLOW_TRAINER_SERVER_URL",
}
"""What to do, where installing the package of the same name is not enough."""

_CHECKS: dict[str, Callable[[str, bool], None]] = {"wandb": _check_wandb, "trackio": _check_trackio}


@dataclass(frozen=True)
class Tracked:
    """What trackers receive about a stage."""

    folder: Path
    """The stage's: it holds `RECORD` and TensorBoard's events."""
    run_folder: Path
    """It holds W&B's files."""
    project: str
    """Name of the recipe."""
    group: str
    """Name of the run's folder; of a grid, the trial's."""
    path: tuple[str, ...]
    """Parts of the run's name: `demo / libraries / fire / seed-1`."""
    phase: str
    config: Mapping[str, Any] = field(repr=False)
    """Shown as the run's settings, beside the arguments of training."""

    @property
    def name(self) -> str:
        """Return the run's name."""
        return " / ".join(self.path)


class Tracker:
    """Guard one of a trainer's integrations: an error ends its reports, with one line on stderr, and not the training.

    Args:
        callback: The integration. It stays among the trainer's callbacks; its events pass through this object.
        trainer: Its `ContinualTrainer`.
    """

    def __init__(self, callback: Any, trainer: Any) -> None:
        names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
        self.name = next(names[kind] for kind in type(callback).__mro__ if kind in names)
        self.callback, self.trainer = callback, trainer
        self.stage: Tracked | None = None
        """Set by `reporting`, on the first rank."""
        self.failed = self._running = self._opened = False
        self._reports: dict[int, int] = {}
        self._log_number = _NOTHING
        """Of the last log: its step, and which of that step's logs it is."""
        self._record: dict[str, Any] = {}
        """This tracker's part of `RECORD`."""
        self._original: dict[str, Callable[..., Any]] = {}
        for event in _EVENTS:
            if event in _OWN_EVENTS or getattr(type(callback), event) is not getattr(TrainerCallback, event):
                self._original[event] = getattr(callback, event)
                setattr(callback, event, partial(self._guarded, event))

    def _guarded(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        own: dict[str, Callable[..., Any]] = {
            "on_train_begin": self._begin,
            "on_log": self._log,
            "on_train_end": self._end,
        }
        act = own.get(event, self._original[event])
        try:
            # Trackio prints to stdout. W&B wraps stdout, and needs the real one.
            with _generators_kept(), nullcontext() if self.name == "wandb" else redirect_stdout(sys.stderr):
                act(args, state, control, **kwargs)
        except Exception as error:
            self.failed = True
            reason = redact(first_line(error))
            report_line(args, f"{self.name} failed and is left out from step {state.global_step} on: {reason}")
            with suppress(Exception):
                self._close(1)

    def _begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_number, self._running = _NOTHING, True
        if self.stage is None:
            self._original["on_train_begin"](args, state, control, **kwargs)
            return
        path = self.stage.folder / RECORD
        known = read_json(path, "delete it: trackers then begin a new run") if path.exists() else {}
        self._record = known.get(self.name, {})
        prepare = {"tensorboard": self._tensorboard, "wandb": self._wandb, "trackio": self._trackio}.get(self.name)
        if prepare is not None:
            prepare(self.stage, args, state.global_step)
        self._original["on_train_begin"](args, state, control, **kwargs)
        if self.name == "tensorboard":
            self.callback.tb_writer.add_text("stage", _markdown(self.stage.config))
        elif self.name == "trackio":
            sys.modules["trackio"].config.update(self.stage.config)
        # Send the entries of the log that this tracker missed, because it failed or was not asked for yet.
        for entry in (entry for entry in state.log_history if SAMPLES not in entry):  # texts are no curves
            past = copy.copy(state)
            past.global_step, past.epoch = entry["step"], entry.get("epoch")
            self._send(args, past, control, {key: value for key, value in entry.items() if key != "step"}, **kwargs)

    def _log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        self._send(args, state, control, {**logs, **self._figures(state, logs)}, **kwargs)

    def _send(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Send a log, unless the tracker's run has it from before an interruption."""
        last_step, number = self._log_number
        self._log_number = (state.global_step, number + 1 if state.global_step == last_step else 0)
        if self.stage is not None:
            if self._log_number <= tuple(self._record.get("sent", _NOTHING)):
                return
            # Recorded before it is sent: better a gap than one log twice, with two speeds.
            self._record["sent"] = list(self._log_number)
            self._write_record()
            logs = {k: v for k, v in logs.items() if not (k.startswith(("eval_", "ema_")) and k.endswith(_SIZES))}
        known = {key: value for key, value in logs.items() if value is not None}
        self._original["on_log"](args, state, control, logs=known, **kwargs)

    def _write_record(self) -> None:
        assert self.stage is not None
        path = self.stage.folder / RECORD
        others = read_json(path, "delete it") if path.exists() else {}
        write_json(path, {**others, self.name: self._record})

    def _end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._original["on_train_end"](args, state, control, **kwargs)
        self._close(0)

    def abandon(self) -> None:
        """End the tracker's run where training raised."""
        if self._running and not self.failed:
            trainer = self.trainer
            if self.name == "wandb":  # whose callback would upload a model
                with suppress(Exception):
                    self._close(1)
            else:
                parts = {"model": trainer.model, "processing_class": trainer.processing_class}
                self._guarded("on_train_end", trainer.args, trainer.state, trainer.control, **parts)

    def _close(self, code: int) -> None:
        self._running = False
        if self._opened:
            self._opened = False
            sys.modules["wandb"].finish(exit_code=code)

    # ---- how each integration goes on with a stage's run

    def _tensorboard(self, stage: Tracked, args: Any, step: int) -> None:
        """Write into the stage's folder; drop what was written after the step that training goes on from."""
        try:
            writers = import_module("torch.utils.tensorboard")
        except ImportError:
            writers = import_module("tensorboardX")

        users = self.callback.logging_dir  # TENSORBOARD_LOGGING_DIR
        folder = stage.folder if users is None else Path(users, *stage.path)
        purge = None
        if sent := self._record.get("sent"):
            purge = step + 1 if step else 0
            self._record["sent"] = list(min(tuple(sent), (step, sys.maxsize) if step else _NOTHING))
        self.callback.tb_writer = writers.SummaryWriter(log_dir=str(folder), purge_step=purge)

    def _wandb(self, stage: Tracked, args: Any, step: int) -> None:
        """Open the stage's run, unless the caller opened one: the integration then reports to that."""
        import wandb

        if wandb.run is not None:
            return
        run_id = self._record.setdefault("id", secrets.token_hex(4))
        self._write_record()
        folder = os.environ.get("WANDB_DIR", str(stage.run_folder))
        opened = wandb.init(
            project=os.environ.get("WANDB_PROJECT", stage.project),
            group=os.environ.get("WANDB_RUN_GROUP", stage.group),
            name=stage.name,
            job_type=stage.phase,
            id=run_id,
            resume="allow" if "sent" in self._record and not _offline() else None,
            config=dict(stage.config),
            dir=folder,
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
        )
        self._opened = True
        if _offline():
            # An interrupted run's file may lack its end: the new file gets the whole log, and replaces it.
            self._record["sent"] = list(_NOTHING)
            own = Path(opened.settings.sync_dir).resolve()
            for earlier in Path(folder).glob(f"wandb/offline-run-*-{run_id}"):
                if earlier.resolve() != own:
                    remove(earlier)
        else:  # ask the server how far it got
            reached = opened.summary.get("train/global_step")
            self._record["sent"] = list(_NOTHING) if reached is None else [int(reached), sys.maxsize]

    def _trackio(self, stage: Tracked, args: Any, step: int) -> None:
        """Choose the run's name, by which Trackio finds a run again; not one that another stage's run has."""
        import trackio

        if "name" not in self._record:
            taken: set[str] = set()
            with suppress(ValueError):  # there is no such project yet
                taken = {run.name for run in trackio.Api().runs(stage.project)}
            suffix = f" / {secrets.token_hex(2)}" if stage.name in taken else ""
            self._record["name"] = stage.name + suffix
            self._write_record()
        args.run_name = self._record["name"]
        if not (args.trackio_space_id or os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
            from trackio.sqlite_storage import SQLiteStorage

            rows = SQLiteStorage.get_logs(stage.project, args.run_name)
            steps = [int(row["train/global_step"]) for row in rows if "train/global_step" in row]
            last = max(steps, default=None)
            self._record["sent"] = list(_NOTHING) if last is None else [last, steps.count(last) - 1]

    def _figures(self, state: Any, logs: Mapping[str, Any]) -> dict[str, float]:
        """Return figures of the resets since the last log, SFE, DfI and norms, and of the loss jump."""
        figures: dict[str, float] = {}
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ResetCallback):
                for report in callback.reports[self._reports.get(id(callback), 0) :]:
                    figures |= report_figures(report)
                self._reports[id(callback)] = len(callback.reports)
            elif isinstance(callback, LossJumpCallback) and state.global_step == 0:
                for corpus, before in callback.before.items():
                    after = logs.get(f"eval_{corpus}_nll")
                    if after is not None and math.isfinite(after):
                        jump = loss_jump(before, after, callback.vocabulary)
                        figures[f"eval_{corpus}_nll_before_reset"] = before
                        if jump["undone"] is not None:
                            figures[f"eval_{corpus}_undone_by_reset"] = jump["undone"]
        return figures


def report_figures(report: Any) -> dict[str, float]:
    """Summarise a `ResetReport`: SFE and norms over all touched tensors, the mean DfI over touched matrices."""
    figures: dict[str, float] = {}
    for name, squared in (("sfe", False), ("norm_before", True), ("norm_after", True)):
        values = [getattr(row, name) for row in report.touched]
        if values and None not in values:
            total = sum(value**2 if squared else value for value in values)
            figures[f"reset_{name}"] = math.sqrt(total) if squared else total
    for name in ("dfi_before", "dfi_after"):
        values = [value for row in report.touched if (value := getattr(row, name)) is not None]
        if values:
            figures[f"reset_{name}"] = sum(values) / len(values)
    return figures


def guard_trackers(trainer: Any) -> list[Tracker]:
    """Return a guard for each integration among a trainer's callbacks."""
    known, callbacks = tuple(INTEGRATION_TO_CALLBACK.values()), trainer.callback_handler.callbacks
    return [Tracker(callback, trainer) for callback in callbacks if isinstance(callback, known)]


@contextmanager
def reporting(trainer: Any, stage: Tracked) -> Iterator[None]:
    """Tell a trainer's trackers which stage it trains in the block; end their runs where it raises."""
    if trainer.args.process_index == 0:
        for tracker in trainer.trackers:
            tracker.stage = stage
    try:
        yield
    except BaseException:
        for tracker in trainer.trackers:
            tracker.abandon()
        raise


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch's CPU after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _markdown(config: Mapping[str, Any]) -> str:
    """Return settings as TensorBoard's text tab shows them: YAML in a block of code."""
    import yaml

    return "".join(f"    {line}\n" for line in yaml.safe_dump(dict(config), sort_keys=False).splitlines())
