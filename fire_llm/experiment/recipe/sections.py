"""The sections of a recipe: what each key means, its type and its default, in one place."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fire_llm.data.corpora import CorpusSpec
from fire_llm.models import PRESETS
from fire_llm.resets import FORMER, RESETS


def as_list(value: Any) -> Any:
    """Return the value if it is a list, else a list of the value."""
    return value if isinstance(value, list) else [value]


def _trackers(value: Any) -> Any:
    return [] if value in (None, "none", ["none"]) else as_list(value)


def _as_key(key: str) -> Any:
    return lambda value: {key: value} if isinstance(value, str) else value


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) else value


Place = Annotated[str, BeforeValidator(_home)]
"""A folder, or a Hub id; `~` is the home folder."""

LATER = {"architecture", "dropout", "ema", "eps", "neftune", "stop"}
"""Keys that older runs' `unit.json` lacks."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""The numbers that both torch's and NumPy's generators take as seeds."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def identity(self) -> dict[str, Any]:
        """Return the section as `unit.json` holds it: without keys of `LATER` that are at their defaults."""
        fields = type(self).model_fields
        whole = self.model_dump(mode="json")
        return {key: value for key, value in whole.items() if key not in LATER or value != fields[key].default}


class ModelSection(_Section):
    """The model: a preset, an existing checkpoint, or new weights of an architecture or of somebody's config."""

    preset: str | None = Field(None, description=f"One of {', '.join(PRESETS)}")
    checkpoint: Place | None = Field(None, description="A Hub id or a folder to start from instead of a preset")
    architecture: str | None = Field(
        None,
        description="A causal LM type of transformers, such as llama, with new weights; keys of its config may stand "
        "beside it",
    )
    context: int | None = Field(None, ge=2, description="Tokens a sequence; the preset's own by default")
    config: Annotated[dict[str, Any] | str, BeforeValidator(_home)] = Field(
        default_factory=dict,
        description="Attributes of the transformers config to set; or a config.json, a folder or a Hub id that holds "
        "one, with new weights",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Share that every dropout of the model drops; the config's own by default"
    )

    @model_validator(mode="before")
    @classmethod
    def _beside(cls, data: Any) -> Any:
        """Move keys that stand beside `architecture`, and are not the section's own, into `config`."""
        if not isinstance(data, dict) or data.get("architecture") is None or isinstance(data.get("config"), str):
            return data
        beside = {key: value for key, value in data.items() if key not in cls.model_fields}
        config = data.get("config") or {}
        if not beside or not isinstance(config, dict) or beside.keys() & config.keys():
            return data
        return {key: value for key, value in data.items() if key in cls.model_fields} | {"config": config | beside}

    @property
    def attributes(self) -> dict[str, Any]:
        """Return the attributes that `config` sets; none if `config` is a file, a folder or a Hub id."""
        return {} if isinstance(self.config, str) else self.config

    @property
    def beginnings(self) -> list[str]:
        """Return which of the keys are given that say what a model begins with; exactly one should be."""
        given = {name: getattr(self, name) is not None for name in ("preset", "checkpoint", "architecture")}
        return [name for name, is_given in {**given, "config": isinstance(self.config, str)}.items() if is_given]


class TokenizerSection(_Section):
    """The tokenizer: an existing one, or one trained on corpora of the recipe."""

    path: Place | None = Field(None, description="A Hub id or a folder")
    train: int | None = Field(None, ge=258, description="Vocabulary size of a byte-level BPE trained before phase 1")
    corpora: list[str] = Field(default_factory=list, description="What it is trained on; the first phase's by default")


