"""One checkpoint has one perplexity, whoever measures it and whatever it was trained in.

`pytest tests/test_one_perplexity.py -rP` prints the table.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.models import tiny_gpt2, tiny_llama
from support.ranks import run_ranks
from support.training import FSDP2
from transformers import AutoModelForCausalLM, AutoTokenizer

from fire_llm import UserError, load_recipe, perplexity, run_recipe
from fire_llm.core import hardware
from fire_llm.data import train_tokenizer
from fire_llm.data.corpora import CorpusSpec, resolve
from fire_llm.evaluation.checkpoints import score_checkpoints
from fire_llm.evaluation.measurement import all_described, first_token
from fire_llm.evaluation.precision import own_precision, precision_of
from fire_llm.experiment.evaluate_run import evaluate_run
from fire_llm.experiment.stages import final_checkpoint
from fire_llm.experiment.summary import Summary
from fire_llm.reporting.schema import Results

CONTEXT = 32
WORDS = ["fire", "resets", "the", "weights", "of", "a", "model", "so", "that", "it", "may", "learn", "again"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Write text to train on and held-out text of a whole number of windows.

    lm_eval's last window reaches back to be full, ours is the rest: where all are full, both are the same.
    """
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(3)
    picks = torch.multinomial(torch.linspace(1, 5, len(WORDS)), 9000, True, generator=generator)
    documents = [" ".join(WORDS[i] for i in chunk) for chunk in picks.split(60)]
    write = {"train": documents[:-12], "held-out": documents[-12:-1]}
    for name, lines in write.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = train_tokenizer([resolve("a", CorpusSpec(**files()), folder)], 300, progress=False)
    so_far = sum(len(tokenizer(text)["input_ids"]) + 1 for text in write["held-out"])
    last = documents[-1]
    while (so_far + len(tokenizer(last)["input_ids"]) + 1) % CONTEXT:
        last = last[:-1]
    assert last
    with (folder / "held-out.jsonl").open("a") as file:
        file.write(json.dumps({"text": last}) + "\n")
    return folder


def files() -> dict[str, str]:
    return {"files": "train.jsonl", "validation": "held-out.jsonl"}


