"""What this package uses of libraries beyond their documented interface, and what differs between their versions.

`ContinualTrainer` overrides methods of `Trainer`, some of them private, and releases add and remove such methods. An
override that `Trainer` no longer calls has no effect, without a word. So the lists below are compared with the
installed `Trainer` before it is used (docs/dependencies.md says which versions pass).

What is here for an old version names it, so that it can go when pyproject.toml requires a newer one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any

from fire_llm.core.errors import UserError

TRAINER_HOOKS = (
    "_clip_grad_norm", "_get_grad_norm", "_get_num_items_in_batch", "_get_output_dir", "_get_train_sampler",
    "_init_training_state", "_inner_training_loop", "_load_best_model", "_load_from_checkpoint",
    "_load_optimizer_and_scheduler", "_load_rng_state", "_maybe_log_save_evaluate", "_run_epoch", "_save_checkpoint",
    "_save_optimizer_and_scheduler", "compute_loss", "create_accelerator_and_postprocess", "create_optimizer",
    "create_scheduler", "evaluate", "evaluation_loop", "floating_point_ops", "get_batch_samples",
    "get_decay_parameter_names", "get_train_dataloader", "log", "save_model", "set_initial_training_values",
    "training_step",
)  # fmt: skip
"""Methods of `Trainer` that `ContinualTrainer` overrides, and that `Trainer` itself must call."""

TRAINER_ATTRIBUTES = (
    "_created_lr_scheduler", "_globalstep_last_logged", "_n_gpu", "_prepare_inputs", "_save", "_tr_loss",
    "_train_batch_size",
)  # fmt: skip
"""Other private names of `Trainer` that are read, set or called."""

OTHER_LAYOUTS = {"aria_text": "5.18"}
"""Model types whose matrices are stored otherwise below a version of transformers; there they are refused."""


def checkpointing(wanted: bool) -> dict[str, Any]:
    """Return the `TrainingArguments` for checkpointed activations, under their name in the installed version."""
    from transformers import TrainingArguments

    name = "activation_checkpointing"
    name = name if hasattr(TrainingArguments, name) else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def left_out() -> set[str]:
    """Return the model types that the installed transformers stores in a way that no layout describes."""
    import transformers

    own = _numbers(transformers.__version__)
    return {name for name, first in OTHER_LAYOUTS.items() if own < _numbers(first)}


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


def installed(distribution: str) -> str | None:
    """Return the version of a distribution; None where its metadata is missing, as in vendored copies."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_trainer(trainer: type) -> None:
    """Refuse a `Trainer` that does not call what is overridden: the override would have no effect.

    Example: without a call of `_get_grad_norm`, a loss that is not finite would reach the weights.

    Raises:
        UserError: It lacks hooks, or has some that nothing in it calls.
    """
    if missing := missing_hooks(trainer):
        raise UserError(
            f"ContinualTrainer cannot work with transformers {installed('transformers')}: its Trainer has or calls no "
            f"{', '.join(missing)}. Install a version that fire-llm is tested with: see docs/dependencies.md"
        )


@functools.cache
def missing_hooks(trainer: type) -> tuple[str, ...]:
    """Return which of the hooks and attributes a `Trainer` lacks, or never uses itself."""
    functions = [inspect.unwrap(member) for kind in trainer.__mro__ for member in vars(kind).values()]
    used = {name for f in functions if inspect.isfunction(f) for name in _names(f.__code__)}
    lacked = [name for name in TRAINER_HOOKS if not hasattr(trainer, name) or name not in used]
    return (*lacked, *(name for name in TRAINER_ATTRIBUTES if name not in used))


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes that a function reads, sets or calls, functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def spent(stager: Any) -> bool:
    """Return whether a `DefaultStager` of torch was emptied by its first save, as in torch 2.11: a second one fails."""
    return not getattr(getattr(stager, "_state_dict_stager", None), "_deepcopy_dispatch", True)


def fsdp2_states(modules: Iterable[Any]) -> list[Any]:
    """Return FSDP2's states of some modules, each once: modules that are gathered together share one."""
    return list({id(state): state for state in (module._get_fsdp_state() for module in modules)}.values())


def fsdp2_policy(state: Any) -> Any:
    """Return the `MixedPrecisionPolicy` of one of `fsdp2_states`."""
    return state._mp_policy


def set_fsdp2_policy(state: Any, policy: Any, held: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Replace the `MixedPrecisionPolicy` of parameters that FSDP2 has sharded; torch has no public way to.

    Args:
        state: One of `fsdp2_states`, its parameters in shards (`reshard`).
        policy: Holds from the next gathering on.
        held: What this returned when `policy` was replaced, to be put back with it.

    Returns:
        What each parameter held for the old policy: the buffers, in its dtype, that the parameter was gathered in and
        that own the gradients of a step's micro-batches so far; and from torch 2.15 on a policy of its own.

    Raises:
        UserError: The installed torch would still gather in the old dtype; everything is as it was.
    """
    replaced, state._mp_policy = state._mp_policy, policy
    # A list of groups in torch 2.13; one group or none in 2.11 and below.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    parameters = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
    before = []
    for parameter, own in zip(parameters, held or [{}] * len(parameters), strict=True):
        kept = vars(parameter)
        names = kept.keys() & {"all_gather_outputs", "_unsharded_param", "mp_policy"}
        before.append({name: kept.pop(name) for name in names})
        new = {"all_gather_outputs": [], **({"mp_policy": policy} if "mp_policy" in names else {}), **own}
        kept.update(new)
    for group in filter(None, groups):
        group.mp_policy = policy
        group._init_mp_dtypes()
    if policy.param_dtype is None and any(parameter.param_dtype is not None for parameter in parameters):
        if replaced.param_dtype is not None:
            set_fsdp2_policy(state, replaced, before)
        raise UserError(
            f"torch {installed('torch')} keeps the precision of FSDP2's shards where it cannot be set: evaluate the "
            "saved checkpoint instead, or install a version that fire-llm is tested with: see docs/dependencies.md"
        )
    return before
