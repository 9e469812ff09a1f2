"""Find the checkpoints of a run by its recipe, and score each on the run's corpora."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fire_llm.core.atomic import is_run, read_json, write_json
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hashing import digest
from fire_llm.core.locks import held, lock_of
from fire_llm.core.manifest import weights_hash
from fire_llm.data.corpora import CORPORA
from fire_llm.distributed import is_first
from fire_llm.evaluation.measurement import WORDS, first_token, token_text
from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.statistics import BOOTSTRAP, standard_errors
from fire_llm.evaluation.texts import EvaluationSet
from fire_llm.experiment.bars import library_bars
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.measured import Measured
from fire_llm.experiment.recipe import Recipe, load_recipe
from fire_llm.experiment.sources import changes
from fire_llm.experiment.stages import (
    Stage,
    expand,
    final_checkpoint,
    kept_checkpoints,
    labelled_checkpoint,
    read_unit,
    refuse_links,
    step_behind,
)
from fire_llm.experiment.transfer import PhaseRun, transfer
from fire_llm.models import find_device, load_model
from fire_llm.reporting.schema import EVALUATION_VERSION, Bootstrap, Evaluation, EvaluationRow, EvaluationSettings

LEVEL = 0.95
"""The level of all intervals."""


@dataclass
class Row:
    """A checkpoint of the matrix, and how to load it."""

    checkpoint: str
    """Folder relative to the run's; `init/seed-1` for step-0 weights; the recipe's `checkpoint` if it has one."""
    phase: str | None
    arm: str | None
    seed: int | None
    step: int
    labels: list[str]
    """Some of init, start, final, best and numbers of steps."""
    load: Callable[[], Any] = field(repr=False)
    weights: str | None = None
    """Hash of its weights; None for step-0 weights, which follow from the recipe."""

    def names(self) -> dict[str, object]:
        """Return all fields but `load`, as plain data."""
        return {key: value for key, value in vars(self).items() if key != "load"}


def evaluate_run(
    run_dir: str | Path,
    data: Sequence[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    *,
    device: str = "cpu",
    again: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the checkpoints of a run on its held-out texts, and write and return the matrix.

    Each checkpoint is loaded once, in fp32. A perplexity that an earlier call measured with the same weights, text and
    settings is not measured again. Under torch.distributed ranks share the work.

    Args:
        run_dir: Folder of a run; its unfinished stages are left out and named.
        data: Corpora of the recipe or known ones; by default all that the recipe trains or measures on.
        context: Tokens a window; by default the run's, and the numbers are then those of its results.json.
        stride: As in `perplexity`.
        batch_size: As in `perplexity`.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`, as in `find_device`.
        again: Measure everything again.
        progress: Show progress bars.

    Returns:
        The content of RUN_DIR/evaluation.json as plain data (docs/results-schema.md);
        `fire_llm.reporting.schema.Evaluation.model_validate` gives it types.

    Raises:
        UserError: For a folder that is no run or has nothing finished, an unknown corpus, or text that has changed.
    """
    folder = Path(os.path.expanduser(run_dir))
    run, stages = run_and_stages(folder, progress)
    recipe = run.recipe
    refuse_links(folder, stages)
    finished = [stage for stage in stages if final_checkpoint(folder / stage.folder)]
    if not finished:
        raise UserError(f"'{folder}' has no finished phase to evaluate: finish it with `fire-llm run`")
    names = _names(recipe, data)
    _refuse_changed(folder, finished, names)
    compute_on = find_device(device)
    texts, left_out = _texts(run, names, required=names if data else recipe.evaluated())
    checkpoints, phase_runs = rows_and_phase_runs(finished, run)
    prefix_text = token_text(run.tokenizer, first_token(run.tokenizer))
    settings = {"context": run.sequence_length if context is None else context, "stride": stride}
    earlier = Measured(folder, {**settings, "device": compute_on.type})
    matrix: dict[str, dict[str, Scores]] = {}
    rows: list[EvaluationRow] = []
    reused = 0
    with library_bars(progress):
        for row in checkpoints:
            _refuse_damaged(folder, row)
            bar = f"{row.checkpoint} on" if run.progress else None
            how = {**settings, "batch_size": batch_size, "progress": bar}
            measured, known = earlier.score(row.load(), texts, compute_on, again=again, **how)
            reused += known
            matrix[row.checkpoint] = {name: result.scores for name, result in measured.items()}
            for name, result in measured.items():
                named = {"data": name, "split": "validation", "prefix_text": prefix_text}
                errors = standard_errors(result.scores)
                rows.append(EvaluationRow.model_validate({**row.names(), **named, **result.to_dict(), "se": errors}))
    forgetting, forward_transfer = transfer(matrix, phase_runs, LEVEL)
    evaluation = Evaluation(
        schema_version=EVALUATION_VERSION,
        name=recipe.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings=EvaluationSettings(
            max_tokens=recipe.evaluate.max_tokens,
            device=str(compute_on),
            words=WORDS,
            bootstrap=Bootstrap.model_validate(BOOTSTRAP),
            level=LEVEL,
        ),
        left_out=left_out,
        unfinished=[stage.folder for stage in stages if stage not in finished],
        reused=reused,
        rows=rows,
        forgetting=forgetting,
        forward_transfer=forward_transfer,
    ).model_dump(mode="json")
    if is_first():
        with held(lock_of(folder, "evaluation"), wait=True):
            write_json(folder / "evaluation.json", evaluation)
    return evaluation


