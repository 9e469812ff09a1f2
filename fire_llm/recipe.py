"""The typed recipe: YAML in, every fault at once out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fire_llm.corpora import CorpusSpec, resolve
from fire_llm.errors import UserError, did_you_mean
from fire_llm.models import PRESETS
from fire_llm.resets import RESETS, ResetSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_key(key: str) -> Any:
    return lambda value: {key: value} if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(_Section):
    """The model: a preset, or an existing checkpoint."""

    preset: str | None = Field(None, description=f"One of {', '.join(PRESETS)}")
    checkpoint: str | None = Field(None, description="A Hub id or a folder to start from instead of a preset")
    context: int | None = Field(None, ge=2, description="Tokens a sequence; the preset's own by default")
    config: dict[str, Any] = Field(default_factory=dict, description="Attributes of the transformers config to set")


class TokenizerSection(_Section):
    """The tokenizer: an existing one, or one trained on corpora of the recipe."""

    path: str | None = Field(None, description="A Hub id or a folder")
    train: int | None = Field(None, ge=258, description="Vocabulary size of a byte-level BPE trained before phase 1")
    corpora: list[str] = Field(default_factory=list, description="What it is trained on; the first phase's by default")


class OptimizerSection(_Section):
    """AdamW with a linear warm-up and a cosine, begun anew in every phase."""

    lr: float = Field(6.0e-4, gt=0, description="Peak learning rate")
    min_lr: float = Field(6.0e-5, ge=0, description="Learning rate at the end of the cosine")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a phase's steps spent warming up")
    max_warmup_steps: int = Field(2000, ge=0, description="Most optimizer steps spent warming up")
    weight_decay: float = Field(0.1, ge=0, description="Decay of tensors of two dimensions and more")
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2, description="AdamW's decay rates")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 for no clipping")


class BatchSection(_Section):
    """What one optimizer step sees."""

    tokens_per_step: int = Field(491_520, ge=1, description="Tokens an optimizer step, over all ranks")
    sequences_per_device: int | None = Field(
        None, ge=1, description="Sequences a forward pass; a divisor is chosen by default"
    )


class PhaseSection(_Section):
    """One phase of training on one mixture of corpora."""

    name: str
    data: dict[str, float] = Field(min_length=1, description="Corpora and their weights, over tokens")
    epochs: float | None = Field(None, gt=0, description="Length, in the tokens that the corpora hold together")
    steps: int | None = Field(None, ge=1, description="Length, in optimizer steps")
    tokens: int | None = Field(None, ge=1, description="Length, in tokens; the last step is completed")
    max_corpus_tokens: int | None = Field(None, ge=1, description="Train on at most this many first tokens a corpus")
    sampling: Literal["without-replacement", "with-replacement"] = "without-replacement"
    keep: Annotated[list[int | str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Checkpoints that stay beside the final one: best, or numbers of steps"
    )
    start_from: dict[str, Annotated[list[int | str], BeforeValidator(_as_list)]] | None = Field(
        None, description="{phase or phase/arm: checkpoint or checkpoints}; the previous phase's final one by default"
    )
    arms: dict[str, Any] | None = Field(None, description="Resets to compare: name → a reset or a list of resets")


class EvaluateSection(_Section):
    """Exact perplexity on the held-out part of corpora."""

    data: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list, description="By default all")
    every_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations; a tenth by default")
    max_tokens: int | None = Field(None, ge=2, description="Measure on at most this many held-out tokens a corpus")
    sequences_per_device: int = Field(8, ge=1, description="Windows a forward pass")


class Recipe(_Section):
    """A whole experiment: phases in order, and what stands between them."""

    name: str = "run"
    description: str = ""
    seed: Annotated[list[int], BeforeValidator(_as_list)] = Field([1], min_length=1, description="One seed or several")
    model: Annotated[ModelSection, BeforeValidator(_as_key("checkpoint"))]
    tokenizer: Annotated[TokenizerSection | None, BeforeValidator(_as_key("path"))] = None
    data_root: str = Field(".", description="Folder from which relative paths of corpora count")
    corpora: dict[str, CorpusSpec] = Field(default_factory=dict, description="Corpora of one's own, by name")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 autocast where the hardware multiplies it natively, else fp32"
    )
    compile: bool = Field(False, description="Use torch.compile")
    save_every_steps: int = Field(500, ge=1, description="Optimizer steps between the checkpoints a run resumes from")
    log_every_steps: int = Field(10, ge=1, description="Optimizer steps a logged training loss is the mean of")
    phases: list[PhaseSection] = Field(min_length=1)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)

    def corpus_names(self) -> list[str]:
        """Return every corpus trained or measured on, in order of appearance."""
        trained = [name for phase in self.phases for name in phase.data]
        return list(dict.fromkeys([*trained, *self.evaluate.data]))

    def evaluated(self) -> list[str]:
        """Return the corpora that perplexity is measured on."""
        return self.evaluate.data or self.corpus_names()

    def arms(self, phase: PhaseSection) -> dict[str, list[ResetSpec]]:
        """Return a phase's arms with their resets read."""
        return {name: [ResetSpec.parse(r) for r in _as_list(arm)] for name, arm in (phase.arms or {}).items()}


