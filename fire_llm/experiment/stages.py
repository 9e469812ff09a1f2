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
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fire_llm.architectures.attention import refuse_attention
from fire_llm.architectures.context import refuse_length
from fire_llm.core.atomic import AVERAGED, CONTINUAL_STATE, checkpoints, read_json, step_of
from fire_llm.core.errors import UserError, check_all, did_you_mean
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.hashing import digest
from fire_llm.core.manifest import STATES, TRAINER_STATE, damage, read_state, weights_hash
from fire_llm.experiment.batch import split_batch
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import PhaseSection, Recipe, optimizer_of
from fire_llm.experiment.sources import changes
from fire_llm.models import model_on_meta
from fire_llm.resets import FORMER, ResetSpec
from fire_llm.resets.plan import slices_of
from fire_llm.resets.unfound import refuse_unfound

MOST_STAGES = 2_000
"""A recipe may have this many stages. The limit is needed because a few lines of warm starts and seeds multiply."""

LONGEST_NAME = 255
"""File systems take no more characters for the name of a folder."""

STORED = {name: former for former, name in FORMER.items()}
"""Methods whose former name `unit.json` holds: older runs stored it, and the digests of later stages depend on it."""

PASSES = {"batch": None, "evaluate": None}
"""Sections whose `sequences_per_device` cuts the same tokens into smaller or larger forward passes."""

RECORDED = {"files", "tokens", "weights", "reset"}
"""Keys of `unit.json` that are not the recipe's: hashes of what the stage began with, and of what it wrote."""

REPORT = "reset.json"
"""File in a stage's folder that says what its reset did."""

_LATER = {"include": (), "layers": "", "patterns": (), "when": None, "found": None}
"""Fields of a reset that older runs' `unit.json` lacks, with their defaults. A field at its default is not stored.

The strength of `fire` and `rescale` is not stored either where it is 1."""

_STORED_ELSEWHERE = {"arms", "keep", "start_from", "optimizer"}
"""Keys of a phase that the section `phase` of `unit.json` leaves out."""

_ABSENT = object()
"""Stands for the value of a key that is missing in `unit.json` or in the recipe."""


