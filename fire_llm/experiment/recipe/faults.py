"""Find the faults of a recipe, and describe each: the path, the value, what is allowed and the next step."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fire_llm.architectures.context import DEFAULT
from fire_llm.architectures.fresh import architecture_fault
from fire_llm.core.atomic import AVERAGED
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.data.corpora import CorpusSpec, resolve
from fire_llm.experiment.recipe.optimizing import optimizer_faults, optimizer_of
from fire_llm.experiment.recipe.sections import (
    BatchSection,
    EmaSection,
    EvaluateSection,
    GenerateSection,
    HubSection,
    ModelSection,
    OptimizerSection,
    PhaseSection,
    Recipe,
    StopSection,
    TokenizerSection,
    as_list,
)
from fire_llm.models import PRESETS
from fire_llm.resets import RESETS, ResetSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_NAMING = "use at most 64 letters, digits, '.', '_', '+' and '-', a letter or digit first"
_TAKEN = re.compile(r"tokenizer|.*\.(json|html|lock|partial)", re.IGNORECASE)
"""Names that files and folders of a run have, so that no phase may."""


def path_of(loc: Iterable[Any]) -> str:
    """Write a location as `phases[1].arms.fire`."""
    text = ""
    for part in loc:
        if part in ("int", "str", "dict[str,any]"):  # pydantic's names for the branches of a union
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "recipe"


def explain(error: Any) -> str:
    """Return one pydantic error in words that name the value, what is allowed and the next step."""
    kind, value, loc = error["type"], error["input"], error["loc"]
    if kind == "extra_forbidden":
        fields = _fields_at(loc[:-1])
        return f"unknown key.{did_you_mean(str(loc[-1]), fields)} Known: {', '.join(fields)}"
    if kind == "missing":
        return "missing; it has no default"
    if kind in ("float_type", "int_type") and isinstance(value, str):
        wanted = "a number" if kind == "float_type" else "a whole number"
        if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            mantissa, _, exponent = value.lower().partition("e")
            full = mantissa if "." in mantissa else mantissa + ".0"
            sign = exponent if exponent[0] in "+-" else "+" + exponent
            return f"'{value}' is text to YAML, and {wanted} is wanted. Write {full}e{sign}"
        return f"'{value}' is text; {wanted} is wanted"
    if kind == "literal_error":
        allowed = [a.strip("' ") for a in re.split(r", | or ", error["ctx"]["expected"])]
        return f"{value!r} is not allowed.{did_you_mean(str(value), allowed)} Allowed: {', '.join(allowed)}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    in_words = {
        "model_type": f"a mapping; its keys are {', '.join(_fields_at(loc))}",
        "dict_type": "a mapping",
        "list_type": "a list",
        "bool_type": "true or false",
        "too_short": f"a list of at least {error.get('ctx', {}).get('min_length')}",
        "too_long": f"a list of at most {error.get('ctx', {}).get('max_length')}",
    }
    return f"{json.dumps(value, default=str)[:80]} is not allowed: it should be {in_words.get(kind, message)}"


def _fields_at(loc: Iterable[Any]) -> list[str]:
    """Return the keys allowed at a location of the recipe."""
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection, "tokenizer": TokenizerSection, "optimizer": OptimizerSection, "batch": BatchSection,
        "phases": PhaseSection, "evaluate": EvaluateSection, "corpora": CorpusSpec,
        "generate": GenerateSection, "ema": EmaSection, "stop": StopSection,
        "hub": HubSection,
    }  # fmt: skip
    # The innermost section counts: `phases[0].optimizer` is an optimizer.
    innermost = next((part for part in [*loc][::-1] if part in sections), None)
    return list(sections.get(str(innermost), Recipe).model_fields)


def arm_faults(data: Mapping[str, Any], made: bool = False) -> list[str]:
    """Return the faults of every reset of every arm, also if the recipe has other faults.

    Args:
        data: The plain data of the recipe.
        made: Whether a run was made with it; then resets without effect are no fault.
    """
    faults = []
    phases = data.get("phases")
    for i, phase in enumerate(phases if isinstance(phases, list) else []):
        arms = phase.get("arms") if isinstance(phase, Mapping) else None
        for name, arm in arms.items() if isinstance(arms, Mapping) else ():
            if arm == []:
                faults.append(f"phases[{i}].arms.{name}: an empty list resets nothing; write none")
            for j, reset in enumerate(as_list(arm)):
                path = f"phases[{i}].arms.{name}" + (f"[{j}]" if isinstance(arm, list) else "")
                if not isinstance(reset, str | Mapping):
                    faults.append(
                        f"{path}: {reset!r} is no reset; write {{method: NAME}}, NAME one of {', '.join(RESETS)}"
                    )
                    continue
                problems, spec = ResetSpec.check(reset)
                if spec is not None and not made:
                    problems = spec.without_effect()
                faults += [f"{path}.{key}: {message}" for key, message in problems]
    return faults


def contradictions(recipe: Recipe) -> Iterable[str]:
    """Yield the faults of keys that are each right by themselves but contradict each other."""
    if not _NAME.fullmatch(recipe.name):
        yield f"name: '{recipe.name}' names the folder runs/NAME; {_NAMING}"
    yield from _model_contradictions(recipe.model)
    yield from _tokenizer_contradictions(recipe)
    if recipe.gradient_checkpointing and recipe.precision == "bf16-params":
        yield (
            "gradient_checkpointing: layers would be computed again from parameters in fp32, and bf16-params reads "
            "them in bf16; set precision to bf16, or leave one of them out"
        )
    if len(set(recipe.seed)) < len(recipe.seed):
        yield f"seed: {recipe.seed} names a seed twice"
    if recipe.report_to:
        from fire_llm.training.trackers import name_faults  # the trainer takes seconds to import

        yield from name_faults(recipe.report_to)
    common = [*optimizer_faults(recipe.optimizer)]
    yield from common
    yield from _context_contradictions(recipe)
    if recipe.hub is not None:
        yield from _hub_faults(recipe, recipe.hub)
    earlier: dict[str, list[str]] = {}
    for n, phase in enumerate(recipe.phases):
        phase_faults = [fault for fault in optimizer_faults(optimizer_of(recipe, phase)) if fault not in common]
        yield from (f"phases[{n}].{fault}" for fault in [*phase_faults, *_phase_contradictions(recipe, phase, earlier)])
        earlier[phase.name] = [str(k) for k in ["final", *phase.keep, *([AVERAGED] if phase.ema else [])]]
        for arm in phase.arms or {}:
            earlier[f"{phase.name}/{arm}"] = earlier[phase.name]
    yield from _corpus_faults(recipe)


def _tokenizer_contradictions(recipe: Recipe) -> Iterable[str]:
    """Yield why a recipe names no tokenizer, or more than one."""
    tokenizer, beginnings = recipe.tokenizer, recipe.model.beginnings
    if tokenizer is None and recipe.model.checkpoint is None and beginnings:
        article = "an" if beginnings[0] == "architecture" else "a"
        yield (
            f"tokenizer: {article} {beginnings[0]} brings none; give a Hub id or folder, or {{train: VOCABULARY_SIZE}}"
        )
    if tokenizer is not None and (tokenizer.path is None) == (tokenizer.train is None):
        yield "tokenizer: give one of path and train"


def _context_contradictions(recipe: Recipe) -> Iterable[str]:
    """Yield what does not fit the context, if it is known without reading a checkpoint's config."""
    settings = {**PRESETS.get(recipe.model.preset or "", {}), **recipe.model.attributes}
    longest = settings.get("max_position_embeddings", settings.get("n_positions"))
    context = recipe.model.context or (min(longest, DEFAULT) if isinstance(longest, int) and longest > 0 else None)
    if not context:
        return
    tokens = recipe.batch.tokens_per_step
    if tokens % context:
        nearest = max(1, round(tokens / context)) * context
        yield (f"batch.tokens_per_step: {tokens} is not a multiple of the context, {context}. The nearest is {nearest}")
    if recipe.generate and recipe.generate.max_new_tokens >= context:
        yield (
            f"generate.max_new_tokens: {recipe.generate.max_new_tokens} do not fit into the context, {context}, behind "
            f"the token that is read first; give at most {context - 1}, less what the prompts take"
        )


