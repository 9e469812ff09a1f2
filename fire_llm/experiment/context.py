"""What the stages of a run share: corpora, arms, tokenizer, config and tokens, each resolved once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import torch

from fire_llm.architectures.configs import CONFIG
from fire_llm.architectures.context import choose_context
from fire_llm.core.atomic import read_json, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.locks import held, lock_of
from fire_llm.core.manifest import MANIFEST, damage, write_manifest
from fire_llm.core.staging import staged
from fire_llm.data.corpora import Corpus, resolve
from fire_llm.data.tokenizer import train_tokenizer
from fire_llm.data.tokens import TokenFile, tokenize_corpus
from fire_llm.distributed import ranks
from fire_llm.experiment.memory import Sizes, sizes
from fire_llm.experiment.recipe import Recipe
from fire_llm.experiment.recipe.sections import as_list
from fire_llm.experiment.sources import MODEL, TOKENIZER, Hashes, Source, changes, hashes
from fire_llm.models import (
    PRESETS,
    config_for,
    copied_config,
    fresh_model,
    load_model,
    load_tokenizer,
    model_on_meta,
    new_config,
    with_attention,
)
from fire_llm.resets import ResetSpec


class RunContext:
    """Resolve what the stages of a run share, each thing once, when it is first asked for.

    Args:
        recipe: From `load_recipe`.
        folder: The run's; `runs/NAME` by default.
        progress: Show what takes long. Of several ranks, only the first shows anything.
        known: The hashes that another context of the same command returned from `known`; they are not computed again.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path | None = None,
        progress: bool = False,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.folder = recipe, Path(folder or Path("runs") / recipe.name)
        self._progress = progress
        self._known = known or {}
        self._corpora: dict[str, Corpus] = {}
        self._tokens: dict[tuple[str, str], TokenFile] = {}
        self._places: dict[str, str] = dict(self._known.get("places", {}))
        self._token_files: dict[Path, tuple[int, ...]] = {}
        """Token files in use, with their state when they were opened."""

    @property
    def progress(self) -> bool:
        """Return whether this process shows anything."""
        return self._progress and ranks().is_main_process

    def corpus(self, name: str) -> Corpus:
        """Return the corpus of a name; its text is neither read nor hashed here."""
        if name not in self._corpora:
            corpus = resolve(name, self.recipe.corpora.get(name), Path(self.recipe.data_root))
            self._corpora[name] = replace(corpus, expected=self._known.get("corpora", {}).get(name))
        return self._corpora[name]

    def known(self) -> dict[str, Any]:
        """Return the hashes of all that the run reads from outside, as plain data, for other processes of a command."""
        names = dict.fromkeys([*self.recipe.corpus_names(), *self.tokenizer_corpora])
        corpora = {name: self.corpus(name).fingerprint for name in names}
        return {"files": self.files, "places": self._places, "corpora": corpora}

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Where {model, tokenizer} are read from, without what the run makes itself."""
        section, tokenizer = self.recipe.model, self.recipe.tokenizer
        trained = tokenizer is not None and tokenizer.train is not None
        sources = {
            "model": Source("model", section.checkpoint or "", MODEL),
            "tokenizer": Source("tokenizer", (tokenizer and tokenizer.path) or section.checkpoint or "", TOKENIZER),
        }
        if isinstance(section.config, str):
            folder, file = os.path.split(section.config)
            is_file = os.path.isfile(section.config)
            place, pattern = (folder or ".", escape(file)) if is_file else (section.config, CONFIG)
            sources["model"] = Source("model", place, (pattern,))
        return {what: s for what, s in sources.items() if s.name and not (trained and what == "tokenizer")}

    @cached_property
    def files(self) -> dict[str, Hashes]:
        """The hashes of the files of {model, tokenizer}, without what the run makes itself."""
        known: dict[str, Hashes] | None = self._known.get("files")
        return known if known is not None else {what: self._hashes(what) for what in self._sources}

    def _hashes(self, what: str) -> Hashes:
        source = self._sources[what]
        return hashes(f"{what} '{source.name}'", self._place(what), source.patterns)

    def _place(self, what: str) -> str:
        if what not in self._places:
            if what == "model":
                _ = self.planned_config  # it has the better message for an unknown name
            self._places[what] = self._sources[what].folder()
        return self._places[what]

    @contextmanager
    def reading(self, what: str) -> Iterator[str]:
        """Yield the folder that the model or the tokenizer is loaded from; refuse changed files before and after.

        Args:
            what: `model` or `tokenizer`.

        Raises:
            UserError: A file is not what it was when the command began.
        """
        self._refuse_changed_source(what)
        yield self._place(what)
        self._refuse_changed_source(what)

    def _refuse_changed_source(self, what: str) -> None:
        for change in changes({what: self.files[what]}, {what: self._hashes(what)}):
            raise UserError(
                f"'{self._sources[what].name}' is not what it was when this command began: {change}. Put it back, or "
                "give the command again: what was begun with the old one is then named"
            )

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
        """The settings of the recipe that the weights of every stage depend on, as plain data."""
        named = {"tokenizer", "batch", "evaluate", "log_every_steps"}
        common = self.recipe.model_dump(mode="json", include=named)
        if self.recipe.attention != "auto":
            common["attention"] = self.recipe.attention
        if self.recipe.reduce_precision != "fp32":
            common["reduce_precision"] = self.recipe.reduce_precision
        # "auto" may mean another thing on another machine.
        precision = resolve_precision(self.recipe.precision)
        return {"model": self.recipe.model.identity(), **common, "precision": precision}

    @cached_property
    def planned_config(self) -> Any:
        """The transformers config of the model, made without its tokenizer; its shapes are those of `config`.

        The size of a tokenizer on the Hub is not looked up: `models.VOCABULARY` is assumed.
        """
        section = self.recipe.model
        place = section.config if isinstance(section.config, str) else section.checkpoint
        return self._config(None, place)

    @cached_property
    def sizes(self) -> Sizes | None:
        """The sizes of the model that memory depends on; None if its config does not tell them."""
        return sizes(model_on_meta(self.planned_config))

    @cached_property
    def _local_tokenizer(self) -> Any:
        """The tokenizer, to plan with, if it lies in a folder; None if it has to be downloaded or trained."""
        path = str(self.recipe.tokenizer and self.recipe.tokenizer.path)
        return load_tokenizer(path) if os.path.isdir(path) else None

    def _config(self, tokenizer: Any, place: str | None) -> Any:
        """Return the config of the model for a tokenizer; `place` is where its checkpoint or config lies."""
        section = self.recipe.model
        options: dict[str, Any] = {"tokenizer": tokenizer, "context": section.context, "dropout": section.dropout}
        if isinstance(section.config, str):
            return copied_config(str(place), **options)
        options["overrides"] = section.config
        follows = section.architecture or PRESETS.get(section.preset or "", {}).get("vocab_size", 1) is None
        if follows and tokenizer is None and self.recipe.tokenizer is not None:
            options |= {"tokenizer": self._local_tokenizer, "vocabulary": self.recipe.tokenizer.train}
        if section.architecture is not None:
            return new_config(section.architecture, **options)
        return config_for(section.preset or str(place), **options)

    @cached_property
    def sequence_length(self) -> int:
        """Tokens a sequence: the recipe's `model.context`, else what `choose_context` chooses."""
        return choose_context(self.planned_config, self.recipe.model.context, "model.context")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer: the one that the recipe names, the model's own, or one that is trained here once."""
        section = self.recipe.tokenizer
        if section is None or section.train is None:
            with self.reading("tokenizer") as place:
                return load_tokenizer(place)
        own = self.folder / "tokenizer"
        corpora = [self.corpus(name) for name in self.tokenizer_corpora]
        origin = {"vocabulary": section.train, "corpora": {c.name: c.fingerprint for c in corpora}}
        if not own.exists() and ranks().is_main_process:
            with held(lock_of(self.folder, "tokenizer"), wait=True):
                if not own.exists():  # the process that held the lock may have trained it
                    trained = train_tokenizer(corpora, section.train, progress=self.progress)
                    with staged(own) as partial:
                        trained.save_pretrained(partial)
                        write_json(partial / "trained_on.json", origin)
                        write_manifest(partial)
        ranks().wait_for_everyone()
        if (own / MANIFEST).exists() and (wrong := damage(own)):  # the first versions listed no files
            raise UserError(
                f"'{own}' is damaged: {wrong}. Put back a copy of it, or delete it: the same command trains it again"
            )
        if read_json(own / "trained_on.json", f"delete '{own}', which is then trained again") != origin:
            raise UserError(
                f"'{own}' was trained for another recipe or on other text: choose another --output, "
                "or delete the run's folder"
            )
        return load_tokenizer(own)

    @cached_property
    def config(self) -> Any:
        """The transformers config of the model."""
        given = self.recipe.model.config
        if "model" not in self._sources:
            return self._config(self.tokenizer, None)
        tokenizer = self.tokenizer
        with self.reading("model") as place:
            return self._config(tokenizer, given if isinstance(given, str) and os.path.isfile(given) else place)

    def first_model(self, seed: int, attention: str | None = None) -> Any:
        """Return the model that the run begins with, in fp32: its checkpoint, or new weights drawn from a seed.

        Args:
            seed: The seed of new weights.
            attention: `attn_implementation`; None: transformers' choice.
        """
        if self.recipe.model.checkpoint is None:
            return fresh_model(with_attention(self.config, attention), seed)
        with self.reading("model") as place:
            return load_model(place, torch.float32, config=self.config, attention=attention)

    def tokens(self, corpus: str, split: str) -> TokenFile:
        """Return a corpus as tokens; it is tokenised if no cache holds them."""
        key = (corpus, split)
        _ = self.config  # this refuses a tokenizer that does not fit the model, before text is tokenised for hours
        if key not in self._tokens:
            tokens = tokenize_corpus(self.corpus(corpus), self.tokenizer, split, progress=self.progress)
            if self.recorded.get(corpus, {}).get(split, tokens.content) != tokens.content:
                raise UserError(
                    f"corpus '{corpus}' ({split}): '{tokens.path}' holds other tokens than a stage of '{self.folder}' "
                    "was begun with, of the same text: the tokenizer, or the library that it comes with, has changed, "
                    "or a version of fire_llm before 0.3 read it by its class and not by its tokenizer.json. Choose "
                    "another --output; or put back what changed, and delete that folder of the cache"
                )
            self._tokens[key] = tokens
            self._token_files |= {path: state for path in tokens.files if (state := _state(path)) is not None}
        return self._tokens[key]

    @cached_property
    def recorded(self) -> dict[str, dict[str, str]]:
        """The hashes of the tokens that the run's stages were begun with: {corpus: {split: hash}}."""
        hashes: dict[str, dict[str, str]] = {}
        for path in [*self.folder.glob("*/seed-*/unit.json"), *self.folder.glob("*/*/seed-*/unit.json")]:
            # A damaged file is refused by `stages`.
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                unit = json.loads(path.read_text(encoding="utf-8"))
                if unit["tokenizer"] == self.settings["tokenizer"]:
                    for corpus, splits in unit["tokens"].items():
                        if unit["corpora"].get(corpus) == self.corpus(corpus).fingerprint:
                            hashes.setdefault(corpus, {}).update(splits)
        return hashes

    def refuse_changed_tokens(self) -> None:
        """Refuse to go on if a token file in use was written to. A deleted or replaced one is still in memory.

        Raises:
            UserError: Naming the file.
        """
        for path, before in self._token_files.items():
            now = _state(path)
            if now is not None and now[:2] == before[:2] and now != before:
                raise UserError(
                    f"'{path}' was written to while it was in use, and nothing was saved since. Delete the folder, or "
                    "put the file back where it is your own: the same command then goes on from the newest checkpoint"
                )

    def held_out(self, corpus: str) -> TokenFile:
        """Return the part of a corpus's held-out text that the recipe measures on."""
        return self.tokens(corpus, "validation").first(self.recipe.evaluate.max_tokens)

    def release(self) -> None:
        """Free the memory of tokenizer, config and tokens; they are made again when they are asked for."""
        self._tokens.clear()
        self._token_files.clear()
        for name in ("tokenizer", "config", "planned_config"):
            self.__dict__.pop(name, None)


def _state(path: Path) -> tuple[int, ...] | None:
    """Return device, inode, size and modification time of a file; None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
