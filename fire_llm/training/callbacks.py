"""Callbacks: a reset inside any `Trainer`, kept moments, and when a `ContinualTrainer` saves and logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, TrainerCallback

from fire_llm.architectures.modules import Kernels, SplitLike
from fire_llm.core.atomic import write_json
from fire_llm.core.errors import UserError
from fire_llm.distributed import make_current, trains_any
from fire_llm.models import fresh_like, fresh_model
from fire_llm.resets import ResetReport, ResetsLike, apply_reset, parse_resets
from fire_llm.resets.apply import LayoutName, clear_states, module_layout
from fire_llm.resets.spec import ResetSpec, refuse_kinds
from fire_llm.training.beginning import Beginning
from fire_llm.training.gradients import gather_gradient
from fire_llm.training.progress import in_run, report_line
from fire_llm.training.sharding import load_optimizer, refuse_launched_engines


def initial_model(resets: Sequence[ResetSpec], given: Any, model: Any, seed: int) -> Any:
    """Return the initial weights for some resets: the given ones, else newly drawn ones where a reset needs them.

    Args:
        resets: Those that may need them.
        given: A model that the user gives; None for none.
        model: The model that is reset, or the config of a causal LM.
        seed: Of newly drawn weights.

    Raises:
        UserError: They are needed and not given, and there is no config of transformers to draw them from.
    """
    method = next((reset.method for reset in resets if reset.needs_initial), None)
    if given is not None or method is None:
        return given
    if isinstance(model, PretrainedConfig):
        return fresh_model(model, seed)
    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        raise UserError(
            f"initial: {method} needs the initial weights, and this model has no config to draw them from: give "
            "initial=, a copy of the model from before training"
        )
    return fresh_like(model, seed)


class ResetCallback(TrainerCallback):
    """Apply a reset inside a running `Trainer`: when training begins, or after given steps; never again on resumption.

    Works in any `Trainer`. The state of exactly the touched parameters is cleared in its optimizer; one that trains
    only others, such as a head, has none. A reset that reads the gradient (`dash`) needs a `ContinualTrainer`, which
    gathers it from the batches to come.

    Args:
        resets: A method's name, a spec, or a list of specs, as `apply_reset` takes them.
        at_steps: Optimizer steps after which it is applied; none means when training begins.
        initial: A model with the run's initial weights; where it is needed and not given, drawn from the model's
            config and `seed`.
        seed: Seed of those weights; the trainer's own by default.
        report_file: Where to write the report as JSON.
        spectra: Whether the report holds singular values.
        training: What other callbacks do during training, for the report.
        layout: `modules` for a model that is no language model of transformers: see `apply_reset`, like the next two.
        split: Weights that hold several matrices.
        kernels: What a convolution is.
        **options: Options of the method, where `resets` is its name: `ResetCallback("fire", iterations=10)`.

    Raises:
        UserError: At once, for an unknown reset or option, or a method that acts during training; when training begins,
            for a step that it does not reach.
    """

    def __init__(
        self,
        resets: ResetsLike = "fire",
        *,
        at_steps: Iterable[int] = (),
        initial: Any = None,
        seed: int | None = None,
        report_file: str | Path | None = None,
        spectra: bool = False,
        training: ResetsLike = (),
        layout: LayoutName = "transformers",
        split: SplitLike | None = None,
        kernels: Kernels = "positions",
        **options: Any,
    ) -> None:
        modules = module_layout(layout, split, kernels) is not None
        self.layout: dict[str, Any] = {"layout": layout, "split": split, "kernels": kernels}
        self.resets = parse_resets(resets, options, modules=modules)
        refuse_kinds(self.resets)
        self.training = parse_resets(training)
        self.at_steps = frozenset(at_steps)
        if any(step < 1 for step in self.at_steps):
            raise UserError(
                f"at_steps {sorted(self.at_steps)}: steps count from 1; leave it empty to reset at the start"
            )
        self.initial, self.seed, self.spectra = initial, seed, spectra
        self.report_file = Path(report_file) if report_file else None
        self.reports: list[ResetReport] = []
        self._trainer: Any = None
        self._beginning, self._reported = Beginning(), 0

    def attach(self, trainer: Any) -> None:
        """Note the `ContinualTrainer` that this runs in, which calls it."""
        self._trainer = trainer

    def begin_again(self) -> None:
        """Drop the reports of a training that begins again."""
        del self.reports[self._reported :]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset at the start of training, unless this is a resumption; refuse engines that no reset can reach.

        Where `auto_find_batch_size` begins training again, it begins with the weights from before the reset: a
        `ContinualTrainer` sees to this by itself.
        """
        refuse_launched_engines(args)
        if self.at_steps and max(self.at_steps) > state.max_steps:
            raise UserError(
                f"at_steps {sorted(self.at_steps)}: training ends at step {state.max_steps}, before the last of them"
            )
        if self._trainer is None and self._beginning.again(args, state, kwargs.get("model"), kwargs.get("optimizer")):
            self.begin_again()
        self._reported = len(self.reports)
        if not self.at_steps and state.global_step == 0:
            self._apply(args, **kwargs)
        elif not self.at_steps:
            self._report(args, f"not applied, as training goes on from step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset after a listed step; the checkpoint of that step holds the result."""
        if state.global_step in self.at_steps:
            self._apply(args, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Free the copy of the weights that training began with."""
        self._beginning.end()

    def _apply(self, args: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        seed = args.seed if self.seed is None else self.seed
        initial = initial_model(self.resets, self.initial, model, seed)
        gathering = self._trainer is not None and any(r.needs_gradient for r in self.resets)
        if gathering:
            gather_gradient(self._trainer, self.resets)
        make_current(model)
        if optimizer is not None and not trains_any(optimizer, model.parameters()):
            raise UserError(
                "optimizers: the one that is given trains no parameter of the trainer's model, but those of a copy, or "
                "master copies that would undo a reset: make one from model.parameters()"
            )
        # It need not train what is reset: one of the head alone has no moments that a reset of the body could clear.
        report = apply_reset(model, self.resets, initial=initial, spectra=self.spectra, **self.layout)
        report.optimizer_states_cleared = clear_states(model, optimizer, report)
        if gathering:
            model.zero_grad()
        report.training = self.training
        self.reports.append(report)
        if self.report_file is not None and args.process_index == 0:
            write_json(self.report_file, report.to_dict())
        for reset in self.resets:
            if reset.found is not None and in_run(args):
                report_line(args, f"{reset.method}: {reset.found}")
        self._report(args, str(report))

    def _report(self, args: Any, text: str) -> None:
        """Report what became of the reset; a run has a page for that."""
        if not in_run(args):
            report_line(args, text, "ResetCallback")


class KeptOptimizer(TrainerCallback):
    """Begin training with the moments of an earlier checkpoint, but with new learning rates and schedule.

    It stands before a `ResetCallback`, which then clears the moments of the weights that it touches.

    Args:
        checkpoint: Of the same model, trained by the same kind of optimizer.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Load the moments, unless training is resumed: its checkpoint has them."""
        if state.global_step == 0:
            load_optimizer(optimizer, self.checkpoint, settings=False)


class Keeping(TrainerCallback):
    """Save at the listed steps, and log wherever something is saved or measured: a mean loss ends there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure and save at the last step too, where the strategy is `steps`."""
        last = state.global_step >= state.max_steps
        control.should_evaluate |= last and args.eval_strategy == "steps"
        control.should_save |= (last and args.save_strategy == "steps") or state.global_step in args.keep_steps
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log where something is saved or measured, unless the strategy is `no`."""
        if (control.should_save or control.should_evaluate) and args.logging_strategy != "no":
            control.should_log = True
