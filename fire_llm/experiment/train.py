"""Train one stage: its data, the model it starts from, the reset, the phase.

A stage that was cut off resumes from its newest checkpoint. Which stages are trained, and where: `sweep/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fire_llm.architectures.matrices import logical_matrices
from fire_llm.core.atomic import BYTES_A_PARAMETER, free_bytes, staged, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.locks import held, lock_of
from fire_llm.core.manifest import damage
from fire_llm.data import Mixture, TokenFile, tokenize_corpus, train_tokenizer
from fire_llm.distributed import ranks
from fire_llm.evaluation.measurement import first_token
from fire_llm.experiment.collect import measured_nll
from fire_llm.experiment.recipe import Recipe, optimizer_of
from fire_llm.experiment.stages import (
    Stage,
    context_of,
    corpus_of,
    final_checkpoint,
    labelled_checkpoint,
    phase_steps,
    split_batch,
    tokenizer_corpora,
)
from fire_llm.models import config_for, fresh_model, load_model, load_tokenizer
from fire_llm.training import (
    ContinualArguments,
    ContinualTrainer,
    DiagnosticsCallback,
    EvaluationSet,
    KeptOptimizer,
    LossJumpCallback,
    PenaltyCallback,
    RecyclingCallback,
    ResetCallback,
)
from fire_llm.training.callbacks import initial_model
from fire_llm.training.masking import check_document_mask
from fire_llm.training.saving import resumption, verified

SPECTRA_WIDTH = 1024
"""Largest short side whose singular values a run's reports hold; beyond it they cost more than the reset."""


@contextmanager
def only_run(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a run's folder against other runs; sweeps and their workers share it (`shared`).

    Raises:
        UserError: Another process holds it.
    """
    if not ranks().is_main_process:
        yield
        return
    with held(folder / ".lock", shared=shared) as had:
        if not had:
            raise UserError(f"another run is writing into '{folder}': wait for it to end, or choose another --output")
        yield


class RunContext:
    """Hold what the stages of a run share, each made when first wanted: tokenizer, token files, model config."""

    def __init__(self, recipe: Recipe, folder: Path, progress: bool) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress and ranks().is_main_process
        self.callbacks: list[Any] = []
        """Added to every stage's; where there are any, the process that started this one shows the bars."""
        self._files: dict[tuple[str, str], TokenFile] = {}
        self._tokenizer: Any = None
        self._config: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the run: given, the model's own, or trained here once."""
        if self._tokenizer is None:
            section, own = self.recipe.tokenizer, self.folder / "tokenizer"
            if section is not None and section.train is not None:
                corpora = [corpus_of(self.recipe, name) for name in tokenizer_corpora(self.recipe)]
                origin = {"vocabulary": section.train, "corpora": {c.name: c.fingerprint for c in corpora}}
                if not own.exists() and ranks().is_main_process:
                    with held(lock_of(self.folder, "tokenizer"), wait=True):
                        if not own.exists():  # the one that was waited for made it
                            trained = train_tokenizer(corpora, section.train, progress=self.progress)
                            with staged(own) as partial:
                                trained.save_pretrained(partial)
                                write_json(partial / "trained_on.json", origin)
                ranks().wait_for_everyone()
                if json.loads((own / "trained_on.json").read_text(encoding="utf-8")) != origin:
                    raise UserError(
                        f"'{own}' was trained for another recipe or on other text: choose another --output, "
                        "or delete the run's folder"
                    )
                self._tokenizer = load_tokenizer(own)
            else:
                self._tokenizer = load_tokenizer(
                    section.path if section and section.path else str(self.recipe.model.checkpoint)
                )
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The transformers config of the run's model."""
        if self._config is None:
            model = self.recipe.model
            name = str(model.preset or model.checkpoint)
            self._config = config_for(name, tokenizer=self.tokenizer, context=model.context, overrides=model.config)
        return self._config

    @property
    def context(self) -> int:
        """Tokens a sequence."""
        return context_of(self.recipe, self.config)

    def tokens(self, corpus: str, split: str) -> TokenFile:
        """Return a corpus as tokens, tokenising it where no cache holds it."""
        key = (corpus, split)
        if key not in self._files:
            self._files[key] = tokenize_corpus(
                corpus_of(self.recipe, corpus), self.tokenizer, split, progress=self.progress
            )
        return self._files[key]

    def mixture(self, stage: Stage) -> Mixture:
        """Return the data of a stage; arms of one phase and seed get the same."""
        sources = {c: self.tokens(c, "train").first(stage.phase.max_corpus_tokens) for c in stage.phase.data}
        return Mixture(
            sources,
            stage.phase.data,
            context=self.context,
            seed=stage.seed,
            phase=stage.phase.name,
            sampling=stage.phase.sampling,
            document_positions=self.recipe.batch.document_mask,
        )

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """Return the held-out texts to measure on, each read after the tokenizer's first token."""
        sets = {}
        for name in self.recipe.evaluated():
            held_out = self.tokens(name, "validation").first(self.recipe.evaluate.max_tokens)
            sets[name] = EvaluationSet(np.asarray(held_out.tokens), held_out.n_bytes, first_token(self.tokenizer))
        return sets

    def starting_model(self, stage: Stage) -> Any:
        """Return the weights that a stage starts from, in fp32."""
        if stage.parent is not None:
            parent = labelled_checkpoint(self.folder / stage.parent.folder, stage.start)
            return load_model(verified(parent), torch.float32)
        if self.recipe.model.checkpoint is not None:
            return load_model(self.recipe.model.checkpoint, torch.float32)
        return fresh_model(self.config, stage.seed)


def train(stage: Stage, bench: RunContext) -> None:
    """Train one stage to its end, from its newest checkpoint where it has one."""
    recipe, folder = bench.recipe, bench.folder / stage.folder
    resume = resumption(folder, stage.title)
    mixture = bench.mixture(stage)
    steps = phase_steps(stage.phase, recipe.batch.tokens_per_step, mixture.epoch_tokens)
    beyond = [k for k in stage.phase.keep if isinstance(k, int) and k > steps]
    if beyond:
        raise UserError(f"phase '{stage.phase.name}': keep {beyond[0]} lies beyond its {steps} steps")
    model = bench.starting_model(stage)
    if recipe.batch.document_mask:
        check_document_mask(model)
    # One checkpoint more than are kept while the newest is written.
    needed = BYTES_A_PARAMETER * model.num_parameters() * (1 + recipe.keep_last + len(stage.phase.keep))
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"'{folder}' has {free / 1e9:.2g} GB free and the stage's checkpoints take {needed / 1e9:.2g} GB: "
            "free some space, keep fewer checkpoints, or choose another --output"
        )
    if ranks().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "unit.json", stage.spec)
    callbacks = [*bench.callbacks]
    if stage.parent is not None and stage.phase.optimizer_state == "kept":
        callbacks.append(KeptOptimizer(labelled_checkpoint(bench.folder / stage.parent.folder, stage.start)))
    if stage.arm:
        callbacks += _resetting(stage, bench)
        if stage.parent is not None and stage.resets:
            before = measured_nll(labelled_checkpoint(bench.folder / stage.parent.folder, stage.start))
            callbacks.append(LossJumpCallback(before, bench.config.get_text_config().vocab_size))
    sets = bench.evaluation_sets()
    trainer = ContinualTrainer(
        model,
        _arguments(stage, bench, folder, steps),
        mixture,
        sets,
        callbacks,
        processing_class=bench.tokenizer,
    )
    if every := recipe.evaluate.diagnostics_every_steps:
        # Kept as they are now: before the reset, and before a resumption puts the newest checkpoint in their place.
        reference = {m.parameter: m.tensor.detach().to("cpu", copy=True) for m in logical_matrices(model)}
        text = sets[recipe.diagnosed(stage.phase)].tokens
        sizes = {"context": bench.context, "batch_size": recipe.evaluate.sequences_per_device}
        DiagnosticsCallback(text, every, reference=reference, **sizes).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    if final_checkpoint(folder) is None:
        raise RuntimeError(f"{stage.title}: training ended before its last step")


