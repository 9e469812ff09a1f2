"""Train one stage: prepare its data and the model that it starts from, reset the model, train the phase.

A stage that was cut off resumes from its newest checkpoint. `run` decides which stages are trained, and where.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from fire_llm.architectures.matrices import logical_matrices
from fire_llm.core.atomic import AVERAGED_BYTES, BYTES_A_PARAMETER, free_bytes, write_json
from fire_llm.core.compat import checkpointing
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.hashing import hash_file
from fire_llm.core.manifest import weights_hash
from fire_llm.core.ranks import launched_in_shards
from fire_llm.data import Mixture
from fire_llm.distributed import ranks
from fire_llm.evaluation.measurement import first_token
from fire_llm.experiment.batch import phase_steps, split_batch
from fire_llm.experiment.collect import measured_nll
from fire_llm.experiment.conditions import decided_resets
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.generation import generation
from fire_llm.experiment.pushing import PushCallback, push_stage
from fire_llm.experiment.recipe import optimizer_of, stop_fault
from fire_llm.experiment.stages import REPORT, Stage, final_checkpoint, labelled_checkpoint
from fire_llm.models import load_model
from fire_llm.resets import ResetSpec
from fire_llm.training import (
    ContinualArguments,
    ContinualTrainer,
    DiagnosticsCallback,
    EarlyStopCallback,
    EvaluationSet,
    GenerationCallback,
    KeptOptimizer,
    LossJumpCallback,
    PenaltyCallback,
    RecyclingCallback,
    ResetCallback,
)
from fire_llm.training.callbacks import initial_model
from fire_llm.training.masking import check_document_mask
from fire_llm.training.saving import resumption, verified
from fire_llm.training.trackers import Tracked, reporting

SPECTRA_WIDTH = 1024
"""Reports hold the singular values of matrices up to this width; of wider ones they cost more than the reset."""


def train(stage: Stage, run: RunContext, callbacks: Sequence[Any] = ()) -> None:
    """Train one stage to its end, from its newest checkpoint if it has one.

    Args:
        stage: A stage of the run; its parent is finished.
        run: What the stage shares with the others.
        callbacks: Called before the stage's own. If there are any, they show how far training is.

    Raises:
        UserError: The stage keeps a step after its last one, or could never stop early, or the disk is too small for
            its checkpoints.
    """
    recipe, folder = run.recipe, run.folder / stage.folder
    resume = resumption(folder, stage.title)
    mixture = mixture_of(stage, run)
    generating = generation(run, stage.seed)
    steps = phase_steps(stage.phase, recipe.batch.tokens_per_step, mixture.epoch_tokens)
    _refuse_steps(stage, steps)
    model = starting_model(stage, run)
    if recipe.batch.document_mask:
        check_document_mask(model)
    _refuse_small_disk(stage, folder, model.num_parameters())
    if ranks().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "unit.json", unit := {**stage.spec, **_begun_with(stage, run)})
    sets = evaluation_sets(run)
    arguments = _arguments(stage, run, folder, steps)
    arguments.disable_tqdm = bool(callbacks) or not run.progress
    trainer = ContinualTrainer(
        model,
        arguments,
        mixture,
        sets,
        [*callbacks, _TokensInUse(run), _Padding(model.config), *_stage_callbacks(stage, run, generating)],
        processing_class=run.tokenizer,
    )
    if every := recipe.evaluate.diagnostics_every_steps:
        # Copied here, before the reset, and before a resumption loads the newest checkpoint into the model.
        reference = {m.parameter: m.tensor.detach().to("cpu", copy=True) for m in logical_matrices(model)}
        text = sets[recipe.diagnosed(stage.phase)].tokens
        sizes = {"context": run.sequence_length, "batch_size": recipe.evaluate.sequences_per_device}
        DiagnosticsCallback(text, every, reference=reference, **sizes).attach(trainer)
    with reporting(trainer, _tracked(stage, run)):
        trainer.train(resume_from_checkpoint=resume)
    if final_checkpoint(folder) is None:
        raise RuntimeError(f"{stage.title}: training ended before its last step")
    if ranks().is_main_process and (folder / REPORT).exists():
        write_json(folder / "unit.json", {**unit, "reset": hash_file(folder / REPORT)})
    if ranks().is_main_process:
        push_stage(stage)


def _refuse_steps(stage: Stage, steps: int) -> None:
    """Refuse to keep a step after the last one, and to stop early where that cannot happen."""
    beyond = [k for k in stage.phase.keep if isinstance(k, int) and k > steps]
    if beyond:
        raise UserError(f"phase '{stage.phase.name}': keep {beyond[0]} lies beyond its {steps} steps")
    if fault := stop_fault(stage.run.recipe, stage.phase, steps):
        raise UserError(f"phase '{stage.phase.name}': {fault}")


def _refuse_small_disk(stage: Stage, folder: Path, parameters: int) -> None:
    """Refuse a disk that has no room for the stage's checkpoints: those that stay, and one that is being written."""
    each = BYTES_A_PARAMETER + (AVERAGED_BYTES if stage.phase.ema else 0)
    needed = each * parameters * (1 + stage.run.recipe.keep_last + len(stage.phase.keep))
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"'{folder}' has {free / 1e9:.2g} GB free and the stage's checkpoints take {needed / 1e9:.2g} GB: "
            "free some space, keep fewer checkpoints, or choose another --output"
        )