def _corpus_faults(recipe: Recipe) -> Iterable[str]:
    """Yield which corpora are not there, or cannot be used as the recipe asks."""
    tokenizer = recipe.tokenizer
    places = {name: "tokenizer.corpora" for name in (tokenizer.corpora if tokenizer else [])}
    places |= {name: "evaluate.data" for name in recipe.evaluate.data}
    places |= {name: f"phases[{n}].data" for n, phase in enumerate(recipe.phases) for name in phase.data}
    for name, place in places.items():
        try:
            corpus = resolve(name, recipe.corpora.get(name), Path(recipe.data_root))
            if corpus.pretokenized and tokenizer is not None and tokenizer.train is not None:
                yield (
                    f"{place}: '{name}' is tokenised already, and tokenizer.train makes another tokenizer; name the "
                    "one that it was made with, tokenizer: FOLDER_OR_HUB_ID"
                )
        except UserError as error:
            yield f"{place}: {error}"
        except OSError as error:
            yield f"{place}: '{name}' cannot be looked at: {error.strerror or error}"
    for name in recipe.evaluated():
        if name in recipe.corpora and recipe.corpora[name].holdout == 0:
            yield (
                f"corpora.{name}.holdout: 0 holds no text out, and '{name}' is measured on. Give a share above 0 or "
                f"validation files, or leave '{name}' out of evaluate.data"
            )