def _resetting(stage: Stage, bench: RunContext) -> list[Any]:
    """Return the callbacks of an arm: what is reset once, and what acts during the phase."""
    initial = initial_model(stage.resets, None, bench.config, stage.seed)
    once = [r for r in stage.resets if r.kind == "transition"]
    penalties = [r for r in stage.resets if r.kind == "penalty"]
    recycling = [r for r in stage.resets if r.kind == "recycling"]
    callbacks: list[Any] = [
        ResetCallback(
            once or "keep",
            initial=initial,
            report_file=bench.folder / stage.folder / "reset.json",
            spectra=bench.config.get_text_config().hidden_size <= SPECTRA_WIDTH,
            training=[*penalties, *recycling],
        )
    ]
    if penalties:
        callbacks.append(PenaltyCallback(penalties, initial=initial))
    return callbacks + [RecyclingCallback(spec, seed=stage.seed) for spec in recycling]


def _arguments(stage: Stage, bench: RunContext, folder: Path, steps: int) -> ContinualArguments:
    recipe = bench.recipe
    sequences, accumulation = split_batch(recipe, bench.context, ranks().num_processes)
    precision = resolve_precision(recipe.precision)
    every = recipe.evaluate.every_steps or max(1, steps // 10)
    arguments = ContinualArguments(
        output_dir=str(folder),
        title=stage.title if bench.progress else None,
        max_steps=steps,
        per_device_train_batch_size=sequences,
        per_device_eval_batch_size=recipe.evaluate.sequences_per_device,
        gradient_accumulation_steps=accumulation,
        **optimizer_of(recipe, stage.phase).arguments(steps),
        bf16=precision.startswith("bf16"),
        bf16_params=precision == "bf16-params",
        fp16=precision == "fp16",
        torch_compile=torch.cuda.is_available() if recipe.compile == "auto" else recipe.compile,
        nonfinite=recipe.nonfinite,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        accelerator_config={"non_blocking": torch.accelerator.is_available()},
        logging_steps=recipe.log_every_steps,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=recipe.save_every_steps,
        keep_last=recipe.keep_last,
        eval_context=bench.context,
        eval_precision=recipe.evaluate.precision,
        best_corpora=dict(stage.phase.data),
        keep_best="best" in stage.phase.keep,
        keep_steps=[k for k in stage.phase.keep if isinstance(k, int)],
        seed=stage.seed,
        data_seed=stage.seed,
        ddp_find_unused_parameters=False,
        log_level_replica="error",
        report_to="none",
        disable_tqdm=bool(bench.callbacks),
    )
    # Without this, fp32 would give way to what `accelerate launch --mixed_precision` left in the environment.
    arguments.mixed_precision = {"fp32": "no", "bf16-params": "bf16"}.get(precision, precision)
    return arguments


def finished(folder: Path) -> bool:
    """Tell whether a stage's last checkpoint is there, all of its files with the sizes they should have."""
    final = final_checkpoint(folder)
    return final is not None and damage(final, contents=False) is None