@dataclass(frozen=True)
class Stage:
    """One phase, for one arm, one warm start and one seed."""

    run: RunContext = field(repr=False, compare=False)
    phase: PhaseSection
    arm: str | None
    resets: tuple[ResetSpec, ...]
    seed: int
    parent: Stage | None
    start: str
    """Which of the parent's checkpoints: final, best or a number of steps."""
    folder: str
    """Relative to the run's."""

    @property
    def title(self) -> str:
        """Return the stage's name for people: `owt-wiki / fire`."""
        return self.folder.replace("/", " / ").removesuffix(f" / seed-{self.seed}")

    @property
    def recipe_arm(self) -> str:
        """Return the arm's name in the recipe, without its warm start; empty for a phase without arms."""
        return (self.arm or "").partition("@")[0]

    @property
    def start_name(self) -> str:
        """Return the warm start as the folder names it: the checkpoint's label, after its stage's name where needed."""
        name = self.folder.removeprefix(f"{self.phase.name}/").removesuffix(f"seed-{self.seed}").rstrip("/")
        return (name.partition("@")[2] if self.arm else name) or self.start

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Everything that the weights depend on: the content of `unit.json`. Text, model and tokenizer are hashed."""
        return self.spec_in_passes({})

    def spec_in_passes(self, passes: Mapping[str, int | None]) -> dict[str, Any]:
        """Return `spec` as it would be with these `sequences_per_device` of the sections in `PASSES`."""
        parent = None
        if self.parent is not None:
            parent = self.parent.spec_in_passes(passes) if passes else self.parent.spec
        fingerprints = {name: self.run.corpus(name).fingerprint for name in self._corpora}
        described = self._described(fingerprints, parent, passes)
        return {**described, "files": self.run.files} if self.run.files else described

    @cached_property
    def lock(self) -> str:
        """Return the name of the lock that a process holds while it writes the checkpoints of this or a duplicate."""
        return self.key(self.spec_in_passes(PASSES))

    @cached_property
    def outline(self) -> dict[str, Any]:
        """`spec` with the settings of the corpora in place of the hashes of their text, so that nothing is read."""
        given, root = self.run.recipe.corpora, self.run.recipe.data_root
        settings = {name: [root, given[name].model_dump() if name in given else None] for name in self._corpora}
        return self._described(settings, self.parent.outline if self.parent else None, {})

    def key(self, described: dict[str, Any]) -> str:
        """Return a digest that stages share, also across trials, if they end with the same checkpoints.

        Args:
            described: The stage's `spec`, or its `outline`, which needs no hashes.
        """
        # `keep` and `nonfinite` are not in the spec, but they change what a folder holds.
        identity = [described, self.phase.keep, self.run.recipe.nonfinite]
        return digest(json.dumps(identity, sort_keys=True), 12)

    @property
    def _corpora(self) -> Iterable[str]:
        return dict.fromkeys([*self.phase.data, *self.run.recipe.evaluated(), *self.run.tokenizer_corpora])

    def _described(
        self, corpora: Mapping[str, Any], parent: dict[str, Any] | None, passes: Mapping[str, int | None]
    ) -> dict[str, Any]:
        # The digest leaves files out: they are compared stage by stage, and older runs list none.
        parent_spec = {key: value for key, value in (parent or {}).items() if key != "files"}
        origin = digest(json.dumps(parent_spec, sort_keys=True), 16) if parent else None
        settings = self.run.settings
        spec = {
            **settings,
            **{section: {**settings[section], "sequences_per_device": n} for section, n in passes.items()},
            "optimizer": optimizer_of(self.run.recipe, self.phase).identity(),
            "phase": {key: value for key, value in self.phase.identity().items() if key not in _STORED_ELSEWHERE},
            "corpora": corpora,
            "seed": self.seed,
            "resets": [_stored(r) for r in self.resets],
            "start": origin and {"from": origin, "checkpoint": self.start},
        }
        plain: dict[str, Any] = json.loads(json.dumps(spec))
        return plain


def _stored(reset: ResetSpec) -> dict[str, Any]:
    """Return a reset as `unit.json` holds it."""
    fields = {key: value for key, value in vars(reset).items() if key not in _LATER or value != _LATER[key]}
    if reset.method in ("fire", "rescale") and reset.options["strength"] == 1:
        fields["options"] = {key: value for key, value in reset.options.items() if key != "strength"}
    # No language model has a convolution with this role.
    fields["roles"] = [role for role in reset.roles if role != "conv"]
    return {**fields, "method": STORED.get(reset.method, reset.method)}


def expand(run: RunContext) -> list[Stage]:
    """Return the stages of a run, parents before children."""
    stages: list[Stage] = []
    by_source: dict[tuple[str, int], list[Stage]] = {}
    previous: PhaseSection | None = None
    for phase in run.recipe.phases:
        arms: list[tuple[str | None, tuple[ResetSpec, ...]]] = [*run.arms[phase.name].items()] or [(None, ())]
        for (arm, resets), seed in itertools.product(arms, run.recipe.seed):
            starts: list[tuple[Stage | None, str]] = []
            for source, labels in _sources(phase, previous, arm).items():
                parents = by_source[(source, seed)] if source else [None]
                starts += [(parent, str(label)) for parent in parents for label in labels]
            if len(stages) + len(starts) > MOST_STAGES:
                raise UserError(
                    f"phases: more than {MOST_STAGES:,} stages (phases × arms × warm starts × seeds); take some away"
                )
            for parent, start in starts:
                name = "@".join(filter(None, [arm, _start_name(starts, parent, start)])) or None
                folder = "/".join(filter(None, [phase.name, name, f"seed-{seed}"]))
                stage = Stage(run, phase, arm and name, resets, seed, parent, start, folder)
                stages.append(stage)
                by_source.setdefault((f"{phase.name}/{arm}" if arm else phase.name, seed), []).append(stage)
        previous = phase
    _refuse_folders(stages)
    return stages


def check_resets(stages: Iterable[Stage]) -> None:
    """Refuse resets whose patterns or layers find nothing in the model, as its config describes it.

    Raises:
        UserError: Naming the arm, the pattern and the names nearest to it; or `check_kernels`.
    """
    stages = list(stages)
    models: dict[RunContext, Any] = {}

    def find(run: RunContext, phase: str, arm: str, reset: ResetSpec) -> None:
        if run not in models:
            models[run] = model_on_meta(run.planned_config)
        try:
            refuse_unfound([reset], slices_of(models[run], [reset], reset.kind))
        except UserError as error:
            raise UserError(f"phase '{phase}', arm '{arm}': {error}") from error

    # An arm has the same resets from each of its starts.
    arms = {(stage.run, stage.phase.name, stage.recipe_arm): stage.resets for stage in stages}
    check_all(
        *(partial(check_kernels, run) for run in dict.fromkeys(stage.run for stage in stages)),
        *(partial(find, *arm, reset) for arm, resets in arms.items() for reset in resets if reset.selection),
    )


def check_kernels(run: RunContext) -> None:
    """Refuse an attention, a checkpointing of activations or a context that model or machine cannot train with.

    Raises:
        UserError: Naming the key, and what to set.
    """
    recipe = run.recipe
    refuse_length(run.planned_config, run.sequence_length)
    if recipe.attention == "auto" and not recipe.gradient_checkpointing:
        return
    model = model_on_meta(run.planned_config)
    if recipe.attention != "auto":
        half = resolve_precision(recipe.precision) != "fp32"
        refuse_attention(recipe.attention, model, half=half, document_mask=recipe.batch.document_mask)
    if recipe.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it; remove the key")


def _refuse_folders(stages: list[Stage]) -> None:
    """Refuse names of folders that a file system cannot hold, or cannot tell apart."""
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
    """Refuse links out of a run's folder: through them, a run would write or delete files that are not its own.

    Raises:
        UserError: Naming the link and where it leads.
    """
    root = folder.resolve()
    files = [folder / ".lock", *folder.glob("*.json*"), *folder.glob("*.html"), *folder.glob("*.partial")]
    folders = [folder / n for n in ("tokenizer", ".locks", ".workers", *(stage.folder for stage in stages))]
    content = (Path(parent, n) for top in folders for parent, dirs, names in os.walk(top) for n in (*dirs, *names))
    for path in itertools.chain(files, folders, filter(Path.is_symlink, content)):
        if not (target := Path(os.path.realpath(path))).is_relative_to(root):
            raise UserError(
                f"'{path}' leads out of the run's folder, to '{target}': remove the link. A whole run may "
                "lie elsewhere (--output), parts of it may not"
            )


def refuse_other_recipe(folder: Path, stages: Sequence[Stage], beside: Iterable[Stage] = ()) -> None:
    """Compare each stage with what its folder was begun with: the recipe, the files, the weights of its parent.

    Another number of sequences a forward pass is no difference, because a step has the same tokens.

    Args:
        folder: The run's.
        stages: Stages that are to be trained or skipped.
        beside: Other stages of the run, whose results stand in the same tables. They may be of another recipe, but
            must have the same text, files and parents.

    Raises:
        UserError: Naming the first stage that differs and everything that changed.
    """
    chosen = {stage.folder for stage in stages}
    for stage in (*stages, *(stage for stage in beside if stage.folder not in chosen)):
        before = read_unit(folder / stage.folder)
        if before is None:
            continue
        changed = _changed_settings(before, stage) if stage.folder in chosen else _changed_text(before, stage)
        recipe = "another recipe" if changed else "other files"
        changed += changes(before.get("files"), stage.run.files)
        if stage.parent is not None and "weights" in before:
            with suppress(UserError):  # the parent is to be trained again
                start = labelled_checkpoint(folder / stage.parent.folder, stage.start)
                if weights_hash(start) != before["weights"]:
                    changed.append(f"'{start}', which it starts from, has other weights")
        if changed:
            raise UserError(
                f"'{folder / stage.folder}' was begun with {recipe}:\n  " + "\n  ".join(changed) + "\n"
                "Choose another --output, put back what it was, or delete that folder to train it again"
            )


def changes_without_text(folder: Path, stage: Stage) -> list[str]:
    """Return how a recipe differs from the one that a stage was begun with, as far as that shows before text is read.

    Args:
        folder: The stage's.
        stage: As the recipe has it now.
    """
    before = read_unit(folder)
    if before is None:
        return []

    def comparable(spec: dict[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in spec.items() if key not in RECORDED | {"corpora", "start"}}
        for section in PASSES:
            known[section] = {k: v for k, v in (known.get(section) or {}).items() if k != "sequences_per_device"}
        return known

    return list(_differences(comparable(before), comparable(stage.outline)))


def _changed_settings(before: dict[str, Any], stage: Stage) -> list[str]:
    """Return how the recipe differs from the one in `unit.json`, whatever the sequences of a forward pass."""
    now = stage.spec
    with suppress(KeyError, TypeError):  # a unit.json without these sections differs anyway
        passes = {section: before[section]["sequences_per_device"] for section in PASSES}
        if passes != {section: now[section]["sequences_per_device"] for section in PASSES}:
            now = stage.spec_in_passes(passes)
    then, now = ({key: value for key, value in spec.items() if key not in RECORDED} for spec in (before, now))
    return list(_differences(then, now))


def _changed_text(before: dict[str, Any], stage: Stage) -> list[str]:
    """Return which corpora of both the recipe and `unit.json` hold another text."""
    then, now = before.get("corpora"), stage.spec["corpora"]
    return list(_differences({**now, **then}, {**then, **now}, "corpora")) if isinstance(then, dict) else []


def read_unit(folder: Path) -> dict[str, Any] | None:
    """Return the `unit.json` of a stage's folder; None if the stage was not begun.

    Raises:
        UserError: It is damaged.
    """
    path = folder / "unit.json"
    return read_json(path, f"delete '{folder}' to train that stage again") if path.exists() else None


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield in words each value that differs, with the path of its keys."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key, _ABSENT), after.get(key, _ABSENT), below)
    elif before != after:
        then, now = ("absent" if value is _ABSENT else json.dumps(value) for value in (before, after))
        yield f"{path}: {then} then, {now} now"


def _start_name(starts: list[tuple[Stage | None, str]], parent: Stage | None, start: str) -> str:
    """Return the name of one of several warm starts: the checkpoint's label, after its stage's name where needed."""
    if len(starts) == 1 or parent is None:
        return ""
    several = len({other.folder for other, _ in starts if other}) > 1
    origin = parent.folder.rpartition("/seed-")[0].replace("/", "-")
    return f"{origin}-{start}" if several else start


def _sources(phase: PhaseSection, previous: PhaseSection | None, arm: str | None) -> dict[str, list[Any]]:
    """Return what a phase starts from: {phase or phase/arm: checkpoint labels}; {"": …} for the initial weights."""
    if phase.start_from is not None:
        return phase.start_from
    if previous is None:
        return {"": ["initial"]}
    return {f"{previous.name}/{arm}" if previous.arms else previous.name: ["final"]}


def select(stages: list[Stage], arms: Iterable[str]) -> list[Stage]:
    """Return the stages of the named arms and those that they start from.

    Raises:
        UserError: The recipe has no such arm.
    """
    wanted = list(arms)
    known = list(dict.fromkeys(stage.recipe_arm for stage in stages if stage.arm))
    for arm in wanted:
        if arm not in known:
            raise UserError(f"--arm: the recipe has no arm '{arm}'.{did_you_mean(arm, known)} Arms: {', '.join(known)}")
    if not wanted:
        return stages
    chosen: set[str] = set()
    for stage in reversed(stages):
        if stage.folder in chosen or (stage.arm and stage.recipe_arm in wanted):
            chosen.add(stage.folder)
            if stage.parent:
                chosen.add(stage.parent.folder)
    return [stage for stage in stages if stage.folder in chosen]


def final_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of a stage; None if the stage is not finished or the checkpoint's state is damaged."""
    complete = checkpoints(folder)
    if not complete:
        return None
    newest, step = complete[-1]
    if damage(newest, only=STATES):
        return None
    reached_end = step >= read_state(newest, TRAINER_STATE)["max_steps"]
    return newest if reached_end or read_state(newest, CONTINUAL_STATE).get("stopped") else None