class OptimizerSection(_Section):
    """An optimizer and a schedule with a linear warm-up; the schedule begins again in every phase."""

    name: str = Field("adamw", description="adamw, muon, or a name that transformers' TrainingArguments.optim takes")
    lr: float = Field(6.0e-4, gt=0, description="Peak learning rate")
    min_lr: float = Field(6.0e-5, ge=0, description="Learning rate at the end of the phase")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a phase's steps spent warming up")
    max_warmup_steps: int = Field(2000, ge=0, description="Most optimizer steps spent warming up")
    weight_decay: float = Field(0.1, ge=0, description="Decay of tensors of two dimensions and more")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.95], min_length=2, max_length=2, description="AdamW's decay rates"
    )
    eps: float = Field(1.0e-8, gt=0, description="AdamW's ε, added to the root of its second moment")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 for no clipping")
    neftune: float | None = Field(
        None, gt=0, description="NEFTune's α: noise of so much on the embeddings while training; none by default"
    )
    muon_lr: float | None = Field(None, gt=0, description="Peak learning rate of Muon's matrices; lr by default")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Share of Muon's momentum that a step keeps")
    schedule: Literal["cosine", "wsd", "infinite", "constant"] = Field("cosine", description="After the warm-up")
    decay: float = Field(0.1, ge=0, le=1, description="wsd, infinite: share of a phase's steps that lead to min_lr")
    decay_shape: Literal["linear", "1-sqrt", "exponential"] | None = Field(
        None, description="wsd: 1-sqrt by default; infinite: exponential"
    )
    cooldown: float = Field(0.15, ge=0, le=1, description="infinite: share of steps from lr down to constant_lr")
    constant_lr: float | None = Field(None, gt=0, description="infinite: learning rate between cooldown and decay")

    @property
    def shape(self) -> str:
        """Return the shape of the decay: `decay_shape`, or the schedule's default."""
        return self.decay_shape or ("exponential" if self.schedule == "infinite" else "1-sqrt")

    def arguments(self, steps: int) -> dict[str, Any]:
        """Return the `ContinualArguments` of this section in a phase of `steps` optimizer steps."""
        cosine = self.schedule == "cosine"
        return {
            "optim": "adamw_torch_fused" if self.name in ("adamw", "muon") else self.name,
            "muon": self.name == "muon",
            "muon_lr": self.muon_lr,
            "muon_momentum": self.muon_momentum,
            "learning_rate": self.lr,
            "warmup_steps": min(int(self.warmup * steps), self.max_warmup_steps),
            "lr_scheduler_type": "cosine_with_min_lr" if cosine else "constant_with_warmup",
            "lr_scheduler_kwargs": {"min_lr": self.min_lr} if cosine else {},
            "schedule": self._own_schedule(steps),
            "weight_decay": self.weight_decay,
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "adam_epsilon": self.eps,
            "neftune_noise_alpha": self.neftune,
            "max_grad_norm": self.clip,
        }

    def _own_schedule(self, steps: int) -> dict[str, Any] | None:
        """Return the arguments of `trainer.multiplier`; None for the schedules that transformers has."""
        if self.schedule not in ("wsd", "infinite"):
            return None
        arguments = {"decay": int(self.decay * steps), "floor": self.min_lr / self.lr, "shape": self.shape}
        if self.schedule == "infinite":
            arguments |= {"cooldown": int(self.cooldown * steps), "constant": (self.constant_lr or self.lr) / self.lr}
        return arguments


class PhaseOptimizerSection(OptimizerSection):
    """Keys of the optimizer that differ in one phase; a key that is not given is the recipe's."""

    @model_serializer(mode="wrap")
    def _only_given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in whole(self).items() if key in self.model_fields_set}


class BatchSection(_Section):
    """What one optimizer step sees."""

    tokens_per_step: int = Field(491_520, ge=1, description="Tokens an optimizer step, over all ranks")
    sequences_per_device: int | None = Field(
        None, ge=1, description="Sequences a forward pass; a divisor is chosen by default"
    )
    document_mask: bool = Field(False, description="Attention and positions stay within documents, inside blocks too")


class EmaSection(_Section):
    """An exponential moving average of a phase's weights, one more checkpoint."""

    decay: float = Field(0.999, gt=0, lt=1, description="Share of the average that a step keeps")


class StopSection(_Section):
    """When a phase ends before its last step."""

    corpus: str = Field(description="An evaluated corpus")
    patience: int = Field(3, ge=1, description="Evaluations in a row without a fall of its NLL that end the phase")
    min_delta: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Nats a token below the lowest so far that count as a fall"
    )