def _model_contradictions(model: ModelSection) -> Iterable[str]:
    """Yield why the section names no model, or more than one."""
    if len(model.beginnings) != 1:
        both = f"; {' and '.join(model.beginnings)} are given" if model.beginnings else ""
        yield f"model: give one of preset, checkpoint, architecture, and config as a path{both}"
    elif model.preset is not None and model.preset not in PRESETS:
        near = did_you_mean(model.preset, PRESETS)
        yield f"model.preset: unknown preset '{model.preset}'.{near} Known: {', '.join(PRESETS)}"
    if model.architecture is not None and (fault := architecture_fault(model.architecture)):
        yield f"model.architecture: {fault}"
    if isinstance(model.config, str) and model.config.endswith(".json") and not os.path.isfile(model.config):
        beside = [str(path) for path in Path(model.config).parent.glob("*.json")]
        yield f"model.config: there is no file '{model.config}'.{did_you_mean(model.config, beside)}"


def doubts(recipe: Recipe) -> Iterable[str]:
    """Yield what a recipe without faults may not intend: text that one corpus trains on and another holds out."""
    trained = dict.fromkeys(name for phase in recipe.phases for name in phase.data)
    root = Path(recipe.data_root)
    corpora = {name: resolve(name, recipe.corpora.get(name), root) for name in recipe.corpus_names()}
    for one, other in itertools.product(trained, recipe.evaluated()):
        if file := corpora[one].trains_on_held_out(corpora[other]):
            yield (
                f"'{one}' trains on a part of {file.name} that '{other}' holds out and is measured on: give both the "
                "same holdout, document and text, unless that is meant"
            )


def _phase_contradictions(recipe: Recipe, phase: PhaseSection, earlier: dict[str, list[str]]) -> Iterable[str]:
    """Yield the faults of a phase.

    Args:
        recipe: The recipe that it belongs to.
        phase: The phase.
        earlier: The labels of the checkpoints of each earlier phase, by `PHASE` and by `PHASE/ARM`.
    """
    if not _NAME.fullmatch(phase.name):
        yield f"name: '{phase.name}' names a folder; {_NAMING}"
    elif _TAKEN.fullmatch(phase.name):
        yield f"name: '{phase.name}' is a name that the run's folder has for something else; choose another"
    # Some file systems do not tell capital letters from small ones.
    if any(phase.name.lower() == name.lower() for name in earlier):
        yield f"name: '{phase.name}' is the name of an earlier phase"
    arms = [arm.lower() for arm in phase.arms or {}]
    for twice in sorted({arm for arm in arms if arms.count(arm) > 1}):
        yield f"arms: two arms are called '{twice}' but for capital letters, which some file systems do not tell apart"
    lengths = [k for k in ("epochs", "steps", "tokens") if getattr(phase, k) is not None]
    if len(lengths) != 1:
        yield f"{' and '.join(lengths) or 'steps'}: give exactly one of epochs, steps and tokens"
    for corpus, weight in phase.data.items():
        if not 0 <= weight < float("inf"):
            yield f"data.{corpus}: the weight {weight} should be a number of 0 or more"
    if not any(phase.data.values()):
        yield "data: the weights are all zero"
    for k in phase.keep:
        if k != "best" and not (isinstance(k, int) and k > 0):
            yield f"keep: {k!r} is not allowed; 'best' or a number of steps"
        elif isinstance(k, int) and phase.steps is not None and k > phase.steps:
            yield f"keep: step {k} lies beyond the phase's {phase.steps} steps"
    if "best" in phase.keep and not set(phase.data) & set(recipe.evaluated()):
        yield f"keep: 'best' is one on the phase's own corpora, and evaluate.data has none of {', '.join(phase.data)}"
    if phase.stop is not None:
        yield from _stop_contradictions(recipe, phase, phase.stop)
    for arm in phase.arms or {}:
        if not _NAME.fullmatch(arm):
            yield f"arms.{arm}: the name is that of a folder; {_NAMING}"
    yield from _start_contradictions(recipe, phase, earlier)