def run_and_stages(folder: Path, progress: bool) -> tuple[RunContext, list[Stage]]:
    """Read the recipe that a run's folder was made with.

    Raises:
        UserError: It has no recipe, or a damaged one; or text is missing, with a hint if its path is relative.
    """
    path = folder / "recipe.json"
    if not is_run(folder):
        inside = next((place.parent for place in sorted(folder.glob("*/recipe.json"))), None)
        which = f"one of the runs inside, such as '{inside}'" if inside else "the folder that `fire-llm run` made"
        raise UserError(f"'{folder}' is no run: it has no recipe.json. Give {which}")
    data = read_json(path, "run the recipe again, which writes it again")
    try:
        run = RunContext(load_recipe(data, made=True), folder, progress)
        return run, expand(run)
    except UserError as error:
        if os.path.isabs(os.path.expanduser(str(data.get("data_root", ".")))):
            raise
        hint = "the run's data_root counts from the current folder: go to where it was started"
        raise UserError(f"{error}\n({hint})") from error


def _names(recipe: Recipe, data: Sequence[str] | None) -> list[str]:
    """Return the corpora to measure on.

    Raises:
        UserError: Naming a corpus that is neither the recipe's nor a known one.
    """
    corpora = list(dict.fromkeys([*recipe.corpus_names(), *recipe.corpora]))
    for name in data or ():
        if name not in corpora and name not in CORPORA:
            raise UserError(
                f"--data: the run has no corpus '{name}'.{did_you_mean(name, [*corpora, *CORPORA])} It has: "
                f"{', '.join(corpora)}. Known ones: {', '.join(CORPORA)}. For a file, name checkpoints instead of the "
                "run"
            )
    return list(dict.fromkeys(data)) if data else recipe.corpus_names()


def _refuse_changed(folder: Path, finished: Sequence[Stage], names: Sequence[str]) -> None:
    """Refuse changes since training, of the model's files and of texts: held-out text may have been trained on.

    Raises:
        UserError: Naming the corpus, or the file of the model or tokenizer.
    """
    for stage in finished:
        unit = read_unit(folder / stage.folder) or {}
        for change in changes(unit.get("files"), stage.run.files):
            raise UserError(f"{change} since '{folder / stage.folder}' was begun: put back what it was")
        for name, now in stage.spec["corpora"].items():
            if name in names and unit.get("corpora", {}).get(name, now) != now:
                raise UserError(
                    f"corpus '{name}' has changed since '{folder / stage.folder}' was trained, so that its held-out "
                    "text may be text that was trained on: put it back, or name other corpora with --data"
                )


def _refuse_damaged(folder: Path, row: Row) -> None:
    """Refuse a checkpoint of the run whose weights are not those that were saved.

    Raises:
        UserError: Naming the checkpoint.
    """
    if row.phase and weights_hash(folder / row.checkpoint, read=True) != row.weights:
        raise UserError(
            f"'{folder / row.checkpoint}' is damaged: its weights are not what was written. Put back a copy of it, "
            "or delete it and run the recipe again"
        )


def _texts(
    run: RunContext, names: Sequence[str], required: Sequence[str]
) -> tuple[dict[str, EvaluationSet], dict[str, str]]:
    """Return the held-out text of each corpus, and why others have none.

    Raises:
        UserError: A required corpus has no held-out text.
    """
    first = first_token(run.tokenizer)
    texts: dict[str, EvaluationSet] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            held_out = run.held_out(name)
        except UserError as error:
            if name in required:
                raise
            left_out[name] = str(error)
        else:
            texts[name] = EvaluationSet.of(held_out, first)
    return texts, left_out


def rows_and_phase_runs(finished: Sequence[Stage], run: RunContext) -> tuple[list[Row], list[PhaseRun]]:
    """Return the checkpoints of a run, first the weights that it began with, and the stages between them.

    Args:
        finished: The finished stages, parents before children.
        run: The run that they belong to.
    """
    recipe, folder = run.recipe, run.folder
    rows: dict[str, Row] = {}
    phase_runs: dict[str, PhaseRun] = {}
    for seed in recipe.seed:
        given = recipe.model.checkpoint
        name = given or f"init/seed-{seed}"
        load = partial(run.first_model, seed)
        weights = digest(str(run.files["model"]), 16) if given else None
        rows[name] = Row(name, None, None, None if given else seed, 0, ["start" if given else "init"], load, weights)
    for stage in finished:
        for path, labels in kept_checkpoints(stage).items():
            last = str(path.relative_to(folder))
            load = partial(load_model, path, torch.float32)
            step, weights = step_behind(path), weights_hash(path)
            rows[last] = Row(last, stage.phase.name, stage.arm, stage.seed, step, labels, load, weights)
        start = recipe.model.checkpoint or f"init/seed-{stage.seed}"
        if stage.parent is not None:
            start = str(labelled_checkpoint(folder / stage.parent.folder, stage.start).relative_to(folder))
        parent = phase_runs[stage.parent.folder] if stage.parent else None
        names = (stage.phase.name, stage.arm, stage.seed, tuple(stage.phase.data))
        phase_runs[stage.folder] = PhaseRun(*names, start, last, parent)
    return [*rows.values()], [*phase_runs.values()]