class PhaseSection(_Section):
    """One phase of training on one mixture of corpora."""

    name: str
    data: dict[str, float] = Field(min_length=1, description="Corpora and their weights, over tokens")
    epochs: float | None = Field(None, gt=0, le=1e6, description="Length, in the tokens that the corpora hold together")
    steps: int | None = Field(None, ge=1, description="Length, in optimizer steps")
    tokens: int | None = Field(None, ge=1, description="Length, in tokens; the last step is completed")
    max_corpus_tokens: int | None = Field(None, ge=1, description="Train on at most this many first tokens a corpus")
    sampling: Literal["without-replacement", "with-replacement"] = "without-replacement"
    optimizer: PhaseOptimizerSection = Field(
        default_factory=PhaseOptimizerSection, description="Keys of the optimizer that are others in this phase"
    )
    optimizer_state: Literal["cleared", "kept"] = Field(
        "cleared", description="kept: begin with the moments of the checkpoint that the phase starts from"
    )
    keep: Annotated[list[int | str], BeforeValidator(as_list)] = Field(
        default_factory=list, description="Checkpoints that stay beside the final one: best, or numbers of steps"
    )
    ema: EmaSection | None = Field(None, description="Average the weights over the steps: one more checkpoint, ema")
    stop: StopSection | None = Field(None, description="End the phase early; it trains to its last step by default")
    start_from: dict[str, Annotated[list[int | str], BeforeValidator(as_list)]] | None = Field(
        None, description="{phase or phase/arm: checkpoint or checkpoints}; the previous phase's final one by default"
    )
    arms: dict[str, Any] | None = Field(None, description="Resets to compare: name → a reset or a list of resets")


class EvaluateSection(_Section):
    """Exact perplexity on the held-out part of corpora."""

    data: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list, description="By default all")
    every_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations; a tenth by default")
    max_tokens: int | None = Field(None, ge=2, description="Measure on at most this many held-out tokens a corpus")
    sequences_per_device: int = Field(8, ge=1, description="Windows a forward pass")
    precision: Literal["fp32", "training"] = Field(
        "fp32", description="fp32 whatever the run trains in, or training: under the run's own mixed precision"
    )
    diagnostics_every_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between measurements of plasticity; none by default"
    )

    def every(self, steps: int) -> int:
        """Return the optimizer steps between two evaluations in a phase of `steps` steps."""
        return self.every_steps or max(1, steps // 10)


class GenerateSection(_Section):
    """Text that the model writes while it trains, for people to read; nothing that is measured depends on it."""

    prompts: Annotated[list[str], BeforeValidator(as_list)] = Field(
        min_length=1, description="Texts to write after; '' for none"
    )
    every_steps: int | None = Field(None, ge=1, description="Optimizer steps between two times; at every evaluation")
    max_new_tokens: int = Field(32, ge=1, description="Most tokens written; with the prompt they fit into the context")
    temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="0: the likeliest token each time; above: drawn, from one seed"
    )


class HubSection(_Section):
    """Where checkpoints are pushed to: a branch NAME/PHASE/ARM/seed-N for each stage."""

    repo: str = Field(description="A model repository of the Hub, owner/name; made where there is none")
    push: Literal["end", "best", "every save"] = Field(
        "end", description="Of each stage: the final checkpoint; the best one; each that is written, the final one last"
    )
    private: bool = Field(True, description="Make a private repository, and refuse one that is public")