def _begun_with(stage: Stage, run: RunContext) -> dict[str, Any]:
    """Return the hashes that `unit.json` holds beside the stage's spec: of its tokens and of its parent's weights."""
    splits = {"train": stage.phase.data, "validation": run.recipe.evaluated()}
    names = dict.fromkeys([*stage.phase.data, *run.recipe.evaluated()])
    tokens = {name: {s: run.tokens(name, s).content for s, own in splits.items() if name in own} for name in names}
    if stage.parent is None:
        return {"tokens": tokens}
    parent = labelled_checkpoint(run.folder / stage.parent.folder, stage.start)
    return {"tokens": tokens, "weights": weights_hash(parent)}


class _TokensInUse(TrainerCallback):
    """End training if a token file was written to, before anything is saved that was trained or measured on it."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the files after every step."""
        self.run.refuse_changed_tokens()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the files before the save that follows an evaluation."""
        self.run.refuse_changed_tokens()


class _Padding(TrainerCallback):
    """Undo that `Trainer` sets the config's padding token to the tokenizer's, if that is the end of text.

    A model built from such a config draws the embedding of the end of text as zero, and does not train it.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.padding = config.get_text_config(), config.get_text_config().pad_token_id

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the config's own value before anything is saved."""
        if self.config.pad_token_id in (self.config.bos_token_id, self.config.eos_token_id):
            self.config.pad_token_id = self.padding


def mixture_of(stage: Stage, run: RunContext) -> Mixture:
    """Return the data of a stage; all arms of one phase and seed get the same."""
    phase = stage.phase
    return Mixture(
        {name: run.tokens(name, "train").first(phase.max_corpus_tokens) for name in phase.data},
        phase.data,
        context=run.sequence_length,
        seed=stage.seed,
        phase=phase.name,
        sampling=phase.sampling,
        document_positions=run.recipe.batch.document_mask,
    )


def evaluation_sets(run: RunContext) -> dict[str, EvaluationSet]:
    """Return the held-out text of each corpus as one document, read after the tokenizer's first token."""
    first, texts = first_token(run.tokenizer), {name: run.held_out(name) for name in run.recipe.evaluated()}
    return {name: EvaluationSet(np.asarray(text.tokens), text.n_bytes, first) for name, text in texts.items()}


def starting_model(stage: Stage, run: RunContext) -> Any:
    """Return the model that a stage starts from, in fp32."""
    attention = None if run.recipe.attention == "auto" else run.recipe.attention
    if stage.parent is not None:
        parent = labelled_checkpoint(run.folder / stage.parent.folder, stage.start)
        model = load_model(verified(parent), torch.float32, attention=attention)
    else:
        model = run.first_model(stage.seed, attention)
    table = model.get_input_embeddings()
    if getattr(table, "padding_idx", None) in (run.tokenizer.bos_token_id, run.tokenizer.eos_token_id):
        table.padding_idx = None  # torch gives a padding token no gradient, but texts hold this token
    return model


def _stage_callbacks(stage: Stage, run: RunContext, generating: GenerationCallback | None) -> list[Any]:
    """Return the callbacks of a stage: the parent's optimizer, the reset, its effects, early stopping, pushing.

    Text is generated after all callbacks that change weights, and once before the reset.
    """
    parent = labelled_checkpoint(run.folder / stage.parent.folder, stage.start) if stage.parent else None
    resets = decided_resets(stage)
    callbacks: list[Any] = []
    if parent is not None and stage.phase.optimizer_state == "kept":
        callbacks.append(KeptOptimizer(parent))
    if generating is not None and any(r.kind == "transition" and not r.idle for r in resets):
        callbacks.append(generating.before_reset())
    if stage.arm:
        callbacks += _resetting(resets, stage, run)
        if parent is not None and not all(reset.idle for reset in resets):
            callbacks.append(LossJumpCallback(measured_nll(parent), run.config.get_text_config().vocab_size))
    if (stop := stage.phase.stop) is not None:
        callbacks.append(EarlyStopCallback(stop.corpus, stop.patience, stop.min_delta))
    if run.recipe.hub is not None and run.recipe.hub.push == "every save":
        callbacks.append(PushCallback(stage))
    return callbacks if generating is None else [*callbacks, generating]