def finished(folder: Path) -> bool:
    """Return whether a stage is finished and no file of its last checkpoint was lost, cut or changed."""
    final = final_checkpoint(folder)
    return final is not None and damage(final, contents=False) is None


def labelled_checkpoint(folder: Path, label: str) -> Path:
    """Return a finished stage's checkpoint by its label: final, best, ema or a number of steps.

    Raises:
        UserError: The stage is not finished, or it kept no such checkpoint.
    """
    final = final_checkpoint(folder)
    if final is None:
        raise UserError(f"'{folder}' is not finished, or its last checkpoint is damaged: run its phase first")
    if label == "final":
        return final
    step = read_state(final, TRAINER_STATE)["best_global_step"] if label == "best" else label
    path = final / AVERAGED if label == AVERAGED else folder / f"checkpoint-{step}"
    if not path.is_dir():
        raise UserError(f"'{folder}' kept no checkpoint '{label}': add it to that phase's keep, and run it again")
    return path


def kept_checkpoints(stage: Stage) -> dict[Path, list[str]]:
    """Return the checkpoints of a finished stage that its recipe keeps, and their labels, by step."""
    kept: dict[Path, list[str]] = {}
    for label in [*map(str, stage.phase.keep), AVERAGED, "final"]:
        with suppress(UserError):  # a checkpoint that the recipe was told to keep after the phase had ended
            kept.setdefault(labelled_checkpoint(stage.run.folder / stage.folder, label), []).append(label)
    return dict(sorted(kept.items(), key=lambda item: (step_behind(item[0]), item[0].name != AVERAGED)))


def step_behind(checkpoint: Path) -> int:
    """Return the step of a checkpoint; an average of weights has that of the checkpoint it lies in."""
    return step_of(checkpoint.parent if checkpoint.name == AVERAGED else checkpoint) or 0


def check_processes(recipe: Recipe, world: int, arms: Iterable[str] = ()) -> None:
    """Check, before processes are started, what all of them would fail at.

    Raises:
        UserError: For an unknown arm, or a batch that does not divide.
    """
    run = RunContext(recipe)
    select(expand(run), arms)
    split_batch(run, world, memory=0)  # asks no GPU: this process may fork