def _start_contradictions(recipe: Recipe, phase: PhaseSection, earlier: dict[str, list[str]]) -> Iterable[str]:
    """Yield why a phase cannot start from the checkpoints that it names, or has to name some."""
    if phase.start_from is not None and not any(phase.start_from.values()):
        yield "start_from: it names no checkpoint; leave it out to start from the previous phase's final one"
    for source, labels in (phase.start_from or {}).items():
        if len(set(map(str, labels))) < len(labels):
            yield f"start_from.{source}: {labels} names a checkpoint twice"
        if source not in earlier:
            yield f"start_from: there is no earlier phase '{source}'.{did_you_mean(source, earlier)}"
            continue
        before = next(other for other in recipe.phases if other.name == source.partition("/")[0])
        for label in labels:
            if str(label) not in earlier[source]:
                allowed = ", ".join(earlier[source])
                how = "Give that phase ema: {decay: 0.999}" if label == AVERAGED else "Add it to that phase's keep"
                yield f"start_from.{source}: '{label}' is not kept; kept: {allowed}. {how}"
            elif str(label).isdecimal() and before.stop is not None:
                yield (
                    f"start_from.{source}: step {label} may never come, as '{before.name}' may stop before it; start "
                    "from final or best"
                )
            elif label == AVERAGED and phase.optimizer_state == "kept":
                yield f"start_from.{source}: '{AVERAGED}' has no moments, and optimizer_state is kept; write cleared"
    armed = [p for p in recipe.phases if p.arms and p.name in earlier]
    previous = next((name for name in reversed(earlier) if "/" not in name), None)
    if phase.optimizer_state == "kept":
        yield from _kept_contradictions(recipe, phase, [previous] if phase.start_from is None else phase.start_from)
    yield from _when_contradictions(recipe, phase, phase.start_from or ({previous: ["final"]} if previous else {}))
    if phase.start_from is None and armed and armed[-1].name == previous:
        missing = [a for a in (phase.arms or {"": None}) if a not in (armed[-1].arms or {})]
        if missing:
            example = f"{armed[-1].name}/{next(iter(armed[-1].arms or {}))}"
            yield f"start_from: the previous phase has arms; say which to go on from, such as {{{example}: final}}"


def _hub_faults(recipe: Recipe, hub: HubSection) -> Iterable[str]:
    """Yield why checkpoints cannot be pushed, as far as the recipe shows it."""
    if not _REPOSITORY.fullmatch(hub.repo) or "--" in hub.repo or ".." in hub.repo or hub.repo.endswith(".git"):
        yield f"hub.repo: '{hub.repo}' is no repository of the Hub; write owner/name"
    for n, phase in enumerate(recipe.phases):
        if hub.push == "best" and "best" not in phase.keep:
            yield f"phases[{n}].keep: hub.push is best, and '{phase.name}' keeps no best; add it, or push end"