def recipe_data(texts: Path, trained_in: str, **evaluate) -> dict:
    return {
        "name": "one",
        "data_root": str(texts),
        "model": {"preset": "gpt-tiny", "context": CONTEXT, "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
        "tokenizer": {"train": 300},
        "corpora": {"a": files()},
        # Large enough for bf16 weights to give another number, as the test of `training` shows.
        "optimizer": {"lr": 1.0e-2, "min_lr": 1.0e-3},
        "batch": {"tokens_per_step": 8 * CONTEXT, "sequences_per_device": 2},
        "precision": trained_in,
        "phases": [{"name": "only", "data": {"a": 1.0}, "steps": 12}],
        "evaluate": {"every_steps": 6, **evaluate},
    }


def run_rank(rank, world, data, folder, environment):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    with redirect_stderr(StringIO()):
        results = run_recipe(load_recipe(data), folder)
        measured = evaluate_run(folder, progress=False)
    return results["phases"][0]["final"]["a"]["nll"], measured["rows"][-1]["nll"]


def run_and_measure(texts, folder, precision, world, environment) -> tuple[float, float]:
    """Return what the run says of its last step and what `eval RUN_DIR` says of it, on as many processes."""
    data = recipe_data(texts, precision)
    if world == 1:
        return run_rank(0, 1, data, folder, environment)
    (folder.parent / "ranks").mkdir()
    each = run_ranks(world, run_rank, folder.parent / "ranks", data, folder, environment)
    assert each == [each[0]] * world
    return each[0]


def plain_loop(checkpoint: Path, stream: list[int]) -> float:
    """Return the mean NLL of a stream in disjoint windows, by nothing but transformers and torch, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    total = 0.0
    for start in range(0, len(stream) - 1, CONTEXT):
        window = torch.tensor(stream[start : start + CONTEXT + 1])
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1]).logits[0].double()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (len(stream) - 1)


def by_lm_eval(checkpoint: Path, stream: list[int]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=4)
    text = tokenizer.decode(stream[1:])
    assert tokenizer(text)["input_ids"] == stream[1:]
    request = Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    return -lm.loglikelihood_rolling([request], disable_tqdm=True)[0] / (len(stream) - 1)


PLACES = {"alone": (1, {}), "replicas": (2, {}), "shards": (2, FSDP2)}
IN_THE_DEFAULT_RUN = {("fp32", "alone"), ("bf16", "alone"), ("fp16", "alone"), ("bf16", "replicas"), ("bf16", "shards")}


@pytest.mark.parametrize(
    ("precision", "place"),
    [
        pytest.param(p, at, marks=[] if (p, at) in IN_THE_DEFAULT_RUN else pytest.mark.slow)
        for p in ("fp32", "bf16", "fp16")
        for at in PLACES
    ],
)
def test_run_eval_of_the_run_eval_of_the_checkpoint_a_plain_loop_and_lm_eval_agree(precision, place, texts, tmp_path):
    folder = tmp_path / "run"
    found = dict(zip(("run", "eval RUN_DIR"), run_and_measure(texts, folder, precision, *PLACES[place]), strict=True))
    checkpoint = final_checkpoint(folder / "only" / "seed-1")
    held_out = str(texts / "held-out.jsonl")
    found["eval CHECKPOINT"] = score_checkpoints([str(checkpoint)], [held_out], progress=False).rows[0].nll
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stream = [tokenizer.eos_token_id]
    for line in Path(held_out).read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    found["plain loop"] = plain_loop(checkpoint, stream)
    found["lm_eval"] = by_lm_eval(checkpoint, stream)
    print(f"{precision}, {place}: " + ", ".join(f"{who} {np.exp(nll):.10f}" for who, nll in found.items()))
    for who, nll in found.items():
        assert nll == pytest.approx(found["plain loop"], rel=1e-6 if who == "lm_eval" else 1e-9), who


def test_fp16_on_a_cpu_is_fp16_and_resumes_bit_for_bit(texts, tmp_path):
    """accelerate would train in fp32 instead, and say nothing."""
    data = {**recipe_data(texts, "fp16"), "save_every_steps": 6, "keep_last": 2}
    results = run_recipe(load_recipe(data), tmp_path / "whole", progress=False)
    alone = run_recipe(load_recipe(recipe_data(texts, "fp32")), tmp_path / "fp32", progress=False)
    assert results["phases"][0]["final"]["a"]["nll"] != alone["phases"][0]["final"]["a"]["nll"]
    last = final_checkpoint(tmp_path / "whole" / "only" / "seed-1")
    assert torch.load(last / "scaler.pt", weights_only=True)["scale"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / last.relative_to(tmp_path / "whole"))
    again = run_recipe(load_recipe(data), tmp_path / "again", progress=False)
    assert again["phases"][0]["final"] == results["phases"][0]["final"]


def test_a_run_in_bf16_can_be_measured_in_bf16_and_says_so(texts, tmp_path):
    exact = run_recipe(load_recipe(recipe_data(texts, "bf16")), tmp_path / "fp32", progress=False)
    mixed = run_recipe(load_recipe(recipe_data(texts, "bf16", precision="training")), tmp_path / "bf16", progress=False)
    a, b = (results["phases"][0]["final"]["a"]["nll"] for results in (exact, mixed))
    assert a != b and a == pytest.approx(b, rel=1e-2)
    assert exact["phases"][0]["batches_hash"] == mixed["phases"][0]["batches_hash"]
    assert [results["measurement"]["precision"] for results in (exact, mixed)] == ["fp32", "bf16"]
    shared = {"context": CONTEXT, "stride": CONTEXT, "per_document": False, "prefix": 0}
    assert exact["measurement"] == {"precision": "fp32", **shared, "prefix_text": "<|endoftext|>"}


@pytest.mark.parametrize("native", [True, False], ids=["native-bf16", "without-bf16"])
def test_auto_follows_the_processor_and_perplexity_does_not(native, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: native)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    folder = tmp_path / "run"
    results = run_recipe(load_recipe(recipe_data(texts, "auto")), folder, progress=False)
    spec = json.loads((folder / "only" / "seed-1" / "unit.json").read_text())
    assert spec["precision"] == ("bf16" if native else "fp32")
    measured = evaluate_run(folder, progress=False)["rows"][-1]
    assert measured["precision"] == results["measurement"]["precision"] == "fp32"
    assert measured["nll"] == pytest.approx(results["phases"][0]["final"]["a"]["nll"], rel=1e-9)


@pytest.fixture
def accelerator():
    """Give accelerate's bf16, whose state is the process's, and take it away again."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_autocast_and_what_accelerate_lays_over_a_model_are_set_aside_and_put_back(build, accelerator):
    tokens = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    plain = perplexity(build(), tokens, context=32)
    prepared = accelerator.prepare(build())
    laid_over = prepared.forward
    assert perplexity(prepared, tokens, context=32).nll == plain.nll
    assert prepared.forward is laid_over
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert perplexity(build(), tokens, context=32).nll == plain.nll
        assert torch.is_autocast_enabled("cpu")
    mixed = perplexity(prepared, tokens, context=32, mixed=True)
    assert mixed.nll != plain.nll and mixed.nll == pytest.approx(plain.nll, rel=1e-2)
    assert (plain.precision, mixed.precision) == ("fp32", "mixed")


def test_the_precision_of_bf16_weights_is_their_own():
    model = tiny_llama().to(torch.bfloat16)
    tokens = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    measured = perplexity(model, tokens, context=32)
    assert precision_of(model) == measured.precision == "bf16"
    assert measured.nll != perplexity(model.float(), tokens, context=32).nll


def shard_and_measure(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tokens = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    alone = perplexity(tiny_llama(), tokens, context=32).nll
    model = tiny_llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    ids = tokens[None, :16]

    def gradients():
        loss = model(input_ids=ids, labels=ids).loss
        assert loss.dtype == torch.bfloat16
        loss.backward()
        found = [p.grad.full_tensor().clone() for p in model.parameters()]
        model.zero_grad()
        return found

    before = perplexity(model, tokens, context=32, share=True).nll  # before FSDP2 has set itself up
    first = gradients()
    between = perplexity(model, tokens, context=32, share=True).nll
    same = all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    with own_precision(model):
        inside = model(input_ids=ids).logits.dtype
    mixed = perplexity(model, tokens, context=32, share=True, mixed=True).nll
    return alone, before, between, same, inside, mixed


def test_shards_gathered_in_bf16_are_measured_in_fp32_and_go_on_training_as_before(tmp_path):
    for alone, before, between, same, inside, mixed in run_ranks(2, shard_and_measure, tmp_path):
        assert before == pytest.approx(alone, rel=1e-9) and between == pytest.approx(alone, rel=1e-9)
        assert same and inside == torch.float32
        assert abs(mixed / alone - 1) > 1e-7


def accumulate(rank, world):
    """Return the gradients of two micro-batches, with and without a perplexity between them, for two policies."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    batches = torch.randint(0, 97, (2, 1, 17), generator=torch.Generator().manual_seed(rank))
    found = []
    for reduce in (None, torch.float32):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
        for measured in (False, True):
            model = tiny_llama()
            for part in (*model.model.layers, model):
                fully_shard(part, mp_policy=policy)
            for last, ids in enumerate(batches):
                model.set_requires_gradient_sync(bool(last))
                model(input_ids=ids, labels=ids).loss.backward()
                if measured:
                    perplexity(model, torch.arange(50), context=16, share=True)
            found.append([p.grad.full_tensor() for p in model.parameters()])
    return found


def test_gradients_of_the_micro_batches_so_far_outlast_a_perplexity(tmp_path):
    for a, b, c, d in run_ranks(2, accumulate, tmp_path):
        for without, between in ((a, b), (c, d)):
            assert all(torch.equal(x, y) for x, y in zip(without, between, strict=True))


def test_attention_that_takes_no_fp32_gives_way_and_comes_back(monkeypatch):
    """As flash-attention's package does, with which a model may train under bf16."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    def half_alone(module, query, *args, **kwargs):
        if query.dtype == torch.float32:
            raise RuntimeError("only supports fp16 and bf16")
        return ATTENTIONS["sdpa"](module, query, *args, **kwargs)

    monkeypatch.setitem(ATTENTIONS._global_mapping, "half_alone", half_alone)
    monkeypatch.setitem(MASKS._global_mapping, "half_alone", MASKS["sdpa"])
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(1))
    plain = perplexity(tiny_llama(), tokens, context=32).nll
    model = tiny_llama()
    model.set_attn_implementation("half_alone")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert perplexity(model, tokens, context=32).nll == plain
    assert model.config._attn_implementation == "half_alone"
    half = perplexity(model.to(torch.bfloat16), tokens, context=32)
    assert half.precision == "bf16" and half.nll == pytest.approx(plain, rel=1e-2)


def test_an_error_inside_puts_everything_back(accelerator):
    prepared = accelerator.prepare(tiny_llama())
    laid_over, before = prepared.forward, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(ZeroDivisionError), own_precision(prepared), own_precision(prepared):
                raise ZeroDivisionError
            assert torch.is_autocast_enabled("cpu")
        assert prepared.forward is laid_over and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_precision_of_a_models_weights_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(9, 9, dtype=torch.bfloat16))
    assert precision_of(model) == "bf16 and fp32" and precision_of(model[0]) == "fp32"


