"""What results.json and evaluation.json hold, typed: written once by a run, read as attributes by tables and pages.

A run writes every field. A field with a default may be missing from a file of an older fire_llm. A number that is not
finite or was not measured is None, and `null` in the file.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from fire_llm.resets import FORMER

SCHEMA_VERSION: Final = 2
"""Of results.json; a field that changes its meaning or goes away raises it, one that is added does not."""

EVALUATION_VERSION: Final = 1
"""Of evaluation.json."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Method = Annotated[str, BeforeValidator(lambda name: FORMER.get(name, name) if isinstance(name, str) else name)]
"""A method by the name that it has now."""

Number = Annotated[float | None, BeforeValidator(_finite)]
"""A number; None where it was not measured or is not finite, which JSON and browsers have no word for."""


class Record(BaseModel):
    """A part of the results: no field changes, no key is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Versions(Record):
    """The versions that the run used; null where a library has no metadata."""

    fire_llm: str | None = Field(None, description="This package")
    torch: str | None = Field(None, description="PyTorch, with its build: `2.13.0+cpu`")
    transformers: str | None = Field(None, description="Models and tokenizers")
    accelerate: str | None = Field(None, description="Processes and precision")
    datasets: str | None = Field(None, description="Corpora of the Hub")
    tokenizers: str | None = Field(None, description="Trained tokenizers")
    numpy: str | None = Field(None, description="Sampling")
    python: str | None = Field(None, description="The interpreter")
    git: str | None = Field(None, description="Commit of the checkout that ran; null outside a checkout")


class Hardware(Record):
    """The machine that wrote the results."""

    cpu: str | None = Field(None, description="Model of the processor")
    cores: int | None = Field(None, description="Logical cores")
    memory_gib: Number = Field(None, description="Main memory, GiB")
    accelerator: str | None = Field(None, description="Name of the GPU; null without one")


class ModelSummary(Record):
    """The model that the run trains."""

    parameters: int = Field(description="Number of parameters, tied ones once")
    description: str = Field(description="Class and sizes in words")


class Measurement(Record):
    """How every perplexity of the run was measured."""

    precision: str | None = Field(None, description="Of weights and products: fp32, bf16, fp16")
    context: int = Field(description="Tokens of a window")
    stride: int = Field(description="Tokens between the beginnings of two windows")
    per_document: bool = Field(description="Whether each document was read by itself; else windows run across them")
    prefix: int | None = Field(None, description="Id of the token read before the text; null for none")
    prefix_text: str | None = Field(None, description="That token as the tokenizer writes it")


class CorpusSize(Record):
    """Size of a corpus after tokenisation; null for a part that the run does not read."""

    train_tokens: int | None = Field(None, description="Tokens to train on")
    validation_tokens: int | None = Field(None, description="Held-out tokens")
    validation_bytes: int | None = Field(None, description="UTF-8 bytes of the held-out text")


class Start(Record):
    """The checkpoint that a run started from, before any reset."""

    phase: str = Field(description="Phase that wrote it")
    arm: str | None = Field(None, description="Arm of that phase; null where it has none")
    checkpoint: str = Field(description="`final`, `best`, `ema`, or the optimizer steps after which it was kept")
    step: int | None = Field(None, description="Optimizer steps behind it, within its phase")


class Scores(Record):
    """How well a model predicts the held-out text of a corpus."""

    nll: Number = Field(description="Mean negative log-likelihood, nats per token; of several seeds their mean")
    perplexity: Number = Field(None, description="exp(nll)")
    bits_per_byte: Number = Field(None, description="The same sum in bits per UTF-8 byte of the text")
    tokens: int | None = Field(None, description="Tokens scored")
    bytes: int | None = Field(None, description="UTF-8 bytes of the text; null in a mean")
    nll_std: Number = Field(
        None, description="Sample standard deviation of nll over seeds, nats per token; null for one"
    )


class Diagnostics(Record):
    """How plastic a model is, measured on held-out text (docs/diagnostics.md)."""

    srank: Number = Field(None, description="srank with δ = 0.01 of the last hidden states")
    srank_share: Number = Field(None, description="srank over their width")
    dormant_share: Number = Field(None, description="Share of the MLPs' units with a score of at most 0.025")
    hessian_eigenvalue: Number = Field(
        None, description="Eigenvalue of the largest magnitude of the Hessian of the mean NLL, with its sign"
    )
    hessian_residual: Number = Field(None, description="Some eigenvalue lies within this distance of it")
    gradient_norm: Number = Field(None, description="Norm of the gradient of the mean NLL, over all parameters")
    dfi_mean: Number = Field(None, description="Mean DfI of the attention and MLP matrices")
    dfi_median: Number = Field(None, description="Median DfI of them")
    sfe: Number = Field(
        None, description="Total SFE of them against the weights that the phase started from, before its reset"
    )


class CurveEntry(Record):
    """A step at which something was logged or measured; step 0 is right after the reset."""

    step: int = Field(description="Optimizer steps of this phase")
    tokens: int = Field(description="Tokens trained on in this phase")
    learning_rate: Number = Field(None, description="At this step")
    train_loss: Number = Field(None, description="Mean NLL since the last log, nats per token")
    eval: dict[str, Scores] = Field({}, description="By corpus; empty at most steps")
    ema: dict[str, Scores] = Field(
        {}, description="The same of the weights' moving average; empty without one, and at step 0, where it is them"
    )
    diagnostics: Diagnostics | None = Field(None, description="Null at most steps")


class Throughput(Record):
    """Speed and memory over the steps that one logged training loss is the mean of; never the same in two runs."""

    step: int = Field(description="Optimizer steps of this phase")
    tokens_per_second: Number = Field(None, description="Over all ranks")
    mfu: Number = Field(None, description="Model FLOPs utilisation: share of the devices' peak, 0 to 1")
    peak_memory_bytes: int | None = Field(None, description="Most bytes held by rank 0")
    data_wait_share: Number = Field(None, description="Share of the time spent waiting for data, 0 to 1")


class LossJump(Record):
    """What a reset did to the loss on one corpus at once."""

    before: Number = Field(None, description="NLL of the parent checkpoint, nats per token")
    after: Number = Field(None, description="NLL right after the reset, nats per token")
    uniform: Number = Field(None, description="ln V: NLL of a uniform guess among V tokens, nats per token")
    undone: Number = Field(
        None, description="(after − before) / (uniform − before); null where the parent was no better than a guess"
    )
    regained_at_step: int | None = Field(
        None, description="First evaluated step with an NLL of at most `before`; null where there is none"
    )


class Overtraining(Record):
    """What the phase before said of the checkpoint that it handed on, and whether a reset acted on it for that."""

    applied: bool = Field(description="Whether the checkpoint was overtrained, so that the reset acted")
    corpora: list[str] = Field(description="Whose held-out text it is: the phase's own, weighted as it read them")
    threshold: float = Field(description="Nats a token above the lowest that are too many")
    step: int = Field(description="Optimizer steps behind the checkpoint, within its phase")
    nll: float = Field(description="Held-out NLL of the checkpoint, nats per token")
    lowest: float = Field(description="The lowest that the phase had measured by then, after its first step")
    lowest_step: int = Field(description="Where that was")
    train_loss: float = Field(description="Training loss logged last before the checkpoint, nats per token")
    lowest_train_loss: float = Field(description="The same before the lowest held-out NLL")


class ResetSetting(Record):
    """One reset, penalty or recycling with its options."""

    method: Method = Field(description="Name of the method")
    options: dict[str, JsonValue] = Field({}, description="All options, defaults included")
    roles: list[str] = Field([], description="Roles of the parameters that it acts on")
    exclude: list[str] = Field([], description="Regular expressions of parameters that it leaves alone")
    include: list[str] = Field([], description="Regular expressions of those that it acts on alone; of all where empty")
    layers: str = Field("", description="Layers that it acts on alone, such as `4-11`; all where empty")
    when: dict[str, float] | None = Field(
        None, description="Condition under which it acts, and its number: `overtrained`; null for always"
    )
    found: Overtraining | None = Field(None, description="What the condition found; null where there is none")


class TensorEntry(Record):
    """A logical matrix or another parameter before and after the resets."""

    name: str = Field(description="Parameter and part: `transformer.h.3.attn.c_attn.weight[q]`")
    parameter: str = Field("", description="First half of the name: the parameter")
    part: str = Field("", description="Second half: the matrix, where one parameter holds several")
    role: str = Field("", description="attention, mlp, ssm, conv, embedding, lm_head, norm, bias, router or other")
    shape: list[int] = Field([], description="[out, in], whatever the storage order; of a kernel [out, in, k, …]")
    reason: str | None = Field(None, description="Why it was left alone; null where it was changed")
    sfe: Number = Field(0.0, description="‖W − W̃‖²_F between before and after")
    dfi_before: Number = Field(None, description="‖WᵀW − I‖²_F on the smaller Gram matrix; null where not measured")
    dfi_after: Number = Field(None, description="The same after the resets")
    norm_before: Number = Field(None, description="Frobenius norm; null for what was left alone in shards")
    norm_after: Number = Field(None, description="The same after the resets")
    sigma_before: list[Number] | None = Field(
        None,
        description="Up to 64 quantiles of the singular values, descending; in `fire.json` the largest and the "
        "smallest (relative error 1e-3); null where not measured",
    )
    sigma_after: list[Number] | None = Field(None, description="The same after the resets")
    residual: Number = Field(
        None,
        description="‖XXᵀ − I‖_F / √n of the result X scaled to ‖X‖_F = √n: 0 for a multiple of an orthogonal matrix",
    )


class ResetEntry(Record):
    """What the resets of an arm changed, what they left alone and why."""

    resets: list[ResetSetting] = Field([], description="In the order applied")
    training: list[ResetSetting] = Field([], description="What acts during the phase: penalties and recycling")
    seconds: Number = Field(None, description="Time of the resets, without the measuring, seconds")
    measuring_seconds: Number = Field(None, description="Time of measuring before and after, seconds")
    copying_seconds: Number = Field(
        None, description="In `fire.json`: time of copying files, and of hashing them before and after, seconds"
    )
    shared_by: int = Field(1, description="Most ranks that shared the work; 1 where each did all of it")
    gathered_whole: int = Field(
        0, description="Parameters gathered whole on every rank, placed neither whole nor in shards along one axis"
    )
    optimizer_states_cleared: int | None = Field(None, description="Parameters whose optimizer state was cleared")
    touched: list[TensorEntry] = Field([], description="One entry a matrix or parameter that was changed")
    untouched: list[TensorEntry] = Field([], description="The same for what was left alone, each with its `reason`")
    kept_unread: list[str] = Field(
        [], description="In `fire.json`: stored tensors that the model's class does not load"
    )
    not_copied: list[str] = Field([], description="In `fire.json`: files that do not belong to a model")
    nll: dict[str, list[float]] = Field(
        {}, description="In `fire.json`: by text of `--measure-on`, NLL before and after, nats per token"
    )


class Sample(Record):
    """Text that the model wrote, for people to read."""

    step: int = Field(description="Optimizer steps of this phase")
    before_reset: bool = Field(False, description="Whether the weights are those from before the reset; step 0 alone")
    prompt: str = Field(description="What it was written after, as the recipe gives it")
    text: str = Field(description="What was written, without the prompt")


class Run(Record):
    """One phase as one arm and one seed went through it."""

    phase: str = Field(description="Name of the phase")
    arm: str | None = Field(None, description="Name of the arm; null in a phase without arms")
    seed: int = Field(description="Seed of weights, data and resets")
    start: Start | None = Field(None, description="Null where it began with the run's first weights")
    steps: int | None = Field(None, description="Optimizer steps")
    planned_steps: int | None = Field(
        None, description="Steps that it would have had, where it stopped early (`stop`); null where it did not"
    )
    tokens_per_step: int | None = Field(None, description="Tokens of one optimizer step, over all ranks")
    seconds: Number = Field(None, description="Wall-clock time of training, seconds")
    batches_hash: str | None = Field(
        None, description="Hash of the token ids in the order trained on: equal where two runs saw the same batches"
    )
    checkpoint: str | None = Field(None, description="The last checkpoint, relative to the run's folder")
    weights: dict[str, str] = Field({}, description="By checkpoint that is kept: the hash of its weights")
    curve: list[CurveEntry] = Field([], description="By step")
    diagnosed_on: str | None = Field(
        None, description="Corpus whose held-out text `diagnostics` are measured on; null where there are none"
    )
    final: dict[str, Scores] = Field({}, description="By corpus, the last evaluation")
    final_ema: dict[str, Scores] = Field(
        {}, description="The same of the weights' moving average (`ema`); empty without one"
    )
    throughput: list[Throughput] = Field([], description="One entry a logged training loss")
    skipped_steps: int = Field(
        0, description="Optimizer steps left out because a loss or gradient was not finite (`nonfinite: skip`)"
    )
    recycled_units: int = Field(
        0, description="Hidden units that redo, continual_backprop and snr drew again, each as often as it was"
    )
    loss_jump: dict[str, LossJump] = Field(
        {}, description="Of an arm, by corpus that its parent was measured on at that step"
    )
    reset: ResetEntry | None = Field(None, description="Null in a phase without arms")
    samples: list[Sample] = Field([], description="What the model wrote, by step and prompt (`generate`)")


class Arm(Record):
    """An arm of the phase that is compared: the runs of all its seeds and their means."""

    label: str = Field("", description="Its resets in words")
    methods: list[Method] = Field([], description="Methods of its resets, penalties and recycling")
    final: dict[str, Scores] = Field({}, description="By corpus, means over the seeds")
    curve: list[CurveEntry] = Field([], description="Mean of the runs' curves")
    runs: list[Run] = Field([], description="One a seed")


class Bootstrap(Record):
    """How standard errors were found: documents drawn with replacement, again and again."""

    resamples: int = Field(description="Number of draws")
    seed: int = Field(description="Of the draws")
    over: str = Field(description="What is drawn: documents")


class EvaluationSettings(Record):
    """What holds for all numbers of an evaluation."""

    max_tokens: int | None = Field(None, description="Most held-out tokens of a corpus; null for all")
    device: str | None = Field(None, description="Where it was measured")
    words: str | None = Field(None, description="What counts as a word")
    bootstrap: Bootstrap | None = Field(None, description="Of the standard errors")
    level: Number = Field(None, description="Share of intervals that hold the true value, 0 to 1")


class EvaluationRow(Record):
    """One checkpoint of a run on one held-out text."""

    checkpoint: str = Field(
        description="Folder relative to the run's; `init/seed-1` for initial weights; the name given where a run "
        "began with a checkpoint"
    )
    phase: str | None = Field(None, description="Phase that wrote it; null for what the run began with")
    arm: str | None = Field(None, description="Its arm; null where the phase has none")
    seed: int | None = Field(None, description="Its seed; null for a checkpoint that the run began with")
    step: int = Field(0, description="Optimizer steps behind it, within its phase")
    labels: list[str] = Field([], description="`init` or `start`, `final`, `best`, `ema`, or kept steps")
    weights: str | None = Field(None, description="Hash of its weights; null for initial weights")
    data: str = Field(description="Corpus")
    split: str | None = Field(None, description="Always `validation`")
    prefix_text: str | None = Field(None, description="The token read first, as the tokenizer writes it")
    nll: Number = Field(None, description="Mean negative log-likelihood, nats per token")
    perplexity: Number = Field(None, description="exp(nll)")
    bits_per_byte: Number = Field(None, description="The same sum in bits per UTF-8 byte")
    byte_perplexity: Number = Field(None, description="exp of the sum per byte")
    word_perplexity: Number = Field(None, description="exp of the sum per word")
    tokens: int | None = Field(None, description="Tokens scored")
    bytes: int | None = Field(None, description="UTF-8 bytes of the text")
    words: int | None = Field(None, description="Words of the text: pieces between runs of white space")
    documents: int | None = Field(None, description="Documents of the text")
    context: int = Field(description="Tokens of a window")
    stride: int = Field(description="Tokens between the beginnings of two windows")
    prefix: int | None = Field(None, description="Id of the token read first; null for none")
    per_document: bool = Field(description="Whether each document was read by itself")
    precision: str | None = Field(None, description="Of weights and products: fp32, bf16, `bf16 and fp32`")
    se: dict[str, Number] | None = Field(
        None, description="Standard errors by a bootstrap over documents, by measure; null where there is none"
    )


class Transfer(Record):
    """By how much the loss on a corpus differs between two checkpoints of a run, documents paired."""

    data: str = Field(description="Corpus")
    phase: str = Field(description="The phase that forgets, or before which transfer is measured")
    arm: str | None = Field(None, description="Its arm; null for forward transfer, which arms share")
    seed: int = Field(description="Its seed")
    after: str = Field(description="Checkpoint whose NLL counts positive")
    before: str = Field(description="Checkpoint whose NLL is taken from it")
    mean: float = Field(description="NLL(after) − NLL(before), nats per `unit`")
    se: Number = Field(None, description="Standard error of `mean`; null for one document")
    low: Number = Field(None, description="Lower end of the interval; null for one document")
    high: Number = Field(None, description="Upper end of the interval; null for one document")
    unit: str = Field("byte", description="byte, so that tokenizers compare")
    level: float = Field(0.95, description="Share of such intervals that hold the true difference, 0 to 1")
    documents: int | None = Field(None, description="Documents that were paired")
    trained_in: str = Field(
        description="Phase that trained on the corpus: the latest earlier one, or, for forward transfer, the first"
    )
    replayed: bool | None = Field(
        None, description="Whether `phase` trained on the corpus too; null for forward transfer"
    )


class Evaluation(Record):
    """evaluation.json: the checkpoints of a run × its held-out texts, measured from the disk."""

    schema_version: Literal[1] = Field(description="Of evaluation.json")
    name: str | None = Field(None, description="Of the run")
    created: str | None = Field(None, description="When it was evaluated, ISO 8601")
    settings: EvaluationSettings = Field(EvaluationSettings(), description="What holds for all numbers")
    left_out: dict[str, str] = Field({}, description="Corpora without held-out text: why")
    unfinished: list[str] = Field([], description="Folders of what has not been trained to its end")
    reused: int = Field(0, description="Rows taken over from an earlier evaluation of the same weights and text")
    rows: list[EvaluationRow] = Field([], description="One a checkpoint and corpus")
    forgetting: list[Transfer] = Field([], description="Empty for a run of one phase; positive is lost")
    forward_transfer: list[Transfer] = Field([], description="Empty for a run of one phase; negative helps")


class Results(Record):
    """results.json: what a run found, and what one needs to repeat it."""

    schema_version: Literal[2] = Field(description="Of results.json")
    name: str | None = Field(None, description="Of the recipe")
    created: str | None = Field(None, description="When it was written, ISO 8601")
    recipe: dict[str, JsonValue] | None = Field(None, description="The resolved recipe: every default written out")
    versions: Versions = Field(Versions(), description="Versions that the run used")
    hardware: Hardware = Field(Hardware(), description="The machine that wrote the file")
    model: ModelSummary | None = Field(None, description="What is trained")
    corpora: dict[str, CorpusSize] = Field({}, description="By name: sizes after tokenisation")
    measurement: Measurement | None = Field(None, description="How every perplexity was measured")
    phase_corpus: dict[str, str] = Field({}, description="By phase, the corpus that weighs most in its mixture")
    phases: list[Run] = Field(
        [], description="One entry a seed of every phase before the compared arms, and of every arm of such a phase"
    )
    arms_phase: str | None = Field(None, description="Phase whose arms are compared: the last that has any")
    first_corpus: str | None = Field(None, description="Heaviest corpus of the first phase: retention is judged on it")
    new_corpus: str | None = Field(None, description="Heaviest corpus of the arms' phase: plasticity is judged on it")
    arms: dict[str, Arm] = Field(
        description="By name. With several warm starts the names carry them: `fire@best`, `fire@30000`"
    )
    unfinished: dict[str, str] = Field(
        {}, description="By folder, how far what has not been trained to its end is; such runs are in no other field"
    )
    evaluation: Evaluation | None = Field(
        None, exclude=True, description="Read from evaluation.json beside it, not stored"
    )
    evaluation_note: str = Field(
        "", exclude=True, description="What is to be known of evaluation.json, not stored: of other weights, or unknown"
    )


class InspectedMatrix(BaseModel):
    """What `fire-llm inspect` measured of one matrix; measures that it lacks are None, other keys are passed over."""

    name: str
    role: str | None = None
    shape: tuple[int, ...] = ()
    sigma_min: Number = None
    sigma_median: Number = None
    sigma_max: Number = None
    dfi: Number = None
    effective_rank: Number = None
    norm: Number = None
    sigma: list[Number] | None = None
    """Singular values, descending quantiles."""
    sfe: Number = None
    """Squared Frobenius distance to the other checkpoint."""
    cosine: Number = None
    """With the other checkpoint."""


PARTS: tuple[type[Record], ...] = (
    Results, Versions, Hardware, ModelSummary, Measurement, CorpusSize, Arm, Run, Start, CurveEntry, Scores,
    Diagnostics, Throughput, LossJump, ResetEntry, ResetSetting, Overtraining, TensorEntry, Sample,
)  # fmt: skip
"""The records of results.json, in the order of docs/results-schema.md."""

EVALUATION_PARTS: tuple[type[Record], ...] = (
    Evaluation, EvaluationSettings, Bootstrap, EvaluationRow, Transfer,
)  # fmt: skip
"""The records of evaluation.json."""


def results_schema() -> dict[str, Any]:
    """Return the JSON schema of results.json, as a run writes it."""
    return Results.model_json_schema(mode="serialization")