# ---- reading


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, the name of a built-in one, or plain data.

    Args:
        source: Path, built-in name ("demo") or mapping.
        overrides: `KEY=VALUE` with a dotted key (`phases.1.steps=100`); the value is read as YAML.

    Raises:
        UserError: With every fault found, one a line: `path: what is wrong, what is allowed`.
    """
    data = dict(source) if isinstance(source, Mapping) else _read(source)
    for override in overrides:
        _set(data, override)
    faults: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        faults += [f"{_path(e['loc'])}: {_explain(e)}" for e in error.errors()]
    faults += _arm_faults(data)
    if recipe is not None and not faults:
        faults += list(_contradictions(recipe))
    if faults or recipe is None:
        where = "the recipe" if isinstance(source, Mapping) else f"'{source}'"
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError("\n  ".join([f"{count} in {where}:", *dict.fromkeys(faults)]))
    return recipe


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package, installed or checked out."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """Refuse a key that stands twice, which YAML loaders silently let win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float) else None)
        return super().construct_mapping(node, deep)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.exists() and path.suffix == "":
        path = recipes_folder() / f"{source}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(recipes_folder()).with_suffix("")) for p in recipes_folder().rglob("*.yaml"))
        raise UserError(
            f"there is no recipe '{source}'.{did_you_mean(str(source), known)} Built in: {', '.join(known)}"
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"'{path}'{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise UserError(f"'{path}' holds no recipe: a mapping with 'model' and 'phases' is wanted (see recipes/)")
    return data


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write KEY=VALUE, such as phases.1.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    at: Any = data
    parts = [int(p) if p.isdigit() else p for p in re.split(r"\.|\[|\]\.?", key) if p]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(at, list) and isinstance(part, int) and part < len(at):
            pass
        elif not isinstance(at, dict):
            raise UserError(f"--set {override}: the recipe has no '{'.'.join(map(str, parts[: i + 1]))}'")
        if last:
            at[part] = value
        else:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})


# ---- faults


def _path(loc: Iterable[Any]) -> str:
    """Write a location as `phases[1].arms.fire`."""
    text = ""
    for part in loc:
        if part in ("int", "str", "function-before[_as_list()]"):  # branches of a union, which users never wrote
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "recipe"


def _explain(error: Any) -> str:
    """Say one pydantic error in words that name the value, what is allowed and the next step."""
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
    return f"{json.dumps(value, default=str)[:80]} is not allowed: it should be {message}"


def _fields_at(loc: Iterable[Any]) -> list[str]:
    """Return the keys allowed at a location of the recipe."""
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection, "tokenizer": TokenizerSection, "optimizer": OptimizerSection, "batch": BatchSection,
        "phases": PhaseSection, "evaluate": EvaluateSection, "corpora": CorpusSpec,
    }  # fmt: skip
    first = next(iter(loc), None)
    return list(sections.get(str(first), Recipe).model_fields)


def _arm_faults(data: Mapping[str, Any]) -> list[str]:
    """Check every reset of every arm, whatever else is wrong with the recipe."""
    faults = []
    phases = data.get("phases")
    for i, phase in enumerate(phases if isinstance(phases, list) else []):
        arms = phase.get("arms") if isinstance(phase, Mapping) else None
        for name, arm in arms.items() if isinstance(arms, Mapping) else ():
            for j, reset in enumerate(_as_list(arm)):
                where = f"phases[{i}].arms.{name}" + (f"[{j}]" if isinstance(arm, list) else "")
                if not isinstance(reset, str | Mapping):
                    faults.append(
                        f"{where}: {reset!r} is no reset; write {{method: NAME}}, NAME one of {', '.join(RESETS)}"
                    )
                    continue
                faults += [f"{where}.{key}: {message}" for key, message in ResetSpec.check(reset)[0]]
    return faults