def _planned_steps(recipe: Recipe, phase: PhaseSection) -> int | None:
    """Return a phase's optimizer steps, None where they are counted in epochs."""
    return phase.steps or (phase.tokens and -(-phase.tokens // recipe.batch.tokens_per_step))


def _stop_contradictions(recipe: Recipe, phase: PhaseSection, stop: StopSection) -> Iterable[str]:
    """Yield why a phase cannot stop early."""
    if stop.corpus not in recipe.evaluated():
        near = did_you_mean(stop.corpus, recipe.evaluated())
        yield f"stop.corpus: '{stop.corpus}' is not measured.{near} Measured: {', '.join(recipe.evaluated())}"
    steps = _planned_steps(recipe, phase)
    if steps and (fault := stop_fault(recipe, phase, steps)):
        yield fault


def _when_contradictions(recipe: Recipe, phase: PhaseSection, sources: Mapping[str, list[Any]]) -> Iterable[str]:
    """Yield, for each reset with the condition `overtrained`, why a checkpoint could not be judged."""
    earlier = {other.name: other for other in recipe.phases[: recipe.phases.index(phase)]}
    reasons = [] if sources else ["what the first phase starts from was not measured by a phase before; leave when out"]
    for source, labels in sources.items():
        if (parent := earlier.get(source.partition("/")[0])) is not None:
            reasons += _unjudged(recipe, parent, labels)
    for name, arm in (phase.arms or {}).items():
        for i, reset in enumerate(as_list(arm)):
            parsed = ResetSpec.check(reset)[1] if isinstance(reset, str | Mapping) else None
            if parsed is not None and parsed.when is not None:
                path = f"arms.{name}[{i}]" if isinstance(arm, list) else f"arms.{name}"
                yield from (f"{path}.when: {reason}" for reason in dict.fromkeys(reasons))


def _unjudged(recipe: Recipe, phase: PhaseSection, labels: Iterable[Any]) -> Iterable[str]:
    """Yield which of a phase's checkpoints cannot be judged: it takes their own held-out loss and an earlier one."""
    if not {name for name, weight in phase.data.items() if weight} & set(recipe.evaluated()):
        yield f"evaluate.data has none of {', '.join(phase.data)}, which '{phase.name}' trains on; add one"
        return
    steps = _planned_steps(recipe, phase)
    every = recipe.evaluate.every(steps) if steps else recipe.evaluate.every_steps
    for label in map(str, labels):
        reached = int(label) if label.isdecimal() else None if label == "best" else steps
        if label.isdecimal() and every is None:
            yield f"'{phase.name}' may not be evaluated at step {label}; give evaluate.every_steps, a divisor of it"
        elif label.isdecimal() and every and reached != steps and int(label) % every:
            yield f"'{phase.name}' is evaluated every {every} steps, and so not at step {label}; keep a multiple of it"
        elif reached and every and reached <= every:
            yield (
                f"'{phase.name}' is evaluated once by step {reached}, which shows no rise; give a smaller "
                "evaluate.every_steps"
            )


def stop_fault(recipe: Recipe, phase: PhaseSection, steps: int) -> str | None:
    """Return why a phase of so many optimizer steps could never stop early; None if it can, or has no `stop`."""
    every = recipe.evaluate.every(steps)
    if phase.stop is None or (reached := phase.stop.patience * every) < steps:
        return None
    return (
        f"stop.patience: {phase.stop.patience} evaluations, one every {every} steps, come to {reached} of the phase's "
        f"{steps} steps: it would never stop early; give fewer, or a smaller evaluate.every_steps"
    )


def _kept_contradictions(recipe: Recipe, phase: PhaseSection, sources: Iterable[str | None]) -> Iterable[str]:
    """Yield why a phase cannot go on with the optimizer state of the checkpoints that it starts from."""
    by_name = {other.name: other for other in recipe.phases}
    own_name = optimizer_of(recipe, phase).name
    for source in sources:
        if source is None:
            yield "optimizer_state: 'kept' wants a checkpoint of an earlier phase, and this is the first. Remove it"
            continue
        parent = by_name.get(source.partition("/")[0])
        if parent is not None and (name := optimizer_of(recipe, parent).name) != own_name:
            yield (
                f"optimizer_state: 'kept' wants one optimizer in both phases; '{source}' is trained with {name}, this "
                f"phase with {own_name}. Write cleared, or give both the same optimizer.name"
            )
