"""Downstream tasks: let lm_eval measure a checkpoint, and return its results as plain data."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fire_llm.architectures.context import choose_context, longest_context
from fire_llm.core.errors import UserError, did_you_mean, first_line
from fire_llm.evaluation.measurement import PREFIXES, check_choice, first_token, token_text
from fire_llm.evaluation.precision import evaluating, own_precision, precision_of
from fire_llm.models import find_device, load_model, load_tokenizer

KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "git_hash")
"""The parts of lm_eval's results that are returned; `git_hash` is that of the working directory."""


def run_tasks(
    checkpoint: str | Path | tuple[Any, Any],
    tasks: Sequence[str | Path],
    *,
    context: int | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    prefix: str = "auto",
) -> dict[str, Any]:
    """Return the results of `lm_eval.simple_evaluate` for a checkpoint on some tasks.

    Args:
        checkpoint: A checkpoint folder or Hub id, which is loaded in fp32; or a loaded model and its tokenizer, which
            are used as they are, on the model's device; its mode (train or eval) is restored.
        tasks: Names of lm_eval's tasks, groups or tags; or paths, which contain a `/` or end in `.yaml`: the YAML file
            of your own task, or a folder of tasks and groups, all of which are run.
        context: Most tokens read at once; by default as many as the model reads, or lm_eval's 2048 if it has no limit.
            Longer questions lose their beginning, longer texts are read in windows.
        limit: Documents of each task that are read, or below 1 the share of them; all by default. For trying out.
        num_fewshot: Examples before each question; the task's own number by default.
        batch_size: Sequences a forward pass.
        device: Where a checkpoint is loaded to.
        prefix: Token read before a text: `bos`, `eos`, or `auto`, as in `first_token`.

    Returns:
        JSON data: `KEPT`, and `settings` (lm_eval's version, the arguments, the `precision` of weights and products,
        `context` the most tokens read at once, `prefix` and `prefix_text` the token read before a text). What is not
        finite is null.

    Raises:
        UserError: lm_eval is not installed, a task is unknown or cannot be loaded (its data not within reach, a
            package that it needs missing), an argument is out of range, or the checkpoint cannot be read.
    """
    refuse_prefix(prefix)
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UserError(f"limit {limit} is neither a number of documents, 1 or more, nor a share of them, below 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot {num_fewshot} is below 0, a task without examples")
    manager, names = find_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if isinstance(checkpoint, tuple):
        model, tokenizer = checkpoint
    else:
        place = find_device(device)
        tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, torch.float32).to(place)
    longest = longest_context(model.config) if context is None else choose_context(model.config, context)
    chosen = _load(manager, names)
    first = None if prefix == "auto" else first_token(tokenizer, prefix)
    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)  # no warning about a model that is loaded already
    try:
        with evaluating(model), own_precision(model):
            # lm_eval's own default would be -1 for XLNet, and two positions too many for RoBERTa.
            most = longest or HFLM._DEFAULT_MAX_LENGTH
            lm = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=most, prefix_token_id=first
            )
            answer = lm_eval.simple_evaluate(
                lm, tasks=chosen, task_manager=manager, limit=limit, num_fewshot=num_fewshot, log_samples=False
            )
    except (AssertionError, ValueError) as error:  # answers longer than the context, images, code that a model wrote
        raise UserError(f"tasks: lm_eval refuses: {error}") from error
    finally:
        log.setLevel(level)
    settings = {
        "lm_eval": lm_eval.__version__,
        "tasks": [str(task) for task in tasks],
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "precision": precision_of(model),
        "context": lm.max_length,
        "prefix": lm.prefix_token_id,
        "prefix_text": token_text(tokenizer, lm.prefix_token_id),
    }
    return {"settings": settings, **{key: _plain(answer[key]) for key in KEPT if key in answer}}


def refuse_prefix(prefix: str) -> None:
    """Raise `UserError` for a prefix that is none of `PREFIXES`, or `none`, which lm_eval does not know."""
    check_choice("prefix", prefix, PREFIXES)
    if prefix == "none":
        raise UserError("--prefix none: lm_eval reads a token before every text: with --tasks give auto, bos or eos")


def find_tasks(tasks: Sequence[str | Path]) -> tuple[Any, list[str]]:
    """Return lm_eval's index of tasks, and the names to load from it.

    Raises:
        UserError: There is no such task, file or folder, or lm_eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401  # lm_eval.tasks may be in memory although lm_eval cannot be imported
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"tasks are run by lm_eval: pip install 'fire-llm[tasks]' ({error})") from error
    if not tasks:
        raise UserError("no task is named; `lm_eval ls tasks` lists those there are")
    paths = {task: Path(task) for task in tasks if "/" in str(task) or str(task).endswith(".yaml")}
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        raise UserError(f"tasks: there is no file or folder '{missing[0]}'")
    folders = [path for path in paths.values() if path.is_dir()]
    # lm_eval takes ten seconds to list its own 15,000 tasks.
    manager = TaskManager(include_path=folders, include_defaults=len(paths) < len(tasks))
    names: list[str] = []
    for task in tasks:
        if task not in paths:
            if task not in manager.task_index:
                near = did_you_mean(str(task), manager.all_tasks)
                raise UserError(
                    f"tasks: lm_eval has no '{task}'.{near} `lm_eval ls tasks` lists them; a path to one's own holds a "
                    "'/' or ends in '.yaml'"
                )
            names.append(str(task))
        elif paths[task] in folders:
            own = TaskManager(include_path=paths[task], include_defaults=False)
            if not own.all_subtasks:
                raise UserError(f"tasks: no YAML file in '{task}' defines a task")
            names += own.all_groups + own.all_subtasks
        else:
            names.append(str(task))
    return manager, names


def _load(manager: Any, names: list[str]) -> list[Any]:
    """Load the tasks and groups of these names with their data; return those that are in no other group.

    Raises:
        UserError: One cannot be loaded.
    """
    items: dict[str, Any] = {}
    inner: set[str] = set()
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a YAML file, its functions and the readers of its data raise
            raise UserError(
                f"tasks: lm_eval cannot load '{name}': {type(error).__name__}, {first_line(error)}"
            ) from error
        items |= {**loaded["tasks"], **loaded["groups"]}
        inner |= {child for children in loaded["group_map"].values() for child in children}
    return [item for key, item in items.items() if key not in inner]


def _plain(value: Any) -> Any:
    """Return JSON data: None for numbers that are not finite, text for types that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