def _contradictions(recipe: Recipe) -> Iterable[str]:
    """Yield what is wrong between keys that are each right by themselves."""
    if (recipe.model.preset is None) == (recipe.model.checkpoint is None):
        yield "model: give one of preset and checkpoint"
    elif recipe.model.preset is not None and recipe.model.preset not in PRESETS:
        near = did_you_mean(recipe.model.preset, PRESETS)
        yield f"model.preset: unknown preset '{recipe.model.preset}'.{near} Known: {', '.join(PRESETS)}"
    if recipe.model.checkpoint is not None and recipe.model.config:
        yield "model.config: a checkpoint has a config of its own; remove this key, or take a preset"
    tokenizer = recipe.tokenizer
    if tokenizer is None and recipe.model.preset is not None:
        yield "tokenizer: a preset brings none; give a Hub id or folder, or {train: VOCABULARY_SIZE}"
    if tokenizer is not None and (tokenizer.path is None) == (tokenizer.train is None):
        yield "tokenizer: give one of path and train"
    if len(set(recipe.seed)) < len(recipe.seed):
        yield f"seed: {recipe.seed} names a seed twice"
    if recipe.optimizer.min_lr > recipe.optimizer.lr:
        yield f"optimizer.min_lr: {recipe.optimizer.min_lr} is above lr, {recipe.optimizer.lr}"
    context = recipe.model.context or (PRESETS.get(recipe.model.preset or "") or {}).get("n_positions")
    if context and recipe.batch.tokens_per_step % context:
        nearest = max(1, round(recipe.batch.tokens_per_step / context)) * context
        yield (
            f"batch.tokens_per_step: {recipe.batch.tokens_per_step} is not a multiple of the context, {context}. "
            f"The nearest is {nearest}"
        )
    earlier: dict[str, list[str]] = {}
    for n, phase in enumerate(recipe.phases):
        yield from (f"phases[{n}].{fault}" for fault in _phase_contradictions(recipe, phase, earlier))
        earlier[phase.name] = [str(k) for k in ["final", *phase.keep]]
        for arm in phase.arms or {}:
            earlier[f"{phase.name}/{arm}"] = earlier[phase.name]
    for name in dict.fromkeys([*recipe.corpus_names(), *(tokenizer.corpora if tokenizer else [])]):
        try:
            resolve(name, recipe.corpora.get(name), Path(recipe.data_root))
        except UserError as error:
            yield f"{error}"


def _phase_contradictions(recipe: Recipe, phase: PhaseSection, earlier: dict[str, list[str]]) -> Iterable[str]:
    if not _NAME.fullmatch(phase.name):
        yield f"name: '{phase.name}' names a folder; use letters, digits, '.', '_', '+' and '-'"
    if phase.name in earlier:
        yield f"name: '{phase.name}' is the name of an earlier phase"
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
    if "best" in phase.keep and not any(phase.data.get(c) for c in recipe.evaluated()):
        yield f"keep: 'best' is told by the phase's own corpora, and evaluate.data has none of {', '.join(phase.data)}"
    for arm in phase.arms or {}:
        if not _NAME.fullmatch(arm):
            yield f"arms.{arm}: the name is that of a folder; use letters, digits, '.', '_', '+' and '-'"
    for source, labels in (phase.start_from or {}).items():
        if source not in earlier:
            yield f"start_from: there is no earlier phase '{source}'.{did_you_mean(source, earlier)}"
            continue
        for label in labels:
            if str(label) not in earlier[source]:
                allowed = ", ".join(earlier[source])
                yield f"start_from.{source}: '{label}' is not kept; kept: {allowed}. Add it to that phase's keep"
    armed = [p for p in recipe.phases if p.arms and p.name in earlier]
    if phase.start_from is None and armed and armed[-1].name == next(reversed([k for k in earlier if "/" not in k])):
        missing = [a for a in (phase.arms or {"": None}) if a not in (armed[-1].arms or {})]
        if missing:
            example = f"{armed[-1].name}/{next(iter(armed[-1].arms or {}))}"
            yield f"start_from: the previous phase has arms; say which to go on from, such as {{{example}: final}}"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, the resets' options included, for editors to complete from."""
    schema = Recipe.model_json_schema()
    resets = []
    for name, method in RESETS.items():
        options = method.options.model_json_schema()
        options["properties"]["method"] = {"const": name}
        options["required"] = [*options.get("required", []), "method"]
        resets.append(options)
    one = {"anyOf": [{"enum": list(RESETS)}, *resets]}
    arms = {"anyOf": [one, {"type": "array", "items": one}]}
    schema["$defs"]["PhaseSection"]["properties"]["arms"] = {"type": "object", "additionalProperties": arms}
    # What a validator accepts in shorthand, editors must accept too.
    schema["properties"]["seed"] = {"anyOf": [{"type": "integer"}, schema["properties"]["seed"]]}
    for key in ("model", "tokenizer"):
        schema["properties"][key] = {"anyOf": [{"type": "string"}, schema["properties"][key]]}
    phase = schema["$defs"]["PhaseSection"]["properties"]
    phase["start_from"] = {"type": "object", "description": phase["start_from"].get("description", "")}
    return schema