def test_where_rows_were_measured_in_several_ways_each_says_whose_it_is():
    one = {"precision": "fp32", "context": 8, "stride": 4, "prefix": 3, "per_document": False}
    rows = [{**one, "checkpoint": "a"}, {**one, "checkpoint": "a"}, {**one, "checkpoint": "b"}]
    way = "context 8, stride 4, windows run across documents, after token 3"
    assert all_described(rows) == [f"in fp32, {way}"]
    rows.append({**one, "checkpoint": "c", "precision": "bf16"})
    assert all_described(rows) == [f"a, b: in fp32, {way}", f"c: in bf16, {way}"]


def test_a_sweep_over_how_it_is_measured_says_every_way():
    curve = [{"step": 1, "tokens": 1, "eval": {"a": {"nll": 1.0}}}]
    run = {"phase": "only", "arm": "base", "seed": 1, "final": {"a": {"nll": 1.0}}, "curve": curve}
    arms = {"base": {"label": "", "final": run["final"], "curve": curve, "runs": [run]}}
    how = {"context": 8, "stride": 8, "per_document": False, "prefix": 3}
    results = [
        Results.model_validate(
            {
                "schema_version": 2,
                "arms": arms,
                "arms_phase": "only",
                "new_corpus": "a",
                "first_corpus": "a",
                "measurement": {"precision": p, **how},
            }
        )
        for p in ("fp32", "bf16", "fp32")
    ]
    told = Summary([SimpleNamespace(settings={})] * 3, results).legend()
    assert told.count("Measured in fp32") == 1 and told.count("Measured in bf16") == 1


