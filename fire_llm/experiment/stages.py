"""The stages of a run: one phase, for one arm, one warm start and one seed, in a folder of its own.

    OUTPUT/
      recipe.json
      tokenizer/                              where the recipe trains one
      PHASE/seed-1/checkpoint-300/            a phase without arms
      PHASE/ARM/seed-1/checkpoint-300/        an arm; ARM@START where there are several warm starts
      results.json, report.html

A stage is finished when its last checkpoint is there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fire_llm.architectures.context import choose_context
from fire_llm.core.atomic import checkpoints
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hardware import accelerator_memory, resolve_precision
from fire_llm.data.corpora import Corpus, resolve
from fire_llm.experiment.recipe import PhaseSection, Recipe, optimizer_of
from fire_llm.models import PRESETS, config_for
from fire_llm.resets import ResetSpec

MOST_UNITS = 2_000
"""Of a recipe: a few lines of warm starts and seeds multiply."""

LONGEST_NAME = 255
"""Characters of a folder's name; file systems take no more."""

_ABSENT = object()
"""Marks a key that a stage's folder, or the recipe, does not have."""


@dataclass(frozen=True)
class Stage:
    """One phase, for one arm, one warm start and one seed."""

    phase: PhaseSection
    arm: str | None
    resets: tuple[ResetSpec, ...]
    seed: int
    parent: Stage | None
    start: str
    """Which of the parent's checkpoints: final, best or a number of steps."""
    folder: str
    """Relative to the run's output."""
    spec: dict[str, Any] = field(hash=False, compare=False)
    """Everything that the weights depend on."""

    @property
    def title(self) -> str:
        """Name the stage for people: `owt-wiki / fire`."""
        return self.folder.replace("/", " / ").removesuffix(f" / seed-{self.seed}")


def expand(recipe: Recipe) -> list[Stage]:
    """Return the stages of a recipe, parents before children."""
    common = recipe.model_dump(mode="json", include={"model", "tokenizer", "batch", "evaluate", "log_every_steps"})
    common["precision"] = resolve_precision(recipe.precision)  # "auto" may mean another thing on another machine
    lexicon = tokenizer_corpora(recipe)
    fingerprints = {name: corpus_of(recipe, name).fingerprint for name in [*recipe.corpus_names(), *lexicon]}
    stages: list[Stage] = []
    by_source: dict[tuple[str, int], list[Stage]] = {}
    previous: PhaseSection | None = None
    for phase in recipe.phases:
        shared = {
            **common,
            "optimizer": optimizer_of(recipe, phase).model_dump(mode="json"),
            "phase": phase.model_dump(mode="json", exclude={"arms", "keep", "start_from", "optimizer"}),
            "corpora": {c: fingerprints[c] for c in dict.fromkeys([*phase.data, *recipe.evaluated(), *lexicon])},
        }
        arms: list[tuple[str | None, list[ResetSpec]]] = [*recipe.arms(phase).items()] or [(None, [])]
        for (arm, resets), seed in itertools.product(arms, recipe.seed):
            starts: list[tuple[Stage | None, str]] = []
            for source, labels in _sources(phase, previous, arm).items():
                parents = by_source[(source, seed)] if source else [None]
                starts += [(parent, str(label)) for parent in parents for label in labels]
            if len(stages) + len(starts) > MOST_UNITS:
                raise UserError(
                    f"phases: more than {MOST_UNITS:,} stages (phases × arms × warm starts × seeds); take some away"
                )
            for parent, start in starts:
                name = "@".join(filter(None, [arm, _start_name(starts, parent, start)])) or None
                spec = {
                    **shared,
                    "seed": seed,
                    "resets": [vars(r) for r in resets],
                    "start": {"from": _digest(parent.spec), "checkpoint": start} if parent else None,
                }
                folder = "/".join(filter(None, [phase.name, name, f"seed-{seed}"]))
                stage = Stage(
                    phase, arm and name, tuple(resets), seed, parent, start, folder, json.loads(json.dumps(spec))
                )
                stages.append(stage)
                by_source.setdefault((f"{phase.name}/{arm}" if arm else phase.name, seed), []).append(stage)
        previous = phase
    _refuse_folders(stages)
    return stages


def _refuse_folders(stages: list[Stage]) -> None:
    """Refuse folders that a file system would not take, or take for one another."""
    by_name: dict[str, Stage] = {}
    for stage in stages:
        if stage.folder.lower() in by_name:
            raise UserError(f"phases: two stages would share the folder '{stage.folder}'; rename a phase or an arm")
        by_name[stage.folder.lower()] = stage
        if len(max(stage.folder.split("/"), key=len)) > LONGEST_NAME:
            raise UserError(
                f"phases: the folder '{stage.folder}' has too long a name; shorten names of phases and arms"
            )


