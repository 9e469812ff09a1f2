"""What the stages of a run share, each thing resolved once: corpora, arms, tokenizer, config, tokens."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from fire_llm.architectures.context import choose_context
from fire_llm.core.atomic import read_json, staged, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.locks import held, lock_of
from fire_llm.data.corpora import Corpus, resolve
from fire_llm.data.tokenizer import train_tokenizer
from fire_llm.data.tokens import TokenFile, tokenize_corpus
from fire_llm.distributed import ranks
from fire_llm.experiment.recipe import Recipe
from fire_llm.experiment.recipe.sections import as_list
from fire_llm.models import PRESETS, config_for, load_tokenizer
from fire_llm.resets import ResetSpec


class RunContext:
    """Resolve what the stages of a run share, each thing once, when it is first asked for.

    Args:
        recipe: From `load_recipe`.
        folder: The run's; `runs/NAME` by default.
        progress: Show what takes long. Of several ranks, the first one alone does.
    """

    def __init__(self, recipe: Recipe, folder: str | Path | None = None, progress: bool = False) -> None:
        self.recipe, self.folder = recipe, Path(folder or Path("runs") / recipe.name)
        self._progress = progress
        self._corpora: dict[str, Corpus] = {}
        self._tokens: dict[tuple[str, str], TokenFile] = {}

    @property
    def progress(self) -> bool:
        """Return whether this process shows anything."""
        return self._progress and ranks().is_main_process

    def corpus(self, name: str) -> Corpus:
        """Return the corpus of a name; its text is neither read nor hashed here."""
        if name not in self._corpora:
            self._corpora[name] = resolve(name, self.recipe.corpora.get(name), Path(self.recipe.data_root))
        return self._corpora[name]

    @cached_property
    def arms(self) -> dict[str, dict[str, tuple[ResetSpec, ...]]]:
        """The arms of each phase: {phase: {arm: resets}}."""
        return {
            phase.name: {arm: tuple(map(ResetSpec.parse, as_list(given))) for arm, given in (phase.arms or {}).items()}
            for phase in self.recipe.phases
        }

    @cached_property
    def tokenizer_corpora(self) -> list[str]:
        """The corpora that the tokenizer is trained on; none where it is given."""
        section = self.recipe.tokenizer
        if section is None or section.train is None:
            return []
        return section.corpora or list(self.recipe.phases[0].data)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the weights of every stage depend on, as plain data."""
        named = {"model", "tokenizer", "batch", "evaluate", "log_every_steps"}
        common = self.recipe.model_dump(mode="json", include=named)
        # "auto" may mean another thing on another machine.
        return {**common, "precision": resolve_precision(self.recipe.precision)}

    @cached_property
    def planned_config(self) -> Any:
        """The transformers config of the model before the tokenizer is there: its shapes are those of `config`."""
        model, tokenizer = self.recipe.model, self.recipe.tokenizer
        overrides = dict(model.config)
        preset: dict[str, Any] = PRESETS.get(model.preset or "", {})
        if tokenizer and tokenizer.train and preset.get("vocab_size", 1) is None:
            overrides.setdefault("vocab_size", tokenizer.train)
        return config_for(str(model.preset or model.checkpoint), context=model.context, overrides=overrides)

    @cached_property
    def sequence_length(self) -> int:
        """Tokens a sequence: the recipe's `model.context`, else what `choose_context` takes."""
        return choose_context(self.planned_config, self.recipe.model.context, "model.context")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer: given, the model's own, or trained here once."""
        section = self.recipe.tokenizer
        if section is None or section.train is None:
            return load_tokenizer(section.path if section and section.path else str(self.recipe.model.checkpoint))
        own = self.folder / "tokenizer"
        corpora = [self.corpus(name) for name in self.tokenizer_corpora]
        origin = {"vocabulary": section.train, "corpora": {c.name: c.fingerprint for c in corpora}}
        if not own.exists() and ranks().is_main_process:
            with held(lock_of(self.folder, "tokenizer"), wait=True):
                if not own.exists():  # the one that was waited for made it
                    trained = train_tokenizer(corpora, section.train, progress=self.progress)
                    with staged(own) as partial:
                        trained.save_pretrained(partial)
                        write_json(partial / "trained_on.json", origin)
        ranks().wait_for_everyone()
        if read_json(own / "trained_on.json", f"delete '{own}', which is then trained again") != origin:
            raise UserError(
                f"'{own}' was trained for another recipe or on other text: choose another --output, "
                "or delete the run's folder"
            )
        return load_tokenizer(own)

    @cached_property
    def config(self) -> Any:
        """The transformers config of the model."""
        model = self.recipe.model
        name = str(model.preset or model.checkpoint)
        return config_for(name, tokenizer=self.tokenizer, context=model.context, overrides=model.config)

    def tokens(self, corpus: str, split: str) -> TokenFile:
        """Return a corpus as tokens, tokenising it where no cache holds it."""
        key = (corpus, split)
        if key not in self._tokens:
            self._tokens[key] = tokenize_corpus(self.corpus(corpus), self.tokenizer, split, progress=self.progress)
        return self._tokens[key]

    def held_out(self, corpus: str) -> TokenFile:
        """Return the part of a corpus's held-out text that the recipe measures on."""
        return self.tokens(corpus, "validation").first(self.recipe.evaluate.max_tokens)

    def release(self) -> None:
        """Forget what takes memory; it is made again when it is asked for."""
        self._tokens.clear()
        for name in ("tokenizer", "config", "planned_config"):
            self.__dict__.pop(name, None)