def special(bos: int | None, eos: int | None) -> SimpleNamespace:
    return SimpleNamespace(bos_token_id=bos, eos_token_id=eos)


@pytest.mark.parametrize(("bos", "eos", "first"), [(1, 2, 1), (None, 2, 2), (0, 0, 0)])
def test_the_token_read_first_is_lm_evals(bos, eos, first):
    theirs = HFLM.prefix_token_id.fget(SimpleNamespace(custom_prefix_token_id=None, tokenizer=special(bos, eos)))
    assert first_token(special(bos, eos)) == theirs == first


def test_another_token_may_be_read_first_or_none():
    assert first_token(special(1, 2), "eos") == 2 and first_token(special(1, 2), "none") is None
    with pytest.raises(UserError, match="the tokenizer of 'm' has no such token"):
        first_token(special(None, 2), "bos", "m")


def test_the_probe_of_the_processor_can_be_overruled(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for given, precision in (("1", "bf16"), ("0", "fp32")):
        monkeypatch.setenv(hardware.CPU_BF16, given)
        assert hardware.resolve_precision("auto") == precision
    monkeypatch.setenv(hardware.CPU_BF16, "yes")
    with pytest.raises(UserError, match="FIRE_LLM_CPU_BF16 is 'yes': set it to 1"):
        hardware.resolve_precision("auto")
