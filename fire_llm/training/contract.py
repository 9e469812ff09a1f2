"""What `ContinualTrainer` does with each option of `TrainingArguments`, and each parameter and method of `Trainer`.

docs/trainer.md is written from these tables (`make schema`). A trainer refuses options when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.training.batches import Order

MEASURED = ("nll", "perplexity", "bits_per_byte", "tokens", "bytes")
"""What is measured of each evaluation set."""

LESS_IS_BETTER = MEASURED[:3]
"""Ends of the names of metrics of which a smaller value is better."""


@dataclass(frozen=True)
class Given:
    """What a trainer is made with, as far as refusals depend on it."""

    args: Any
    order: Order | None
    causal: bool
    """Whether the trainer computes the loss, and not the model."""
    sets: Mapping[str, Any]
    """Evaluation sets."""
    eval_dataset: Any = None
    optimizers: tuple[Any, Any] = (None, None)
    optimizer_cls_and_kwargs: Any = None

    @property
    def numbered(self) -> bool:
        """Whether the data have no length, and so no epochs."""
        return self.order == "numbered"


@dataclass(frozen=True)
class Rule:
    """One row of a table; without a text it is as in `Trainer`."""

    text: str = ""
    """How it differs, or why it is refused."""
    refused: Callable[[Any, Given], bool] | None = None
    """Whether a value is refused; None: only where `always` is set."""
    always: bool = False
    """Whether any use of it is refused."""
    instead: str = ""
    """The message of a refusal, where it is not the text."""

    @property
    def status(self) -> str:
        """Return `same`, `different` or `refused`."""
        return "refused" if self.always else "different" if self.text else "same"


SAME = Rule()


def _epochs(value: Any, given: Given) -> bool:
    return value == "epoch" and given.numbered


def _split(value: Any, given: Given) -> bool:
    return given.numbered and bool(getattr(value, "split_batches", False) or getattr(value, "dispatch_batches", None))


def _in_backward(value: Any, _: Given) -> bool:
    return any(part in str(getattr(value, "value", value)) for part in ("lomo", "layerwise"))


def _sequences(value: Any, _: Given) -> bool:
    return any((getattr(value, f"{kind}_size", 1) or 1) > 1 for kind in ("cp", "sp"))


def _unknown_metric(value: Any, given: Given) -> bool:
    args = given.args
    if value is None or args.eval_strategy == "no" or given.eval_dataset is not None or not given.sets:
        return False
    return str(value).removeprefix("eval_") not in metric_names(given)


def metric_names(given: Given) -> list[str]:
    """Return the metrics of the evaluation sets, without their prefix."""
    names = [f"{name}_{key}" if name else key for name in given.sets for key in MEASURED]
    return ["nll", *names] if set(given.args.best_corpora or ()) & set(given.sets) else names


_EPOCHS = "`epoch` is refused for numbered data, which have none: use `steps`"
_STEPS = "numbered data (by index, without a length) have no epochs: use 'steps', or give the dataset a __len__"

OPTIONS: dict[str, Rule] = dict.fromkeys(
    [
        "output_dir", "per_device_train_batch_size", "num_train_epochs", "learning_rate", "lr_scheduler_kwargs",
        "warmup_steps", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
        "optim_target_modules", "gradient_accumulation_steps", "average_tokens_across_devices", "max_grad_norm",
        "label_smoothing_factor", "bf16", "fp16", "activation_checkpointing", "activation_checkpointing_kwargs",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile_backend",
        "torch_compile_mode", "liger_kernel_config", "use_cache", "neftune_noise_alpha",
        "torch_empty_cache_steps", "logging_steps", "logging_first_step",
        "log_on_each_node", "include_num_input_tokens_seen", "log_level", "log_level_replica",
        "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_steps",
        "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches",
        "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
        "save_steps", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_always_push",
        "hub_revision",
        "restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "use_cpu",
        "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order", "remove_unused_columns", "length_column_name", "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "debug",
        "skip_memory_metrics", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank",
    ],
    SAME,
) | {
    "max_steps": Rule(
        "numbered data need it: they have no length that epochs could be counted by",
        lambda value, given: value <= 0 and given.numbered,
        instead="the train_dataset has no length, so num_train_epochs says no end: give max_steps, or a __len__",
    ),
    "optim": Rule(
        "`lomo`, `adalomo` and the layer-wise ones are refused: they step inside the backward pass, before a loss that "
        "is not finite is seen, gradients are clipped or penalties are added",
        _in_backward,
        instead="it steps inside the backward pass, before a loss that is not finite is seen, gradients are clipped or "
        "penalties are added: take another optimizer",
    ),
    "auto_find_batch_size": Rule(
        "a step trains on the same samples: out of memory, micro-batches become half as large, or the next smaller "
        "part of a step, and are accumulated as many times more; training begins again as if it had begun with these; "
        "refused for several processes and FSDP",
        lambda value, given: bool(value) and (given.args.world_size > 1 or bool(given.args.fsdp)),
        instead="a rank that is out of memory leaves the others waiting for its gradients: set "
        "per_device_train_batch_size, and gradient_accumulation_steps for the rest of a step's sequences",
    ),
    "greater_is_better": Rule(
        "False where it is not given and the metric ends in `nll`, `perplexity` or `bits_per_byte`; True is refused "
        "for those",
        lambda value, given: bool(value) and str(given.args.metric_for_best_model or "").endswith(LESS_IS_BETTER),
    ),
    "lr_scheduler_type": Rule("`schedule`, where it is given, takes its place"),
    "weight_decay": Rule("every tensor of two dimensions and more decays, and no other"),
    "bf16_full_eval": Rule(
        "the model would stay in 16 bits: evaluation sets are measured in fp32, or as in training with "
        "`eval_precision='training'`, and an `eval_dataset` as in training",
        always=True,
    ),
    "fp16_full_eval": Rule("as `bf16_full_eval`", always=True),
    "tf32": Rule("None leaves TF32 as it was, with `torch_compile` too"),
    "torch_compile": Rule("the trunk and the softmax are compiled, not the whole model"),
    "use_liger_kernel": Rule(
        "its fused loss would not be used: the loss is taken in slices, which hold no logits either", always=True
    ),
    "logging_strategy": Rule(
        "with `ContinualArguments`, a loss is also logged wherever something is saved or measured, unless this is "
        f"`no`; {_EPOCHS}",
        _epochs,
        instead=_STEPS,
    ),
    "logging_nan_inf_filter": Rule("no loss is hidden: `nonfinite` says what becomes of one that is not finite"),
    "report_to": Rule(
        "what a tracker raises ends its reports, in one line on stderr, and not the training; it draws no random "
        "numbers of the training's; what a `ResetCallback` did is shown in numbers"
    ),
    "disable_tqdm": Rule(
        "with `ContinualArguments`, one bar a phase, or lines where there is no terminal; with True nothing is printed"
    ),
    "eval_strategy": Rule(
        "evaluation sets are measured beside an `eval_dataset`, at the last step too; one of them has to be given; "
        + _EPOCHS,
        lambda value, given: (
            _epochs(value, given) or (value != "no" and not given.sets and given.eval_dataset is None)
        ),
        instead=f"there is nothing to measure, or nothing to count: give evaluation_sets or an eval_dataset; {_STEPS}",
    ),
    "eval_on_start": Rule("not again where training goes on from a checkpoint"),
    "save_only_model": Rule("such a checkpoint is refused by `resume_from_checkpoint`: the moments are not in it"),
    "save_strategy": Rule(
        "a checkpoint appears whole or not at all, with a manifest of its files; with `ContinualArguments` it holds no "
        f"pickled `training_args.bin`; {_EPOCHS}",
        _epochs,
        instead=_STEPS,
    ),
    "save_on_each_node": Rule("checkpoints are written once, by the first process", always=True),
    "save_total_limit": Rule("None: `keep_last` checkpoints stay, 1 by default; `keep_steps` stay in any case"),
    "enable_jit_checkpoint": Rule(
        "the checkpoint is whole or not there; a step in whose middle it is saved is taken again, with other dropout; "
        "refused for several processes: `fire-llm run` handles signals by itself, on all of them",
        lambda value, given: bool(value) and given.args.world_size > 1,
        instead="a signal reaches several processes at different steps, and each would wait for the others: train by "
        "`fire-llm run`, where they agree on the step, or save every save_steps",
    ),
    "hub_strategy": Rule(
        "`checkpoint` and `all_checkpoints` are refused: they would upload from a folder that is about to be renamed",
        lambda value, given: bool(given.args.push_to_hub) and value in ("checkpoint", "all_checkpoints"),
    ),
    "load_best_model_at_end": Rule(
        "without evaluations (`eval_strategy`) nothing says which is the best: refused",
        lambda value, given: bool(value) and given.args.eval_strategy == "no",
    ),
    "metric_for_best_model": Rule(
        "a metric of the evaluation sets (`eval_<name>_nll`, …), of `best_corpora` (`eval_nll`) or of the "
        "`eval_dataset`; not beside `keep_best`, which decides by itself",
        lambda value, given: (value is not None and given.args.keep_best) or _unknown_metric(value, given),
    ),
    "ignore_data_skip": Rule(
        "refused for numbered data, which go on from their number: there is nothing to skip",
        lambda value, given: bool(value) and given.numbered,
    ),
    "accelerator_config": Rule(
        "`split_batches` and `dispatch_batches` are refused for numbered data, which ranks share out by number", _split
    ),
    "parallelism_config": Rule("context and sequence parallelism are refused: the loss needs whole rows", _sequences),
    "label_names": Rule(
        "other names than `labels` are refused for a causal LM",
        lambda value, given: given.causal and value not in (None, ["labels"]),
    ),
    "train_sampling_strategy": Rule(
        "refused for numbered data, which are read in order, and for an IterableDataset, which has an order of its own",
        lambda value, given: value != "random" and given.order in ("numbered", "stream"),
    ),
    "fsdp": Rule("version 2 alone: FSDP1 flattens parameters"),
    "fsdp_config": Rule("as `fsdp`"),
    "deepspeed": Rule("it keeps master copies of the weights, from which it would undo a reset", always=True),
}  # fmt: skip
"""Fields of `TrainingArguments`."""

OWN_OPTIONS: dict[str, Rule] = {
    "keep_best": Rule(
        "it needs `best_corpora` that are among the evaluation sets",
        lambda value, given: bool(value) and not set(given.args.best_corpora or ()) & set(given.sets),
    ),
    "muon": Rule(
        "it makes the optimizer itself: leave out `optimizers` and `optimizer_cls_and_kwargs`",
        lambda value, given: (
            bool(value) and (given.optimizers[0] is not None or given.optimizer_cls_and_kwargs is not None)
        ),
    ),
    "schedule": Rule(
        "it makes the schedule itself: leave out the one in `optimizers`",
        lambda value, given: value is not None and given.optimizers[1] is not None,
    ),
}
"""Fields of `ContinualArguments` that do not go with everything."""

PARAMETERS: dict[str, Rule] = {
    "model": Rule(
        "a causal LM's loss is taken here; another model's by the model, as in `Trainer`; adapters of PEFT too, but "
        "prompt learning is refused: its logits are longer than the labels"
    ),
    "args": Rule("plain `TrainingArguments` too: the options of `ContinualArguments` then have their defaults"),
    "data_collator": Rule("by name alone; without one, data whose samples are full, or cannot be padded, are stacked"),
    "train_dataset": Rule("the third by position; also numbered data: samples by index, without a length"),
    "eval_dataset": Rule("by name alone; may also be, or hold, `EvaluationSet`s"),
    "processing_class": SAME,
    "model_init": SAME,
    "compute_loss_func": SAME,
    "compute_metrics": Rule("also for each evaluation set, over its windows, with the ids as labels"),
    "callbacks": Rule("any iterable; with `ContinualArguments`, `Trainer`'s own bar and printer are left out"),
    "optimizers": SAME,
    "optimizer_cls_and_kwargs": SAME,
    "preprocess_logits_for_metrics": SAME,
}
"""Parameters of `Trainer`. `evaluation_sets` is one more, the fourth by position, before `callbacks`."""

METHODS: dict[str, Rule] = dict.fromkeys(
    [
        "add_callback", "autocast_smart_context_manager", "call_model_init", "compute_loss_context_manager",
        "create_model_card", "create_optimizer_and_scheduler", "end", "get_cp_size",
        "get_eval_dataloader", "get_learning_rates", "get_num_trainable_parameters",
        "get_optimizer_cls_and_kwargs", "get_optimizer_group", "get_sp_size", "get_test_dataloader",
        "get_total_train_batch_size", "get_tp_size", "init_hf_repo", "is_local_process_zero",
        "is_world_process_zero", "log_metrics", "loss_is_scaled_for_ga", "metrics_format", "num_examples",
        "pop_callback", "predict", "prediction_step", "push_to_hub", "remove_callback", "save_metrics",
        "save_state", "store_flos",
    ],
    SAME,
) | {
    "compute_loss": Rule(
        "of a causal LM: the sum over scored tokens by the tokens of the whole accumulated batch; the loss of "
        "routers is in it, where the config has `output_router_logits`; no other that a model adds by itself"
    ),
    "create_accelerator_and_postprocess": Rule(
        "FSDP2 and fp16 on CPUs too; FSDP1, DeepSpeed and Megatron-LM are refused"
    ),
    "create_optimizer": Rule("Muon too"),
    "create_scheduler": Rule("`schedule` too"),
    "evaluate": Rule(
        "measures the evaluation sets and the `eval_dataset`, or what it is given: a dataset, an `EvaluationSet`, or "
        "either by name"
    ),
    "evaluation_loop": Rule("labels are taken as the evaluated data have them"),
    "floating_point_ops": Rule("parameters are counted once a training"),
    "get_batch_samples": Rule("hashes the batches' tokens"),
    "get_decay_parameter_names": Rule("tensors of two dimensions and more"),
    "get_train_dataloader": Rule("numbered data are read in order, from where a checkpoint stopped"),
    "hyperparameter_search": Rule("use `fire-llm sweep`, or make a trainer for each trial", always=True),
    "log": Rule(
        "with `ContinualArguments`, the speed stands beside each training loss; the epoch of numbered data is the "
        "share of `max_steps`"
    ),
    "set_initial_training_values": Rule("epochs and steps are counted from where a checkpoint stopped in the data"),
    "save_model": Rule("the same folder for shards as for replicas"),
    "train": Rule(
        "`resume_from_checkpoint` takes a checkpoint of a `ContinualTrainer`, which is verified; True: the newest in "
        "`output_dir` that is whole; weights stored under other names, as experts are, are read, and those of another "
        "model refused; data with a length go on at the next sample, with another batch size too; `trial` is refused"
    ),
    "training_step": Rule("a loss that is not finite is noted"),
}  # fmt: skip
"""Public methods of `Trainer`."""


def refuse_options(given: Given) -> None:
    """Refuse options that would have no effect, all in one message."""
    faults = []
    for name, rule in (OPTIONS | OWN_OPTIONS).items():
        value = getattr(given.args, name, None)
        if rule.refused(value, given) if rule.refused is not None else rule.always and value:
            shown = repr(getattr(value, "value", value))  # of an enum, its value
            faults.append(f"{name}={shown}: {rule.instead or rule.text.replace('`', '')}")
            if name == "metric_for_best_model" and not given.args.keep_best:
                names = metric_names(given)
                faults[-1] += f". Measured are {', '.join(names)}.{did_you_mean(str(value), names)}"
    if faults:
        raise UserError("ContinualTrainer refuses " + "; and ".join(faults))
