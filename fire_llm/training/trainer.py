"""Train one phase: transformers' `Trainer`, with what has to be exact overridden.

The class says when something happens, in the order in which a phase is trained; the files beside it say how.
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
from fire_llm.core.manifest import in_shards
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
from fire_llm.training.saving import Saver, checkpoint_to_resume, try_configs
from fire_llm.training.sharding import (
    load_optimizer,
    load_weights,
    refuse_engines,
    sharding,
    stored_otherwise,
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

    Overridden, beside `__init__`, `train` and `hyperparameter_search`; † is in transformers from 5.3 on, the others
    are older, and `core/compat.py` checks that the installed `Trainer` calls each of them:

        _inner_training_loop                out of memory, it begins again with smaller micro-batches
        create_accelerator_and_postprocess  FSDP2 and fp16 on CPUs too; engines that no reset reaches are refused
        _get_train_sampler                  numbered data come in order, at any world size, resumed or not
        get_train_dataloader                the loader draws from a generator of its own: dropout is as it would be
        set_initial_training_values         steps and epochs that are left, where earlier steps had another size
        create_optimizer                    Muon for matrices
        create_scheduler                    infinite and WSD schedules
        get_decay_parameter_names           tensors of two dimensions and more decay, as in the paper
        _init_training_state †              steps left out are counted on; numbered data need no skipping; what a save
                                            writes beside the weights is tried
        _run_epoch                          an epoch that is gone on with at any sample has fewer batches
        get_batch_samples                   the batches' hash, their tokens, and the wait for data
        _get_num_items_in_batch             labels that are scored, over all ranks; known where every label counts
        training_step                       the guard against what is not finite keeps each micro-batch's loss
        compute_loss                        the exact mean over the accumulated batch, without holding its logits
        floating_point_ops                  `Trainer` counts the parameters again at every micro-batch
        _clip_grad_norm †                   penalties are added before gradients are clipped
        _get_grad_norm †                    what is not finite does not reach the weights
        _maybe_log_save_evaluate            faults of the last step and the last save are raised before the next
        log                                 speed beside losses, and the share of the phase that is done
        evaluation_loop                     labels may be of another kind than the training set's
        evaluate                            exact perplexity a corpus too; the best checkpoint is saved
        _get_output_dir                     a checkpoint is written under another name
        _save_checkpoint                    it is listed, flushed and renamed once, by all ranks or by none
        _load_best_model                    it waits until that is written; shards are loaded from that format
        save_model                          what a thread writes later, or each rank of shards, is left to them
        _save_optimizer_and_scheduler       the same
        _load_from_checkpoint               the same
        _load_optimizer_and_scheduler       the same
        _load_rng_state                     losses that were summed but not logged are restored too
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
        if wrong := [name for name, text in self.evaluation_sets.items() if not isinstance(text, EvaluationSet)]:
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
        known = {name: kwargs[name] for name in ("optimizers", "optimizer_cls_and_kwargs") if name in kwargs}
        causal = model is None or is_causal(model)
        refuse_options(Given(args, self.order, causal, self.evaluation_sets, eval_dataset, **known))
        self.saver = Saver(self)
        self.guard = FiniteGuard(self)
        self.averaging = Averaging(self)
        self._resumed_step = self._resumed_samples = 0
        self.epochs: Epochs | None = None
        """Where data with a length stand, while they are trained on."""
        self._shifted: bool | None = None
        """What the first training batch showed of its labels, where `args.labels_shifted` is None."""
        self._evaluating = self._windows = False
        if self.order == "numbered" or not _pads(kwargs.get("processing_class")):
            # Samples are full: nothing is padded, and tokenizers such as GPT-2's have no token to pad with.
            kwargs["data_collator"] = kwargs.get("data_collator") or default_data_collator
        # `Trainer` insists on a dataset wherever an evaluation strategy is set; ours may be in `evaluation_sets`.
        asked = self.evaluation_sets if eval_dataset is None and self.evaluation_sets else eval_dataset
        given = None if callbacks is None else [*callbacks]
        try:
            super().__init__(model, args, train_dataset=train_dataset, eval_dataset=asked, callbacks=given, **kwargs)
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
        """Hash of every token id trained on, the step it was seen at included; order within a step does not count."""
        self.fetched = -1
        """The step, counted from zero, whose batches were fetched last; it is still to be taken at that global step."""
        self._fetched_hash = torch.zeros_like(self.batches_hash)
        self._progress, self.stopping = Progress(), Stopping()
        if not plain(args):
            self.callback_handler.callbacks.pop()  # `Trainer`'s own bar or printer, which it adds last
        self.trackers = guard_trackers(self)
        """Of `args.report_to`, and of `callbacks`."""
        # What signals and clocks ask for is behind what asks for a log where something is saved: such a save has none.
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
        start, args.eval_on_start = args.eval_on_start, args.eval_on_start and checkpoint is None
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if args.auto_find_batch_size:
            self.shrink(self.saver.micro_batch(checkpoint) or self._train_batch_size)
        self._begin(checkpoint)
        callbacks = self.callback_handler.callbacks
        # Behind what changes weights at a step's end, whenever that was added: their average, then a save by a signal.
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
            args.eval_on_start = start
            args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, accumulation
            set_step_near(False)
            self._progress.close()

    def _begin(self, checkpoint: str | None) -> None:
        for name in ("_summed_loss", "_throughput", "_weights"):
            self.__dict__.pop(name, None)  # of a model that `model_init` has replaced, or of other settings
        self.batches_hash.zero_()
        self._shifted, self.fetched = None, -1
        self._resumed_step = self.saver.begin(checkpoint)
        self._resumed_samples = self.saver.resumed_samples()

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        """Train, again from the beginning where memory runs out and `auto_find_batch_size` asks for it."""
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
                said = first_line(error)
            # Out of the handler, whose traceback holds the batch's tensors.
            start.check(said)
            self.settle(report=True)
            self.saver.forget()
            self._progress.close()
            self.shrink(args.train_batch_size // 2)
            start.put_back()
            self._begin(resume_from_checkpoint)

    def shrink(self, most: int) -> None:
        """Make micro-batches of at most so many samples, and accumulate as many more of them."""
        micro = self.args.per_device_train_batch_size
        self.args.per_device_train_batch_size = part = largest_part(micro, most)
        self.args.gradient_accumulation_steps *= micro // part

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Refuse: a checkpoint is written in one folder, and a search wants one for each trial."""
        raise UserError(f"hyperparameter_search is refused: {METHODS['hyperparameter_search'].text.replace('`', '')}")

    # ---- before the first step

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, FSDP2's shards and fp16 on CPUs included, and refuse what cannot be reset."""
        refuse_engines(self.args)
        # accelerate, too, turns TF32 on where it compiles in fp32.
        with sharding(self), settings_kept() if self.args.tf32 is None else nullcontext():
            super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu":
            # accelerate leaves fp16 out on CPUs, without a word, and would train in fp32.
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
        if self.order != "numbered":
            return super()._get_train_sampler(train_dataset)
        steps = self.args.max_steps
        return FromStep(self._resumed_samples, self.first_sample(steps), steps * self.samples_a_step)

    def get_train_dataloader(self) -> Any:
        """Return the loader; that of numbered data with a generator of its own.

        A seed from torch's would move dropout on resumption.
        """
        loader = super().get_train_dataloader()
        if self.order == "numbered":
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        self.epochs = self.saver.epochs(loader) if self.order == "sized" else None
        return loader

    def set_initial_training_values(self, args: Any, *given: Any, **kwargs: Any) -> Any:
        """Return what `Trainer` counts, epochs and steps from where the data stand."""
        epochs, *others, steps = super().set_initial_training_values(args, *given, **kwargs)
        if self.epochs is not None and self.epochs.moved and not args.ignore_data_skip:
            epochs, steps = self.epochs.until(args.max_steps, args.num_train_epochs)
        return (epochs, *others, steps)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, Muon where it is asked for.

        Raises:
            UserError: transformers cannot make it, for want of a library, say; or Muon has nothing to train.
        """
        if self.is_fsdp_enabled and self.causal and not fsdp_modules(self.model):
            self._summed_loss.look()  # while the model is whole
        if self.args.muon and self.optimizer is None:
            self.optimizer = muon_adamw(model or self.model, self.args)
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError) as error:
            name = OptimizerNames(self.args.optim).value
            raise UserError(f"the optimizer '{name}' cannot be made: {error}") from error

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, ours where one is given."""
        if self.args.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = scheduled(optimizer or self.optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the names of tensors of two dimensions and more, which decay, as in the paper."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
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
        """Fetch a step's micro-batches, with an eye on the clock, and count their tokens into the hash.

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
        together = [torch.cat(ids)] if len({i.shape[1:] for i in ids}) == 1 else ids
        for rows in together:
            self._fetched_hash += hash_batch(rows.to(self.batches_hash.device), self.fetched)
        self.batches_hash += self._fetched_hash
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        if not self.causal:
            return super()._get_num_items_in_batch(batch_samples, device)
        return self.count_items(batch_samples) if batch_samples else None

    def count_items(self, batches: list[dict[str, Tensor]]) -> Any:
        """Return what the sum of a step's losses is divided by: its scored tokens, as many as a rank has on average.

        Where every label counts, these are the labels there are: nothing is read and no rank is asked.
        """
        if not self._evaluating and getattr(self.train_dataset, "every_label_counts", False):
            return sum(batch["labels"].numel() for batch in batches)
        if self.compute_loss_func is not None and not all("labels" in batch for batch in batches):
            return None  # it may do without
        items = torch.stack([(self.targets(batch) != IGNORE).sum() for batch in batches]).sum()
        if self._ranks > 1:
            items = self.accelerator.reduce(items.to(self.args.device, torch.float64), "mean")
        return items.clamp(min=1)  # a batch in which nothing is scored teaches nothing

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
            # What is evaluated may be of another kind than the training set: each of its batches is checked.
            found = labels_are_shifted(inputs) if self._evaluating or self._shifted is None else None
            shifted = self._shifted if found is None else found
            if not self._evaluating:
                self._shifted = shifted
            if shifted is None:
                raise UserError(
                    "labels: those of the first batch are not clearly the tokens at the positions (as Trainer has "
                    "them) nor those after them. Set labels_shifted in ContinualArguments: False for at, True for after"
                )
        return targets_of(inputs, bool(shifted))

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward; return its loss, (), detached."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.note(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return Σ nll over the tokens of the accumulated batch: the exact mean once accumulated and averaged by ranks.

        Models of transformers divide by counts of their own (GPT-2's includes a token it never predicts). A model that
        is no causal LM has its own loss.
        """
        if not self.causal:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        read = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        smoothing, given, items = self.args.label_smoothing_factor, self.compute_loss_func, num_items_in_batch
        whole = return_outputs or smoothing or given is not None
        outputs = model(**read, use_cache=False) if whole else None  # under autocast, whatever `bf16_params`
        if given is not None:
            total = None if items is None else items * self._ranks
            loss = given(outputs, inputs.get("labels"), num_items_in_batch=total)
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
        """Return 6 operations a token and weight, as `Trainer` does."""
        if not self.causal:
            return int(super().floating_point_ops(inputs))
        return 6 * inputs["input_ids"].numel() * self._weights

    def _clip_grad_norm(self, model: Any) -> Any:
        add_penalties(self)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of a step's gradients; None where they are not finite and the step is left out."""
        if grad_norm is None:  # nothing was clipped
            add_penalties(self)
        norm = super()._get_grad_norm(model, grad_norm)
        return norm if self.guard.passes(model, norm) else None

    # ---- after a step: logs and evaluations

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if (control.should_log or control.should_evaluate or control.should_save) and not self.guard.settle():
            grad_norm = None  # of a step that was left out
        if self.args.world_size == 1:  # several ranks have to hear of a fault at the same step: at the next save
            self.saver.writer.check()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._throughput.stop()  # what was just evaluated and saved is no part of the next measurement

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
        own = eval_dataset is None
        if isinstance(eval_dataset, str) and eval_dataset in self.evaluation_sets:
            eval_dataset = {eval_dataset: self.evaluation_sets[eval_dataset]}
        sets, rest = (self.evaluation_sets, self.eval_dataset) if own else split_sets(eval_dataset)
        if not sets and rest is None:
            raise UserError(
                "evaluate: there is nothing to measure; give evaluation_sets or an eval_dataset, here or when the "
                "trainer is made"
            )
        metrics: dict[str, float] = {}
        if sets:
            metrics = validate(self.model, sets, self.args, metric_key_prefix)
            state, best = self.state, self.state.best_metric
            nll = metrics.get(f"{metric_key_prefix}_nll", math.inf) if self.args.keep_best and own else math.inf
            if state.global_step > 0 and nll < (math.inf if best is None else best):
                state.best_metric, state.best_global_step = nll, state.global_step
                self.control.should_save = True
            self.log(dict(metrics))
            if own and self.is_in_train and self.averaging.on and state.global_step > 0:
                with self.averaging.applied():
                    averaged = validate(self.model, sets, self.args, "ema")
                self.log(averaged)
            self.control = self.callback_handler.on_evaluate(self.args, state, self.control, metrics)
        for name, text in sets.items() if self.compute_metrics is not None else ():
            context = choose_context(self.model.config, self.args.eval_context)
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics |= super().evaluate(Windows(text, context), ignore_keys, prefix)
        if rest is not None:
            metrics |= super().evaluate(None if own else rest, ignore_keys, metric_key_prefix)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `Trainer`'s loop, labels as this data has them, whatever the training set has."""
        self._evaluating, self._windows = True, isinstance(getattr(dataloader, "dataset", None), Windows)
        try:
            with self._losses_shown():
                return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._evaluating = self._windows = False

    @contextmanager
    def _losses_shown(self) -> Iterator[None]:
        """Hide no loss that is not finite; `Trainer` would put others in its place, and ask the device for each."""
        asked, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = asked

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saver.staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._throughput.left_out():
            self.saver.save(partial(super()._save_checkpoint, model, trial))

    def _load_best_model(self) -> None:
        self.settle()
        best = Path(self.state.best_model_checkpoint)
        if self._loads_weights(self.model, best):
            load_weights(self.model, best)
        else:
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary folder, the same for replicas and shards."""
        if self.saver.puts_off and output_dir is not None and _internal_call:
            self.saver.save_model_later(Path(output_dir))
        elif self.is_fsdp_enabled:  # `Trainer` would keep pickles beside it
            self._save(output_dir or self.args.output_dir, state_dict=whole_weights(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.saver.puts_off:
            self.saver.save_optimizer_and_scheduler(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, model = Path(resume_from_checkpoint), model or self.model
        if self._loads_weights(model, folder):
            load_weights(model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _loads_weights(self, model: Any, folder: Path) -> bool:
        """Return whether a checkpoint's weights are in shards, for shards, or under other names than the model's.

        Raises:
            UserError: They are another model's. `Trainer` would warn, and train on with what the model had.
        """
        return self.is_fsdp_enabled or in_shards(folder) or stored_otherwise(model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # transformers below 5.18 cannot load replicas' states on CPUs: torch knows no place "cpu:0".
        if checkpoint is not None:
            load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.saver.restore_unlogged()

    def settle(self, *, report: bool = False) -> None:
        """Wait until the last checkpoint is written.

        Args:
            report: Write a failure to stderr instead of raising it, because something else is about to be raised.

        Raises:
            UserError: It could not be written, for a reason that the user can do something about.
            RuntimeError: It could not be written, for another.
        """
        try:
            self.saver.writer.wait()
        except Exception as error:
            if not report:
                raise
            report_line(self.args, str(error))

    @property
    def waiting(self) -> bool:
        """Whether a step's batches are fetched and it is not taken yet: a save in its middle leaves them out."""
        return bool(self.fetched == self.state.global_step)

    def hash_of_steps(self) -> Tensor:
        """Return the hash of the batches of this rank's steps so far, ()."""
        return self.batches_hash - self._fetched_hash if self.waiting else self.batches_hash.clone()

    def hash_of_batches(self) -> str:
        """Return the hash over all ranks of every batch so far, 16 hexadecimal digits; collective."""
        return f"{self.saver.hash_over_ranks() & (2**64 - 1):016x}"


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
    """Return whether a model is a causal LM of transformers, adapters and wrappers around it left aside."""
    inner = unwrap(model.get_base_model() if hasattr(model, "get_base_model") else model)
    names = {kind.__name__ for kind in type(inner).__mro__}
    return (
        bool(names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
        or getattr(inner, "loss_type", "") == "ForCausalLM"
    )


def split_sets(given: Any) -> tuple[dict[str, EvaluationSet], Any]:
    """Return the evaluation sets among what is given to evaluate, by name, and the rest, None for none.

    Args:
        given: As `eval_dataset`: a dataset, an `EvaluationSet` (its name is then ""), or a dict of either.
    """
    if isinstance(given, EvaluationSet):
        return {"": given}, None
    if not isinstance(given, dict):
        return {}, given
    sets = {name: text for name, text in given.items() if isinstance(text, EvaluationSet)}
    return sets, {name: data for name, data in given.items() if name not in sets} or None


def _pads(processing_class: Any) -> bool:
    """Return whether `Trainer`'s collator for a tokenizer can pad."""
    return not isinstance(processing_class, PreTrainedTokenizerBase) or processing_class.pad_token_id is not None
