"""Train one phase: transformers' `Trainer`, with those methods overridden whose results have to be exact.

The class says when something happens, in the order of a training; the files beside it say how.
Shapes: B = sequences a micro-batch, T = tokens a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.training_args import OptimizerNames

from fire_llm.architectures.context import choose_context
from fire_llm.architectures.matrices import unwrap
from fire_llm.core.compat import check_trainer
from fire_llm.core.errors import UserError, did_you_mean, first_line
from fire_llm.core.manifest import TRAINER_STATE, in_shards, read_state
from fire_llm.core.signals import set_step_near
from fire_llm.distributed import fsdp_modules
from fire_llm.evaluation import token_nll
from fire_llm.evaluation.scoring import IGNORE
from fire_llm.evaluation.texts import EvaluationSet
from fire_llm.linalg.matmul import settings_kept
from fire_llm.training.arguments import adopted, plain
from fire_llm.training.averaging import Averaging
from fire_llm.training.batches import FromStep, Windows, hash_batch, labels_are_shifted, order_of, targets_of
from fire_llm.training.beginning import Start, largest_part
from fire_llm.training.callbacks import Keeping, ResetCallback
from fire_llm.training.contract import METHODS, OPTIONS, PARAMETERS, Given, refuse_options
from fire_llm.training.epochs import Epochs
from fire_llm.training.loss import router_loss, smoothed_nll, summed_loss, with_router_loss
from fire_llm.training.nonfinite import SKIPPED, FiniteGuard, propagate_nonfinite
from fire_llm.training.optimizers import muon_adamw, scheduled
from fire_llm.training.penalties import add_penalties
from fire_llm.training.preemption import Stopping, TimedSaves
from fire_llm.training.progress import Progress, report_line
from fire_llm.training.recycling import RecyclingCallback
from fire_llm.training.restoring import restore_weights
from fire_llm.training.saving import Saver, checkpoint_to_resume, try_configs
from fire_llm.training.sharding import (
    load_optimizer,
    load_weights,
    refuse_launched_engines,
    sharding,
    whole_weights,
)
from fire_llm.training.throughput import throughput
from fire_llm.training.trackers import guard_trackers
from fire_llm.training.validation import validate


class ContinualTrainer(Trainer):
    """Pretrain a causal LM on one phase's mixture, or on whatever `Trainer` trains on.

    Args:
        model: A causal LM from transformers. Another model is trained by its own loss, as by `Trainer`.
        args: `ContinualArguments`, or plain `TrainingArguments`.
        train_dataset: Numbered data return `{"input_ids": (T,), "labels": (T,)}` for any index ≥ 0 and have no
            length: sample i of the phase is the i-th, and `max_steps` ends it. Data with a length, and
            `IterableDataset`s, are sampled as by `Trainer`. `args.labels_shifted` says which token a label is.
        evaluation_sets: Corpora by name; metrics are `eval_<name>_nll`, `…_perplexity`, `…_bits_per_byte`.
        callbacks: As in `Trainer`, any iterable of them.
        **kwargs: The other parameters of `Trainer`; an `eval_dataset` may hold `EvaluationSet`s too.

    Raises:
        UserError: An option that would not be done (docs/trainer.md lists what becomes of each); the installed
            `Trainer` does not call what is overridden here, or its engine cannot be reset.

    The docstring of each overridden method says what it does otherwise than `Trainer`. `core/compat.py` lists these
    methods, and checks that the installed `Trainer` calls them.
    """

    args: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        evaluation_sets: Mapping[str, EvaluationSet] | None = None,
        callbacks: Iterable[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_trainer(Trainer)
        args = adopted(args)
        self.order = order_of(train_dataset)
        """How `train_dataset` gives its samples: numbered, sized, stream; None without one."""
        sets, eval_dataset = split_sets(kwargs.pop("eval_dataset", None))
        self.evaluation_sets = {**(evaluation_sets or {}), **sets}
        refuse_parameters(model, self.evaluation_sets, kwargs)
        optimizers = {name: kwargs[name] for name in ("optimizers", "optimizer_cls_and_kwargs") if name in kwargs}
        causal = model is None or is_causal(model)
        refuse_options(Given(args, self.order, causal, self.evaluation_sets, eval_dataset, **optimizers))
        self.saver = Saver(self)
        self.guard = FiniteGuard(self)
        self.averaging = Averaging(self)
        self._resumed_step = self._resumed_samples = 0
        self.epochs: Epochs | None = None
        """The place in data with a length, while they are trained on."""
        self._shifted: bool | None = None
        """Whether labels are shifted, as the first training batch showed, where `args.labels_shifted` is None."""
        self._evaluating = self._windows = False
        tokenizer = kwargs.get("processing_class")
        cannot_pad = isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token_id is None  # GPT-2's
        if self.order == "numbered" or cannot_pad:  # numbered samples are full
            kwargs["data_collator"] = kwargs.get("data_collator") or default_data_collator
        # `Trainer` insists on an `eval_dataset` wherever an evaluation strategy is set.
        kwargs["eval_dataset"] = eval_dataset if eval_dataset is not None else self.evaluation_sets or None
        kwargs["callbacks"] = None if callbacks is None else [*callbacks]
        try:
            super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        self.eval_dataset = eval_dataset
        self.causal = is_causal(self.model)
        """Whether the loss is taken here, and not by the model."""
        if self.causal:
            # `compute_loss` divides by the tokens of the whole accumulated batch; this is how `Trainer` learns of it.
            self.model_accepts_loss_kwargs = True
        self.batches_hash = torch.zeros((), dtype=torch.int64, device=args.device)
        """Hash of all token ids that were trained on and of their steps; the order within a step does not count."""
        self.fetched = -1
        """The step, counted from zero, whose batches were fetched last."""
        self._fetched_hash = torch.zeros_like(self.batches_hash)
        self._progress, self.stopping = Progress(), Stopping()
        if not plain(args):
            self.callback_handler.callbacks.pop()  # `Trainer`'s own bar or printer, which it adds last
        self.trackers = guard_trackers(self)
        """Of `args.report_to`, and of `callbacks`."""
        # `Keeping` logs wherever something is saved. Saves by clocks and signals come after it, so they log nothing.
        own = (self.averaging, Keeping(), TimedSaves(), self.stopping, self._progress)
        for callback in () if plain(args) else own:
            self.add_callback(callback)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train to `max_steps` or through `num_train_epochs`, from a checkpoint where one is asked for.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True for the newest whole one in `output_dir`.
            trial: None: searches are refused.
            ignore_keys_for_eval: As in `Trainer`.

        Raises:
            UserError: The checkpoint is damaged or none of a `ContinualTrainer`; one could not be written; data and
                labels are not as `labels_shifted` says; or a callback's settings do not fit the model.
            FloatingPointError: A loss or gradient is not finite, and `nonfinite` is halt.
            Stopped: A signal ended training; the checkpoint of its last step is written.
        """
        self.order = order_of(self.train_dataset)
        if self.order is None:
            raise UserError("train: there is no train_dataset; give one when the trainer is made")
        if trial is not None:
            self.hyperparameter_search()
        args = self.args
        checkpoint = checkpoint_to_resume(args, resume_from_checkpoint)
        changed = ("eval_on_start", "per_device_train_batch_size", "gradient_accumulation_steps")
        before = {name: getattr(args, name) for name in changed}
        args.eval_on_start = args.eval_on_start and checkpoint is None
        if args.auto_find_batch_size:
            saved = read_state(Path(checkpoint), TRAINER_STATE) if checkpoint else {}
            self.shrink(saved.get("train_batch_size") or self._train_batch_size)
        self._begin(checkpoint)
        callbacks = self.callback_handler.callbacks
        # First all that changes weights at a step's end, then their average, then a save that a signal asks for.
        callbacks.sort(key=lambda c: 2 if isinstance(c, JITCheckpointCallback) else int(c is self.averaging))
        for callback in callbacks:
            if isinstance(callback, ResetCallback | RecyclingCallback):
                callback.attach(self)
        try:
            with self._losses_shown():
                trained = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
            self.guard.settle()  # of the last step, where a callback ended training and nothing was logged
            self.settle()
            self.stopping.end(args, self.state)
            return trained
        except BaseException:
            self.settle(report=True)
            raise
        finally:
            for name, value in before.items():
                setattr(args, name, value)
            set_step_near(False)
            self._progress.close()

    def _begin(self, checkpoint: str | None) -> None:
        """Set what is counted to the state of a checkpoint, or to zero."""
        for name in ("_summed_loss", "_throughput", "_weights"):
            self.__dict__.pop(name, None)  # of a model that `model_init` has replaced, or of other settings
        self.batches_hash.zero_()
        self._shifted, self.fetched = None, -1
        self._resumed_step = self.saver.begin(checkpoint)
        self._resumed_samples = self.saver.resumed_samples()

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        """Train; with `auto_find_batch_size`, begin again with smaller micro-batches where memory runs out."""
        args = self.args
        if not args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)
        if self.is_fsdp_enabled:
            raise UserError(f"auto_find_batch_size is refused under FSDP: {OPTIONS['auto_find_batch_size'].instead}")
        start = Start(self, resume_from_checkpoint)
        while True:
            try:
                return super()._inner_training_loop(args.train_batch_size, args, resume_from_checkpoint, **kwargs)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                message = first_line(error)
            # Outside of the handler: its traceback holds the batch's tensors.
            start.check(message)
            self.settle(report=True)
            self.saver.forget()
            self._progress.close()
            self.shrink(args.train_batch_size // 2)
            start.put_back()
            self._begin(resume_from_checkpoint)

    def shrink(self, most: int) -> None:
        """Make micro-batches of at most so many samples, and accumulate more of them: a step stays as large."""
        micro = self.args.per_device_train_batch_size
        self.args.per_device_train_batch_size = part = largest_part(micro, most)
        self.args.gradient_accumulation_steps *= micro // part

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Refuse: checkpoints are written to one folder, and a search needs one for each trial."""
        raise UserError(f"hyperparameter_search is refused: {METHODS['hyperparameter_search'].text.replace('`', '')}")

    # ---- before the first step

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, with FSDP2 and fp16 on CPUs too; refuse engines that a reset cannot reach."""
        refuse_launched_engines(self.args)
        # accelerate, too, turns TF32 on where it compiles in fp32.
        with sharding(self), settings_kept() if self.args.tf32 is None else nullcontext():
            super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu":
            # accelerate ignores fp16 on CPUs, without a word, and would train in fp32.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    @property
    def samples_a_step(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return int(self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size)

    def first_sample(self, step: int) -> int:
        """Return the number of the first sample of a step, counted from zero; of numbered data it is the index."""
        return self._resumed_samples + (step - self._resumed_step) * self.samples_a_step

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler; that of numbered data gives them in order, with any number of ranks, resumed or not."""
        if self.order != "numbered":
            return super()._get_train_sampler(train_dataset)
        steps = self.args.max_steps
        return FromStep(self._resumed_samples, self.first_sample(steps), steps * self.samples_a_step)

    def get_train_dataloader(self) -> Any:
        """Return the loader; that of numbered data has a generator of its own.

        Drawing its seed from torch's generator would change dropout where training is resumed.
        """
        loader = super().get_train_dataloader()
        if self.order == "numbered":
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        self.epochs = self.saver.epochs(loader) if self.order == "sized" else None
        return loader

    def set_initial_training_values(self, args: Any, *more: Any, **kwargs: Any) -> Any:
        """Return `Trainer`'s counts, with the epochs and steps that are left where earlier steps had another size."""
        epochs, *others, steps = super().set_initial_training_values(args, *more, **kwargs)
        if self.epochs is not None and self.epochs.moved and not args.ignore_data_skip:
            epochs, steps = self.epochs.until(args.max_steps, args.num_train_epochs)
        return (epochs, *others, steps)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, Muon where it is asked for.

        Raises:
            UserError: transformers cannot make it, because a library is missing, say; or Muon has nothing to train.
        """
        if self.is_fsdp_enabled and self.causal and not fsdp_modules(self.model):
            self._summed_loss.look()  # now, before the model is cut into shards
        if self.args.muon and self.optimizer is None:
            self.optimizer = muon_adamw(model or self.model, self.args)
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError) as error:
            name = OptimizerNames(self.args.optim).value
            raise UserError(f"the optimizer '{name}' cannot be made: {error}") from error

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule: `args.schedule`, an infinite or WSD one, where it is given."""
        if self.args.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = scheduled(optimizer or self.optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the names of all tensors of two dimensions and more: these decay, as in the paper."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Return the epochs and batches to skip: none of numbered data, which begin at the right sample.

        Take over the count of skipped steps, and try what a save writes beside the weights.
        """
        epochs, batches = super()._init_training_state(*args, **kwargs)
        self.state.train_batch_size = self._train_batch_size  # `Trainer` goes on with the checkpoint's
        self.guard.resume(self.state.log_history)
        try_configs(self.model)
        if said := coarse_weights(self.model):
            report_line(self.args, said)
        if self.epochs is not None and self.epochs.moved:
            epochs, batches = self.epochs.begin.epoch, self.epochs.skipped
        return epochs, 0 if self.order == "numbered" else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Train for an epoch, which has fewer batches where training goes on in the middle of it."""
        if self.epochs is not None:
            kwargs |= self.epochs.of(kwargs["epoch"], kwargs["train_dataloader"])
        return super()._run_epoch(*args, **kwargs)

    # ---- a step: its batches, its losses, its gradients

    _summed_loss = cached_property(summed_loss)
    _throughput = cached_property(throughput)

    @cached_property
    def _weights(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Any]:
        """Fetch a step's micro-batches; time this, and add their tokens to the count and to the hash.

        Raises:
            UserError: Numbered data end before `max_steps`; samples have no labels, or labels that are neither the
                tokens at the positions nor those after them.
        """
        try:
            with self._throughput.waiting():
                batches, items = super().get_batch_samples(*args, **kwargs)
        except IndexError as error:
            if self.order != "numbered":
                raise
            needed = self.first_sample(self.args.max_steps)
            raise UserError(
                f"train_dataset ends before max_steps={self.args.max_steps}, which reads samples 0 to {needed - 1} "
                f"({error}). Lower max_steps, or give the dataset a length (__len__): it is then read in epochs"
            ) from error
        self.guard.begin()
        self.fetched = self.state.global_step
        self._fetched_hash.zero_()
        ids = [i for i in (batch.get("input_ids") for batch in batches) if i is not None and not i.is_floating_point()]
        self._throughput.count(sum(i.numel() for i in ids) * self.args.world_size)
        if len({i.shape[1:] for i in ids}) == 1:
            ids = [torch.cat(ids)]  # hashed at once
        for rows in ids:
            self._fetched_hash += hash_batch(rows.to(self.batches_hash.device), self.fetched)
        self.batches_hash += self._fetched_hash
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """Return what a causal LM's losses are divided by: `count_items`."""
        if not self.causal:
            return super()._get_num_items_in_batch(batch_samples, device)
        return self.count_items(batch_samples) if batch_samples else None

    def count_items(self, batches: list[dict[str, Tensor]]) -> Any:
        """Return what a step's summed loss is divided by: its scored tokens, over all ranks, by the number of ranks.

        Where every label counts, they are known from the shapes: no label is read and no rank is asked.
        """
        if not self._evaluating and getattr(self.train_dataset, "every_label_counts", False):
            return sum(batch["labels"].numel() for batch in batches)
        if self.compute_loss_func is not None and not all("labels" in batch for batch in batches):
            return None  # that function may need no labels
        items = torch.stack([(self.targets(batch) != IGNORE).sum() for batch in batches]).sum()
        if self._ranks > 1:
            items = self.accelerator.reduce(items.to(self.args.device, torch.float64), "mean")
        return items.clamp(min=1)  # where nothing is scored, the sum is 0

    @property
    def _ranks(self) -> int:
        return self.args.world_size if self.args.average_tokens_across_devices else 1

    def targets(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the token that is to follow each position of a batch, (B, T); `IGNORE` where none is scored.

        Raises:
            UserError: There are no labels, or they do not show whether they are shifted.
        """
        if not {"labels", "shift_labels"} & set(inputs):
            raise UserError(
                f"a batch has no labels, only {', '.join(inputs)}: give samples with labels, or a collator that makes "
                "them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        shifted = False if self._windows else self.args.labels_shifted
        if shifted is None and "shift_labels" not in inputs:
            # Evaluated data may have other labels than the training set: each of their batches is checked.
            shown = labels_are_shifted(inputs) if self._evaluating or self._shifted is None else None
            shifted = self._shifted if shown is None else shown
            if not self._evaluating:
                self._shifted = shifted
            if shifted is None:
                raise UserError(
                    "labels: those of the first batch are not clearly the tokens at the positions (as Trainer has "
                    "them) nor those after them. Set labels_shifted in ContinualArguments: False for at, True for after"
                )
        return targets_of(inputs, bool(shifted))

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward; return its loss, (), detached, which the guard keeps too."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.note(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return Σ nll divided by the tokens of the accumulated batch; these add up, over ranks too, to the exact mean.

        Models of transformers divide by counts of their own (GPT-2's includes a token it never predicts). A model that
        is no causal LM has its own loss.
        """
        if not self.causal:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        read = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        smoothing, loss_func, items = self.args.label_smoothing_factor, self.compute_loss_func, num_items_in_batch
        needs_logits = return_outputs or smoothing or loss_func is not None
        outputs = model(**read, use_cache=False) if needs_logits else None  # under autocast, whatever `bf16_params`
        if loss_func is not None:
            total = None if items is None else items * self._ranks
            loss = loss_func(outputs, inputs.get("labels"), num_items_in_batch=total)
            if not isinstance(loss, Tensor):
                raise UserError(
                    f"compute_loss_func returned {loss!r:.80}; it must return the loss, a tensor of one number"
                )
            loss = loss if items is None else loss * self._ranks
        else:
            targets = self.targets(inputs)
            if outputs is None:
                nll = self._summed_loss(model, targets, **read)
            elif smoothing:
                nll = smoothed_nll(outputs.logits, targets, smoothing)
            else:
                nll = token_nll(outputs.logits, targets).sum()
            if outputs is not None:
                nll = with_router_loss(nll, router_loss(self._summed_loss.model, outputs), targets)
            loss = nll / ((targets != IGNORE).sum().clamp(min=1) if items is None else items)
        loss = propagate_nonfinite(loss)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Return 6 operations a token and weight, as `Trainer` does; it counts the weights at every micro-batch."""
        if not self.causal:
            return int(super().floating_point_ops(inputs))
        return 6 * inputs["input_ids"].numel() * self._weights

    def _clip_grad_norm(self, model: Any) -> Any:
        """Add the penalties' gradients, then clip."""
        add_penalties(self)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of a step's gradients; None where it is not finite, and the step is skipped."""
        if grad_norm is None:  # nothing was clipped
            add_penalties(self)
        norm = super()._get_grad_norm(model, grad_norm)
        return norm if self.guard.passes(model, norm) else None

    # ---- after a step: logs and evaluations

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Raise the faults of the last step and the last save first; start measuring speed again after a log."""
        control = self.control
        if (control.should_log or control.should_evaluate or control.should_save) and not self.guard.settle():
            grad_norm = None  # the step was skipped
        if self.args.world_size == 1:  # several ranks have to hear of a fault at the same step: at the next save
            self.saver.writer.check()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._throughput.stop()  # the time of evaluating and saving does not count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with `ContinualArguments` the speed too; the epoch of numbered data is the share of the phase done.

        Raises:
            FloatingPointError: A mean of finite losses is not finite itself.
        """
        if "loss" in logs and self.is_in_train and not plain(self.args):
            logs |= self._throughput.read()
        if self.guard.skipped:
            logs[SKIPPED] = self.guard.skipped
        if self.order == "numbered" and self.state.max_steps > 0:  # `Trainer` counts it from the resumption
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):  # a mean of losses that were
            step = self.state.global_step
            raise FloatingPointError(f"the training loss is {logs['loss']} at step {step}: training stops here")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure and log perplexity on every evaluation set and the loss on the `eval_dataset`.

        While training, ask for a save where it is the best so far.

        Args:
            eval_dataset: What is measured instead: a dataset, an `EvaluationSet`, or some of either by name.
            ignore_keys: As in `Trainer`.
            metric_key_prefix: First word of each metric.

        Returns:
            The metrics: those of `validate`, and those of `Trainer`.

        Raises:
            UserError: There is nothing to measure.
        """
        regular = eval_dataset is None
        if isinstance(eval_dataset, str) and eval_dataset in self.evaluation_sets:
            eval_dataset = {eval_dataset: self.evaluation_sets[eval_dataset]}
        sets, datasets = (self.evaluation_sets, self.eval_dataset) if regular else split_sets(eval_dataset)
        if not sets and datasets is None:
            raise UserError(
                "evaluate: there is nothing to measure; give evaluation_sets or an eval_dataset, here or when the "
                "trainer is made"
            )
        metrics: dict[str, float] = {}
        if sets:
            if callable(getattr(self.optimizer, "eval", None)):
                self.optimizer.eval()  # a schedule-free one trains other weights; the next step puts them back
            metrics = validate(self.model, sets, self.args, metric_key_prefix)
            state, best = self.state, self.state.best_metric
            nll = metrics.get(f"{metric_key_prefix}_nll", math.inf) if self.args.keep_best and regular else math.inf
            if state.global_step > 0 and nll < (math.inf if best is None else best):
                state.best_metric, state.best_global_step = nll, state.global_step
                self.control.should_save = True
            self.log(dict(metrics))
            if regular and self.is_in_train and self.averaging.on and state.global_step > 0:
                with self.averaging.applied():
                    averaged = validate(self.model, sets, self.args, "ema")
                self.log(averaged)
            self.control = self.callback_handler.on_evaluate(self.args, state, self.control, metrics)
        for name, text in sets.items() if self.compute_metrics is not None else ():
            context = choose_context(self.model.config, self.args.eval_context)
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics |= super().evaluate(Windows(text, context), ignore_keys, prefix)
        if datasets is not None:
            metrics |= super().evaluate(None if regular else datasets, ignore_keys, metric_key_prefix)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `Trainer`'s loop; whether labels are shifted is asked of these data, not of the training set."""
        self._evaluating, self._windows = True, isinstance(getattr(dataloader, "dataset", None), Windows)
        try:
            with self._losses_shown():
                return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._evaluating = self._windows = False

    @contextmanager
    def _losses_shown(self) -> Iterator[None]:
        """Hide no loss that is not finite; `Trainer` would replace it, and wait for the device at each loss."""
        filtered, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = filtered

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder that a checkpoint is written below, before it is renamed."""
        return str(self.saver.staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint that is listed, flushed and renamed once, by all ranks or by none."""
        with self._throughput.left_out():
            self.saver.save(partial(super()._save_checkpoint, model, trial))

    def _load_best_model(self) -> None:
        """Wait until the best checkpoint is written, and load it, from shards too."""
        self.settle()
        best = Path(self.state.best_model_checkpoint)
        if not self._restored(self.model, best):
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save an ordinary folder, of shards too; during a save, leave it to a thread or to each rank's own shards."""
        if self.saver.puts_off and output_dir is not None and _internal_call:
            self.saver.save_model_later(Path(output_dir))
        elif self.is_fsdp_enabled:  # `Trainer` would keep pickles beside it
            self._save(output_dir or self.args.output_dir, state_dict=whole_weights(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both; large tensors are left to a thread or to each rank's own shards."""
        if self.is_fsdp_enabled or self.saver.puts_off:
            self.saver.save_optimizer_and_scheduler(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, in shards, from shards, or under other names than the model's too."""
        if not self._restored(model or self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _restored(self, model: Any, folder: Path) -> bool:
        """Give a model the weights of a checkpoint, unless `Trainer` is to; return whether that is done."""
        if self.is_fsdp_enabled or in_shards(folder):
            load_weights(model, folder)
            return True
        return restore_weights(model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, each rank its own rows of what is sharded.

        transformers below 5.18 cannot load replicas' states on CPUs: torch knows no device "cpu:0".
        """
        if checkpoint is not None:
            load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators, and the losses that were summed but not logged."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.saver.restore_unlogged()

    def settle(self, *, report: bool = False) -> None:
        """Wait until the last checkpoint is written.

        Args:
            report: Write a failure to stderr instead of raising it, because something else is about to be raised.

        Raises:
            UserError: It could not be written, for a reason that the user can remove.
            RuntimeError: It could not be written, for another reason.
        """
        try:
            self.saver.writer.wait()
        except Exception as error:
            if not report:
                raise
            report_line(self.args, str(error))

    @property
    def waiting(self) -> bool:
        """Whether a step is in progress: its batches are fetched, and a save now does not count them."""
        return bool(self.fetched == self.state.global_step)

    def hash_of_steps(self) -> Tensor:
        """Return the hash, (), of the batches of this rank's completed steps."""
        return self.batches_hash - self._fetched_hash if self.waiting else self.batches_hash.clone()

    def hash_of_batches(self) -> str:
        """Return the hash of all ranks' batches so far, 16 hexadecimal digits; collective."""
        return f"{self.saver.hash_over_ranks() & (2**64 - 1):016x}"


def refuse_parameters(model: Any, sets: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse parameters that `Trainer` lacks, other evaluation sets, no model or two, and adapters that add tokens."""
    if wrong := [name for name, text in sets.items() if not isinstance(text, EvaluationSet)]:
        raise UserError(f"evaluation_sets: {wrong} are no EvaluationSets; give datasets as eval_dataset=…")
    if unknown := [name for name in kwargs if name not in PARAMETERS]:
        near = did_you_mean(unknown[0], [*PARAMETERS, "evaluation_sets"])
        raise UserError(f"ContinualTrainer has no parameter '{unknown[0]}'; a tokenizer is processing_class.{near}")
    if (model is None) == (kwargs.get("model_init") is None):
        raise UserError("ContinualTrainer takes a model or a model_init, one of them")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(
            f"{type(model).__name__}: an adapter that puts tokens of its own before the text is refused, because "
            "its logits are longer than the labels. Take one that changes weights, such as LoraConfig"
        )


def coarse_weights(model: Any) -> str | None:
    """Return a warning of trained weights in 16 bits, which is what transformers 5 loads most checkpoints as."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
    coarse = [(name, p) for name, p in trained if p.element_size() < 4]
    if not coarse:
        return None
    share = sum(p.numel() for _, p in coarse) / sum(p.numel() for _, p in trained)
    name, first = coarse[0]
    kind = str(first.dtype).removeprefix("torch.")
    return (
        f"{share:.0%} of the trained weights are in {kind} ('{name}' is the first): a step is lost wherever it is "
        f"smaller than about a {2 / torch.finfo(first.dtype).eps:.0f}th of the weight. Load them with "
        "dtype=torch.float32; bf16=True computes in bf16 all the same"
    )


def is_causal(model: Any) -> bool:
    """Return whether a model, without adapters and wrappers, is a causal LM of transformers."""
    inner = unwrap(model.get_base_model() if hasattr(model, "get_base_model") else model)
    names = {kind.__name__ for kind in type(inner).__mro__}
    return (
        bool(names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
        or getattr(inner, "loss_type", "") == "ForCausalLM"
    )


def split_sets(eval_dataset: Any) -> tuple[dict[str, EvaluationSet], Any]:
    """Return the evaluation sets in an `eval_dataset`, by name, and the other datasets, None for none.

    Args:
        eval_dataset: A dataset, an `EvaluationSet` (its name is then ""), or a dict of either.
    """
    if isinstance(eval_dataset, EvaluationSet):
        return {"": eval_dataset}, None
    if not isinstance(eval_dataset, dict):
        return {}, eval_dataset
    sets = {name: text for name, text in eval_dataset.items() if isinstance(text, EvaluationSet)}
    return sets, {name: data for name, data in eval_dataset.items() if name not in sets} or None