def _resetting(resets: Sequence[ResetSpec], stage: Stage, run: RunContext) -> list[Any]:
    """Return the callbacks of an arm: of its resets, and of the methods that act during the phase."""
    initial = initial_model(resets, None, run.config, stage.seed)
    once = [r for r in resets if r.kind == "transition"]
    penalties = [r for r in resets if r.kind == "penalty"]
    recycling = [r for r in resets if r.kind == "recycling"]
    callbacks: list[Any] = [
        ResetCallback(
            once or "none",
            initial=initial,
            report_file=run.folder / stage.folder / REPORT,
            spectra=run.config.get_text_config().hidden_size <= SPECTRA_WIDTH,
            training=[*penalties, *recycling],
        )
    ]
    if penalties:
        callbacks.append(PenaltyCallback(penalties, initial=initial))
    return callbacks + [RecyclingCallback(spec, seed=stage.seed) for spec in recycling]


def _tracked(stage: Stage, run: RunContext) -> Tracked:
    """Return the name, the groups and the settings under which trackers show a stage."""
    name, group = run.recipe.name, run.folder.resolve().name
    config = {
        "phase": stage.phase.name,
        "arm": stage.arm,
        "seed": stage.seed,
        "resets": [reset.label() for reset in stage.resets],
        "start": f"{stage.parent.folder}, {stage.start}" if stage.parent else None,
        "recipe": run.recipe.model_dump(mode="json", exclude_none=True),
    }
    path = (*dict.fromkeys([name, group]), *stage.folder.split("/"))
    return Tracked(run.folder / stage.folder, run.folder, name, group, path, stage.phase.name, config)


def _tracker_arguments(stage: Stage, run: RunContext) -> dict[str, Any]:
    """Return the training arguments that choose the trackers and name the run in them."""
    if not run.recipe.report_to:
        return {"report_to": "none"}
    return {"report_to": run.recipe.report_to, "run_name": _tracked(stage, run).name, "project": run.recipe.name}


def _arguments(stage: Stage, run: RunContext, folder: Path, steps: int) -> ContinualArguments:
    """Return the training arguments that the recipe asks for."""
    recipe = run.recipe
    sequences, accumulation = split_batch(run, ranks().num_processes)
    precision = resolve_precision(recipe.precision)
    every = recipe.evaluate.every(steps)
    arguments = ContinualArguments(
        output_dir=str(folder),
        title=stage.title if run.progress else None,
        max_steps=steps,
        per_device_train_batch_size=sequences,
        per_device_eval_batch_size=recipe.evaluate.sequences_per_device,
        gradient_accumulation_steps=accumulation,
        **optimizer_of(recipe, stage.phase).arguments(steps),
        bf16=precision.startswith("bf16"),
        bf16_params=precision == "bf16-params",
        fp16=precision == "fp16",
        **checkpointing(recipe.gradient_checkpointing),
        torch_compile=torch.cuda.is_available() and not launched_in_shards()
        if recipe.compile == "auto"
        else recipe.compile,
        nonfinite=recipe.nonfinite,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        accelerator_config={
            "non_blocking": torch.accelerator.is_available(),
            "gradient_accumulation_kwargs": {"sync_each_batch": True} if recipe.sync_each_batch else None,
        },
        reduce_precision=recipe.reduce_precision,
        logging_steps=recipe.log_every_steps,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=recipe.save_every_steps,
        save_every_minutes=recipe.save_every_minutes,
        keep_last=recipe.keep_last,
        eval_context=run.sequence_length,
        eval_precision=recipe.evaluate.precision,
        best_corpora=dict(stage.phase.data),
        ema_decay=stage.phase.ema.decay if stage.phase.ema else None,
        keep_best="best" in stage.phase.keep,
        keep_steps=[k for k in stage.phase.keep if isinstance(k, int)],
        seed=stage.seed,
        data_seed=stage.seed,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        labels_shifted=True,
        log_level_replica="error",
        **_tracker_arguments(stage, run),
    )
    # Otherwise the environment of `accelerate launch --mixed_precision` would take the place of fp32.
    arguments.mixed_precision = {"fp32": "no", "bf16-params": "bf16"}.get(precision, precision)
    return arguments