def refuse_links(folder: Path, stages: Iterable[Stage]) -> None:
    """Refuse a run's folder in which something leads out of it: what is written there, or deleted, lies elsewhere.

    Raises:
        UserError: Naming the place and where it leads.
    """
    root = folder.resolve()
    for place in [folder / "tokenizer", *(folder / stage.folder for stage in stages)]:
        if not place.resolve().is_relative_to(root):
            raise UserError(
                f"'{place}' leads out of the run's folder, to '{place.resolve()}': remove the link. A whole run may "
                "lie elsewhere (--output), parts of it may not"
            )


def refuse_other_recipe(folder: Path, stages: list[Stage]) -> None:
    """Compare each stage with what its folder was begun with.

    Raises:
        UserError: Naming the first stage that differs and every key that changed.
    """
    for stage in stages:
        path = folder / stage.folder / "unit.json"
        if not path.exists():
            continue
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"'{path}' is damaged: delete '{path.parent}' to train that stage again") from error
        changed = list(_differences(before, stage.spec))
        if changed:
            raise UserError(
                f"'{folder / stage.folder}' was begun with another recipe:\n  " + "\n  ".join(changed) + "\n"
                "Choose another --output, put the recipe back, or delete that folder to train it again"
            )


def _differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            path = f"{at}.{key}" if at else str(key)
            yield from _differences(before.get(key, _ABSENT), after.get(key, _ABSENT), path)
    elif before != after:
        then, now = ("absent" if value is _ABSENT else json.dumps(value) for value in (before, after))
        yield f"{at}: {then} then, {now} now"


def _start_name(starts: list[tuple[Stage | None, str]], parent: Stage | None, start: str) -> str:
    """Name a warm start among several: its checkpoint's label, behind its stage's name where stages differ too."""
    if len(starts) == 1 or parent is None:
        return ""
    several = len({other.folder for other, _ in starts if other}) > 1
    origin = parent.folder.rpartition("/seed-")[0].replace("/", "-")
    return f"{origin}-{start}" if several else start


def tokenizer_corpora(recipe: Recipe) -> list[str]:
    """Return the corpora that the recipe's tokenizer is trained on; none where it is given."""
    if recipe.tokenizer is None or recipe.tokenizer.train is None:
        return []
    return recipe.tokenizer.corpora or list(recipe.phases[0].data)


def _sources(phase: PhaseSection, previous: PhaseSection | None, arm: str | None) -> dict[str, list[Any]]:
    """Return what a phase starts from: {phase or phase/arm: checkpoint labels}; {"": …} for the step-0 weights."""
    if phase.start_from is not None:
        return phase.start_from
    if previous is None:
        return {"": ["initial"]}
    return {f"{previous.name}/{arm}" if previous.arms else previous.name: ["final"]}


def _digest(spec: Any) -> str:
    return blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=16).hexdigest()


def corpus_of(recipe: Recipe, name: str) -> Corpus:
    """Resolve one of a recipe's corpora."""
    return resolve(name, recipe.corpora.get(name), Path(recipe.data_root))


def select(stages: list[Stage], arms: Iterable[str]) -> list[Stage]:
    """Return the stages of the named arms and those that they start from.

    Raises:
        UserError: For an arm that the recipe has not.
    """
    wanted = list(arms)
    known = list(dict.fromkeys(u.arm.partition("@")[0] for u in stages if u.arm))
    for arm in wanted:
        if arm not in known:
            raise UserError(f"--arm: the recipe has no arm '{arm}'.{did_you_mean(arm, known)} Arms: {', '.join(known)}")
    if not wanted:
        return stages
    chosen: set[str] = set()
    for stage in reversed(stages):
        if stage.folder in chosen or (stage.arm and stage.arm.partition("@")[0] in wanted):
            chosen.add(stage.folder)
            if stage.parent:
                chosen.add(stage.parent.folder)
    return [u for u in stages if u.folder in chosen]


def final_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of a stage if it is finished."""
    whole = checkpoints(folder)
    if not whole:
        return None
    newest, step = whole[-1]
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    return newest if step >= state["max_steps"] else None


def labelled_checkpoint(folder: Path, label: str) -> Path:
    """Return a finished stage's checkpoint by its label: final, best or a number of steps."""
    final = final_checkpoint(folder)
    if final is None:
        raise UserError(f"'{folder}' is not finished: run its phase first")
    if label == "final":
        return final
    state = json.loads((final / "trainer_state.json").read_text(encoding="utf-8"))
    path = folder / f"checkpoint-{state['best_global_step'] if label == 'best' else label}"
    if not path.is_dir():
        raise UserError(f"'{folder}' kept no checkpoint '{label}': add it to that phase's keep, and run it anew")
    return path