class Recipe(_Section):
    """A whole experiment: phases in order, and what stands between them."""

    name: str = "run"
    description: str = ""
    seed: Annotated[list[Seed], BeforeValidator(as_list)] = Field([1], min_length=1, description="One seed or several")
    model: Annotated[ModelSection, BeforeValidator(_as_key("checkpoint"))]
    tokenizer: Annotated[TokenizerSection | None, BeforeValidator(_as_key("path"))] = None
    data_root: Place = Field(".", description="Folder from which relative paths of corpora count")
    corpora: dict[str, CorpusSpec] = Field(default_factory=dict, description="Corpora of one's own, by name")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    precision: Literal["auto", "fp32", "bf16", "bf16-params", "fp16"] = Field(
        "auto",
        description="Autocast to bf16 or fp16; bf16-params: parameters are read in bf16, so that norms and the "
        "residual stream are in it too; auto: bf16 where the hardware multiplies it natively, else fp32",
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="Kernels that attention is trained with; auto: transformers' choice, SDPA where it can be"
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep a layer's input alone, and compute the layer again in the backward pass"
    )
    reduce_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="What FSDP2 adds gradients up in over the ranks; bf16 halves what they exchange"
    )
    sync_each_batch: bool = Field(
        False,
        description="Add gradients up over the ranks after each forward pass, not once a step: FSDP2 holds shards of "
        "them in place of whole ones",
    )
    compile: Literal["auto", True, False] = Field(
        "auto", description="Use torch.compile; auto: on CUDA alone, and not for a model in shards"
    )
    nonfinite: Literal["halt", "skip"] = Field(
        "halt", description="Where a loss or gradient is not finite: stop before the step, or leave it out and count it"
    )
    save_every_steps: int = Field(500, ge=1, description="Optimizer steps between the checkpoints a run resumes from")
    save_every_minutes: float | None = Field(
        None, gt=0, description="Minutes after which such a checkpoint is written too; by steps alone by default"
    )
    keep_last: int = Field(1, ge=1, description="Newest checkpoints of a phase that stay, beside those it keeps")
    log_every_steps: int = Field(10, ge=1, description="Optimizer steps a logged training loss is the mean of")
    report_to: Annotated[list[str], BeforeValidator(_trackers)] = Field(
        default_factory=list,
        description="Trackers that show the curves: tensorboard, trackio, wandb, ..., or none",
    )
    phases: list[PhaseSection] = Field(min_length=1)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    generate: GenerateSection | None = Field(
        None, description="Text that the model writes at evaluations, before and after resets; none by default"
    )
    hub: HubSection | None = Field(None, description="Push checkpoints to the Hub; none by default")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="{dotted key: values}: a grid of runs, for fire-llm sweep"
    )

    def corpus_names(self) -> list[str]:
        """Return every corpus trained or measured on, in order of appearance."""
        trained = [name for phase in self.phases for name in phase.data]
        return list(dict.fromkeys([*trained, *self.evaluate.data]))

    def evaluated(self) -> list[str]:
        """Return the corpora that perplexity is measured on."""
        return list(dict.fromkeys(self.evaluate.data)) or self.corpus_names()

    def diagnosed(self, phase: PhaseSection) -> str:
        """Return the corpus that a phase's plasticity is measured on: its heaviest evaluated one, else the first."""
        phase_corpora = [name for name in self.evaluated() if name in phase.data]
        return max(phase_corpora, key=phase.data.__getitem__) if phase_corpora else self.evaluated()[0]


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, the resets' options included, for editors to complete from."""
    schema = Recipe.model_json_schema()
    resets = []
    for name, method in RESETS.items():
        options = method.options.model_json_schema()
        former = [old for old, new in FORMER.items() if new == name]
        options["properties"]["method"] = {"enum": [name, *former]} if former else {"const": name}
        options["required"] = [*options.get("required", []), "method"]
        resets.append(options)
    reset = {"anyOf": [{"enum": [*RESETS, *FORMER]}, *resets]}
    arms = {"anyOf": [reset, {"type": "array", "items": reset}]}
    schema["$defs"]["PhaseSection"]["properties"]["arms"] = {"type": "object", "additionalProperties": arms}
    # What a validator accepts in shorthand, editors must accept too.
    sections = schema["$defs"]
    lists = {"PhaseSection": "keep", "EvaluateSection": "data", "GenerateSection": "prompts"}
    shorthands = [(schema, "seed"), (schema, "report_to"), *((sections[name], key) for name, key in lists.items())]
    for section, key in shorthands:
        listed = section["properties"][key]
        section["properties"][key] = {"anyOf": [listed["items"], listed]}
    for key in ("model", "tokenizer"):
        schema["properties"][key] = {"anyOf": [{"type": "string"}, schema["properties"][key]]}
    # Beside an architecture stand keys of its config.
    beside = {**sections["ModelSection"], "required": ["architecture"], "additionalProperties": True}
    schema["properties"]["model"]["anyOf"].append(beside)
    for option in schema["$defs"]["PhaseOptimizerSection"]["properties"].values():
        option.pop("default")  # what is not given is the recipe's
    phase = schema["$defs"]["PhaseSection"]["properties"]
    phase["start_from"] = {"type": "object", "description": phase["start_from"].get("description", "")}
    return schema