def config_of(recipe: Recipe) -> Any:
    """Return the config of a recipe's model before its tokenizer is there."""
    model = recipe.model
    overrides = dict(model.config)
    preset: dict[str, Any] = PRESETS.get(model.preset or "", {})
    if recipe.tokenizer and recipe.tokenizer.train and preset.get("vocab_size", 1) is None:
        overrides.setdefault("vocab_size", recipe.tokenizer.train)
    return config_for(str(model.preset or model.checkpoint), context=model.context, overrides=overrides)


def context_of(recipe: Recipe, config: Any) -> int:
    """Return the tokens a sequence: the recipe's, else what `choose_context` takes."""
    return choose_context(config, recipe.model.context, "model.context")


def phase_steps(phase: PhaseSection, tokens_per_step: int, epoch_tokens: int) -> int:
    """Return a phase's optimizer steps; an epoch is as many tokens as its corpora hold together."""
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is not None:
        return math.ceil(phase.tokens / tokens_per_step)
    return max(1, int((phase.epochs or 1) * epoch_tokens) // tokens_per_step)


def split_batch(recipe: Recipe, context: int, world: int, memory: int | None = None) -> tuple[int, int]:
    """Return (sequences a forward pass, forward passes a step) of each of `world` ranks.

    Args:
        recipe: Whose batch it is.
        context: Tokens a sequence.
        world: Ranks.
        memory: Bytes of each rank's accelerator, 0 for none; by default, of this machine's.

    Raises:
        UserError: Where the tokens of a step do not divide evenly.
    """
    tokens, given = recipe.batch.tokens_per_step, recipe.batch.sequences_per_device
    if tokens % (context * world):
        near = max(1, round(tokens / (context * world))) * context * world
        raise UserError(
            f"batch.tokens_per_step: {tokens} does not divide into sequences of {context} tokens "
            f"on {world} process(es). The nearest that does is {near}"
        )
    sequences = tokens // (context * world)
    if given is not None and sequences % given:
        raise UserError(
            f"batch.sequences_per_device: {given} does not divide the {sequences} sequences a process has a step"
        )
    if given is None:
        most = max(1, _tokens_at_once(recipe, accelerator_memory() if memory is None else memory) // context)
        given = max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)
    return given, sequences // given


CPU_TOKENS, ACCELERATOR_TOKENS, MOST_TOKENS = 4_096, 16_384, 65_536
"""Tokens of a forward pass: on a CPU, on an accelerator of unknown memory or model, and as many as ever pay."""

KEPT_SHARE = 0.3
"""Of an accelerator's memory, for what a forward pass keeps for its backward pass."""


def _tokens_at_once(recipe: Recipe, memory: int) -> int:
    """Return how many tokens a forward pass takes: more of them fill a GPU better, until its memory is full."""
    if memory == 0:
        return CPU_TOKENS
    kept = kept_a_token(config_of(recipe).get_text_config())
    if memory < 0 or kept is None:
        return ACCELERATOR_TOKENS
    kept *= 2 if resolve_precision(recipe.precision) == "fp32" else 1
    return min(MOST_TOKENS, int(KEPT_SHARE * memory / kept))


def kept_a_token(text: Any) -> int | None:
    """Return the bytes that the layers of a model keep for the backward pass of a token in 16 bits; None if unknown.

    A layer keeps, in fp32, the inputs of two norms; in 16 bits what these give, q, k, v, attention's output (twice:
    the projection reads a copy), and the MLP's inner values before and after its activation.

    Args:
        text: A text model's config.

    Source: counted as Korthikanti et al. do, arXiv 2205.05198, section 4.1, without dropout and scores.
    """
    width, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if width is None or layers is None:
        return None
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    inner = max(inner) if isinstance(inner, list) else inner  # one a layer
    return int(layers * (22 * width + 4 * inner))


def check_processes(recipe: Recipe, world: int, arms: Iterable[str] = ()) -> None:
    """Find, before any process is started, what every one of them would stumble over.

    Raises:
        UserError: For an unknown arm, a corpus that is not there, or a batch that does not divide.
    """
    select(expand(recipe), arms)
    split_batch(recipe, context_of(recipe, config_of(recipe)), world, memory=0)  # asks no GPU: this process may fork
