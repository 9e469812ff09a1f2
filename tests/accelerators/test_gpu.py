"""What only an accelerator can show: kernels, precisions, compiled graphs, waits and memory, against a CPU or fp64.

    python -m pytest tests/test_gpu.py -m gpu -o addopts= -W default -p no:cacheprovider

`FIRE_LLM_GPU_TESTS=cpu` runs on the CPU what makes sense there, which checks the tests themselves. On a GPU, Inductor,
CUDA and cuDNN warn of things of their own: `-W default` keeps these from counting as failures.

Compiling and the first call of cuSOLVER take seconds in each process. What is compiled has one model, micro-batch and
context, and one graph a precision; scripts/gpu_report.py gives each of the groups below a process of its own.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import threading
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from support.hard_logits import hard_rows, softmax_in_fp64
from support.models import tiny_gpt2, tiny_llama
from support.tiny_recipe import recipe as tiny_recipe
from transformers import GPT2LMHeadModel, TrainerCallback

from fire_llm import (
    ContinualTrainer,
    apply_reset,
    diagnose,
    fire_,
    load_recipe,
    newton_schulz,
    perplexity,
    polar,
    reset_checkpoint,
    run_recipe,
)
from fire_llm.checkpoint.inspection import inspect_checkpoint
from fire_llm.evaluation import exact_nll, kernels
from fire_llm.experiment import train as stage_training
from fire_llm.linalg import polar as projection
from fire_llm.linalg.matmul import accumulates
from fire_llm.linalg.singular_values import singular_values
from fire_llm.training import ContinualArguments, EvaluationSet, RecyclingCallback
from fire_llm.training import loss as losses_of

DEVICE = os.environ.get("FIRE_LLM_GPU_TESTS") or ("cuda" if torch.cuda.is_available() else "")
CUDA = DEVICE == "cuda"
BACKEND = "inductor" if CUDA else "aot_eager"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="there is no GPU; FIRE_LLM_GPU_TESTS=cpu checks the tests on the CPU"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="CUDA alone has this")
solving = pytest.mark.xdist_group("cuSOLVER")
compiling = pytest.mark.xdist_group("compiled in fp32")
compiling_bf16 = pytest.mark.xdist_group("compiled in bf16")

CONTEXT, MICRO, STEPS, VOCABULARY, POSITIONS = 64, 4, 6, 512, 128
SLICE = 100
"""Positions of a slice of the logits, at most: a micro-batch has 256 of them, in four slices."""
TEXT = torch.randint(0, VOCABULARY, (1000,), generator=torch.Generator().manual_seed(5)).numpy()


def gpt2(seed=0, **settings):
    sizes = {"n_embd": 64, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": POSITIONS}
    return tiny_gpt2(seed, **{**sizes, **settings})


def llama(seed=0):
    return tiny_llama(seed, hidden_size=64, intermediate_size=160, vocab_size=VOCABULARY, max_position_embeddings=128)


class Samples(torch.utils.data.Dataset):
    """Give sample i as a function of i: a few of the vocabulary's tokens, which is soon learned."""

    def __getitem__(self, i):
        tokens = torch.randint(0, 16, (CONTEXT + 1,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def train(model, folder, *, resume=None, sets=None, callbacks=(), device=DEVICE, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": device == "cpu", "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda", "accelerator_config": {"non_blocking": device == "cuda"},
    }  # fmt: skip
    arguments = ContinualArguments(**{**settings, **changes})
    trainer = ContinualTrainer(model, arguments, Samples(), sets, callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sliced(monkeypatch, positions):
    """Take the logits in slices of at most so many positions; None: whole."""
    monkeypatch.setattr(losses_of, "WHOLE", 2**40 if positions is None else 1)
    monkeypatch.setattr(losses_of, "logits_at_once", lambda _: VOCABULARY * (positions or 1))


def matrices(shape, count=3, seed=0, spectrum=None):
    """Return Gaussians (count, out, in) on the device, or random matrices with given singular values."""
    w = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if spectrum is not None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u * spectrum(torch.arange(1, s.shape[-1] + 1, dtype=torch.float64))) @ vh
    return w.float().to(DEVICE)


def paper_loop(w):
    """Return the paper's loop in fp64 on the CPU."""
    x = w.double().cpu()
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


def polar_factor(w):
    u, _, vh = torch.linalg.svd(w.double().cpu(), full_matrices=False)
    return u @ vh


def polar_factor_there(w):
    """Return polar factors (B, out, in) by Newton-Schulz in fp64 to the end, on the device: SVDs take minutes."""
    x = w.double() if w.shape[-2] >= w.shape[-1] else w.double().mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(100):
        off = x.mT @ x - eye
        x = x - x @ off / 2
        if float(off.abs().max()) < 1e-7:  # the step just taken squares it
            return x if w.shape[-2] >= w.shape[-1] else x.mT
    raise AssertionError("no polar factor was found: the matrices are singular")


def distance(found, wanted):
    """Return the worst relative Frobenius distance over a stack."""
    found = found.double().cpu()
    return float(((found - wanted).norm(dim=(-2, -1)) / wanted.norm(dim=(-2, -1))).max())


# ---- Newton-Schulz and the polar factor

SHAPES = [(64, 64), (256, 256), (768, 192), (192, 768), (320, 256)]
ROUNDING = {"float32": 1e-6, "bfloat16": 5e-4, "float16": 1e-4}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_is_the_papers_loop_in_every_precision(shape):
    w = matrices(shape)
    wanted = paper_loop(w)
    for name, bound in ROUNDING.items():
        assert distance(newton_schulz(w, compute_dtype=getattr(torch, name)), wanted) < bound, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stack_gives_what_single_matrices_give(dtype):
    w = torch.cat([matrices((256, 256)), matrices((256, 256), spectrum=lambda i: 1 / i)])
    dtype = getattr(torch, dtype)
    one_by_one = torch.stack([newton_schulz(each, compute_dtype=dtype) for each in w])
    assert distance(newton_schulz(w, compute_dtype=dtype), one_by_one.double().cpu()) < 5e-4
    assert distance(newton_schulz(w, compute_dtype=dtype), paper_loop(w)) < 5e-4


@needs_cuda
def test_low_precision_products_are_accumulated_and_returned_in_fp32():
    assert accumulates("cuda", torch.bfloat16) and accumulates("cuda", torch.float16)


@solving
@pytest.mark.parametrize("shape", [(256, 256), (768, 192), (192, 768)], ids=str)
def test_polar_is_the_factor_of_an_svd(shape):
    for spectrum in (None, lambda i: 1 / i, lambda i: 10 ** (-4 * i / i[-1])):
        w = matrices(shape, count=2, spectrum=spectrum)
        wanted = polar_factor(w)
        for tolerance in (1e-3, 1e-5):
            assert distance(polar(w, tolerance), wanted) < tolerance


STACKS = [(48, 768, 768), (12, 3072, 768), (12, 768, 3072)] if CUDA else [(6, 96, 96), (3, 384, 96), (3, 96, 384)]


@solving
@pytest.mark.parametrize("sizes", STACKS, ids=str)
def test_polar_finds_all_factors_of_a_models_stack(sizes, monkeypatch):
    """Of squares one in a hundred needs float64 on a GPU, where its least singular value is under 6e-6 of the largest.

    The least of a Gaussian square is below t / (2 n) of the largest with a probability of t.
    """
    count, *shape = sizes
    w, again, project = matrices(shape, count), [], projection._project

    def projected(x, *args):
        again.append(len(x))
        return project(x, *args)

    monkeypatch.setattr(projection, "_project", projected)
    found = polar(w, 1e-3)
    wanted = polar_factor_there(w)
    assert float(torch.linalg.vector_norm(found - wanted, dim=(-2, -1)).max()) < 1e-3 * min(shape) ** 0.5
    rare = 2 if shape[0] == shape[1] else 0
    assert not CUDA or sum(again) <= rare, f"{sum(again)} of {count} were done again in float64"


@solving
def test_singular_values_are_those_of_an_svd():
    for spectrum in (None, lambda i: 10 ** (-6 * i / i[-1])):
        w = matrices((192, 320), spectrum=spectrum)
        wanted = torch.linalg.svdvals(w.double().cpu())
        assert torch.allclose(singular_values(w).cpu(), wanted, rtol=1e-6, atol=1e-12)


def test_tf32_and_autocast_stay_out_of_exact_products():
    w = matrices((256, 256))
    plain = newton_schulz(w, compute_dtype=torch.float32), polar(w)
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            fast = newton_schulz(w, compute_dtype=torch.float32), polar(w)
    finally:
        torch.backends.fp32_precision = before
    assert all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))


# ---- resets

RESETS = {
    "fire": "fire",
    "fire, polar": {"method": "fire", "solver": "polar", "scale": "keep-norm"},
    "fire, head": {"method": "fire", "roles": ["attention", "mlp", "lm_head"]},
    "shrink_perturb": "shrink_perturb",
    "full_reset": "full_reset",
    "rescale": "rescale",
    "dash": "dash",
    "initial_norm": "initial_norm",
    "several": [{"method": "fire", "scale": "keep-norm"}, {"method": "shrink_perturb", "shrink": 0.35}],
}


def graded(build):
    """Return a model whose parameters hold gradients that do not depend on a device."""
    model = build(1)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("reset", RESETS)
def test_every_reset_gives_what_it_gives_on_a_cpu(reset, build):
    there, here = graded(build).to(DEVICE), graded(build)
    reports = [apply_reset(model, RESETS[reset], initial=build(7)) for model in (there, here)]
    assert [t.name for t in reports[0].touched] == [t.name for t in reports[1].touched]
    for (name, a), b in zip(there.named_parameters(), here.parameters(), strict=True):
        assert a.device.type == DEVICE
        scale = float(b.detach().norm()) or 1.0  # biases begin at zero
        # bf16 products, CUDA's default, are off by 2.2e-4 on matrices as small as these, by less on larger ones.
        assert float((a.detach().cpu() - b.detach()).norm()) < 4e-4 * scale, name


def test_fire_maps_each_piece_of_a_fused_weight():
    model = gpt2().to(DEVICE)
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    fire_(model)
    after = model.transformer.h[0].attn.c_attn.weight.detach()  # (in, 3·out)
    for old, new in zip(before.chunk(3, 1), after.chunk(3, 1), strict=True):
        assert distance(new.mT[None], paper_loop(old.mT[None])) < 5e-4


# ---- perplexity


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("how", [{}, {"stride": 16}, {"documents": [300, 420, 1000], "per_document": True}], ids=str)
def test_fp32_perplexity_is_that_of_a_cpu(build, how):
    options = {"context": CONTEXT, "prefix": 0, **how}
    there, here = (perplexity(build().to(device), TEXT, **options) for device in (DEVICE, "cpu"))
    assert there.nll == pytest.approx(here.nll, rel=1e-6) and there.tokens == here.tokens


@needs_cuda
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_the_kernel_gives_the_softmax_of_fp64(dtype):
    logits, targets = (each.cuda() for each in hard_rows(dtype, 50_304))
    assert kernels.usable(logits.device, dtype, 50_304)
    torch.testing.assert_close(exact_nll(logits, targets), softmax_in_fp64(logits, targets), rtol=1e-9, atol=2e-8)


def test_bf16_weights_change_perplexity_by_their_rounding():
    nll = [perplexity(gpt2().to(DEVICE, dtype), TEXT, context=CONTEXT).nll for dtype in (torch.float32, torch.bfloat16)]
    assert nll[1] == pytest.approx(nll[0], rel=1e-2)


def test_mixed_precision_around_a_model_is_set_aside():
    model = gpt2().to(DEVICE)
    plain = perplexity(model, TEXT, context=CONTEXT).nll
    with torch.autocast(DEVICE, torch.bfloat16):
        assert perplexity(model, TEXT, context=CONTEXT).nll == pytest.approx(plain, rel=1e-7)
        assert perplexity(model, TEXT, context=CONTEXT, mixed=True).nll != plain


def test_training_measures_what_evaluation_of_its_checkpoint_gives(tmp_path):
    sets = {"text": EvaluationSet(TEXT, prefix=0)}
    options = {"eval_strategy": "steps", "eval_steps": STEPS, "eval_context": CONTEXT}
    trainer = train(gpt2(), tmp_path, sets=sets, bf16=True, **options)
    logged = next(entry["eval_text_nll"] for entry in reversed(trainer.state.log_history) if "eval_text_nll" in entry)
    fresh = gpt2(9)
    fresh.load_state_dict({name.removeprefix("_orig_mod."): w for name, w in trainer.model.state_dict().items()})
    assert logged == pytest.approx(perplexity(fresh, TEXT, context=CONTEXT, prefix=0).nll, rel=1e-6)


# ---- training


def test_training_is_that_of_a_cpu(tmp_path):
    there, here = (losses(train(llama(), tmp_path, device=device)) for device in (DEVICE, "cpu"))
    assert there == pytest.approx(here, rel=1e-4)


def test_fp16_trains_as_fp32_does(tmp_path):
    full, half = (losses(train(gpt2(), tmp_path / str(fp16), fp16=fp16)) for fp16 in (False, True))
    assert half[0] == pytest.approx(full[0], rel=1e-3)
    assert half[-1] == pytest.approx(full[-1], rel=2e-2)  # the scaler may leave its first steps out


def test_muon_trains_as_on_a_cpu(tmp_path):
    muon = {"muon": True, "schedule": {"decay": 2, "floor": 0.1, "shape": "1-sqrt"}}
    there, here = (losses(train(gpt2(), tmp_path, device=device, **muon)) for device in (DEVICE, "cpu"))
    assert there[-1] < there[0]
    assert there == pytest.approx(here, rel=5e-3)  # its iteration is in bf16


def test_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "keep_steps": [3], "bf16": True}
    whole = train(gpt2(), tmp_path / "whole", **options)
    resumed = train(gpt2(9), tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-3)  # kernels that add atomically may differ
    assert resumed.hash_of_batches() == whole.hash_of_batches()


def test_a_checkpoint_written_beside_training_is_that_of_its_step(tmp_path, monkeypatch):
    """Each step is saved twice: waited for, and by the thread, which begins when the next step was taken."""
    save, write, twice = ContinualTrainer._save_checkpoint, ContinualTrainer._save, []
    go = threading.Event()

    def both(trainer, *given):
        for way in (False, True):
            trainer.args.async_save, trainer.args.output_dir = way, str(tmp_path / str(way))
            if way:
                go.clear()  # none is being written: the save before waited for it
            save(trainer, *given)
        twice.append(trainer.saver.writer._task)

    def late(trainer, *given, **named):
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(60)
        write(trainer, *given, **named)

    class Goes(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % 2:
                go.set()

    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", both)
    monkeypatch.setattr(ContinualTrainer, "_save", late)
    train(gpt2(), tmp_path, callbacks=[Goes()], save_strategy="steps", save_steps=2, keep_last=9, bf16=True)
    assert [task is not None for task in twice] == [True, True, False]  # the last step is waited for
    for step in (2, 4):
        waited, beside = (tmp_path / str(way) / f"checkpoint-{step}" for way in (False, True))
        for name in ("model.safetensors", "scheduler.pt", "rng_state.pth", "config.json"):
            assert (waited / name).read_bytes() == (beside / name).read_bytes(), name
        moments = [torch.load(f / "optimizer.pt", map_location="cpu", weights_only=True) for f in (waited, beside)]
        assert moments[0]["param_groups"] == moments[1]["param_groups"]
        for number, one in moments[0]["state"].items():
            assert all(torch.equal(value, moments[1]["state"][number][key]) for key, value in one.items())


@pytest.mark.parametrize("method", ["redo", "snr", "continual_backprop"])
def test_units_are_recycled_as_on_a_cpu(method, tmp_path):
    options = {"redo": {"every": 3, "threshold": 0.8}, "snr": {"eta": 0.6}}.get(method, {"rate": 0.02, "maturity": 2})
    found = []
    for device in (DEVICE, "cpu"):
        callback = RecyclingCallback({"method": method, **options}, seed=3)
        trainer = train(gpt2(), tmp_path, callbacks=[callback], device=device)
        found.append([entry["recycled"] for entry in trainer.state.log_history if "loss" in entry][-1])
    assert found[0] > 0 and found[0] == pytest.approx(found[1], rel=0.1, abs=2)


@needs_cuda
def test_the_peak_of_memory_is_a_units_own(tmp_path):
    def peak(vocabulary):
        trainer = train(gpt2(vocab_size=vocabulary), tmp_path / str(vocabulary), max_steps=2)
        found = [e["peak_memory_bytes"] for e in trainer.state.log_history if "peak_memory_bytes" in e][-1]
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        return found

    large = peak(262_144)
    assert peak(512) < large / 4


@needs_cuda
def test_one_process_trains_on_one_gpu(tmp_path):
    with mock.patch("torch.cuda.device_count", return_value=8):
        arguments = ContinualArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, report_to="none")
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 3


@pytest.mark.parametrize("build", [gpt2, llama])
def test_compiled_training_gives_attention_no_mask(build, tmp_path, monkeypatch):
    """A dense mask would keep flash attention and cuDNN's causal kernel out."""
    masks, compile_ = [], torch.compile

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                given = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
                causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
                masks.append((given is not None, bool(causal)))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=look))
    sliced(monkeypatch, SLICE)
    train(build(), tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    torch._dynamo.reset()
    assert masks and set(masks) == {(False, True)}


# ---- checkpoints and measures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    gpt2().save_pretrained(folder)
    return folder


def test_apply_writes_what_it_writes_on_a_cpu(checkpoint, tmp_path):
    from safetensors.torch import load_file

    resets = [{"method": "fire"}, {"method": "shrink_perturb", "shrink": 0.5}]
    there, here = (
        reset_checkpoint(checkpoint, tmp_path / name, resets, seed=3, device=device)
        and load_file(tmp_path / name / "model.safetensors")
        for name, device in (("there", DEVICE), ("here", "cpu"))
    )
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert float((there[name] - tensor).norm()) <= 4e-4 * float(tensor.norm()), name


@solving
def test_inspect_measures_what_it_measures_on_a_cpu(checkpoint):
    there, here = (inspect_checkpoint(checkpoint, progress=False, device=device).rows for device in (DEVICE, "cpu"))
    for a, b in zip(there, here, strict=True):
        for column, value in b.items():
            near = isinstance(value, float | list)  # numbers, and the quantiles of a spectrum
            assert a[column] == (pytest.approx(value, rel=1e-4, abs=1e-9) if near else value)


@solving
def test_diagnose_measures_what_it_measures_on_a_cpu():
    there, here = (
        diagnose(gpt2().to(device), TEXT, context=32, sequences=4, reference=gpt2(3)) for device in (DEVICE, "cpu")
    )
    assert there.srank == here.srank and there.not_measured == here.not_measured == {}
    for name in ("dormant_share", "gradient_norm", "dfi_mean", "sfe"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-4), name
    assert there.hessian_eigenvalue == pytest.approx(here.hessian_eigenvalue, rel=2e-2)


# ---- waits of the host


def waits(work):
    """Return how often the host waited for the device while `work` ran."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in said)


@needs_cuda
def test_newton_schulz_waits_a_few_times_a_stack():
    few, many = matrices((256, 256), 2), matrices((256, 256), 40)
    newton_schulz(few)
    assert waits(lambda: newton_schulz(many)) == waits(lambda: newton_schulz(few)) <= 2
    polar(few)
    assert waits(lambda: polar(many)) == waits(lambda: polar(few)) <= 2


@needs_cuda
def test_an_evaluation_batch_waits_a_few_times():
    model = gpt2().to(DEVICE)
    options = {"context": CONTEXT, "batch_size": 1}
    perplexity(model, TEXT[:128], **options)
    short, long = (waits(lambda n=n: perplexity(model, np.resize(TEXT, n), **options)) for n in (641, 1281))
    assert (long - short) / 10 <= 1


@needs_cuda
def test_a_training_step_waits_once_at_most(tmp_path):
    def steps(n):
        return waits(lambda: train(gpt2(), tmp_path / str(n), max_steps=n, logging_steps=1000, bf16=True))

    steps(2)
    assert (steps(24) - steps(4)) / 20 <= 1.1


@needs_cuda
def test_what_is_not_finite_stops_before_the_weights_change(tmp_path):
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="step"):
        train(model, tmp_path, bf16=True)
    assert all(torch.equal(w.cpu(), before[n]) for n, w in model.state_dict().items())


def test_a_step_that_is_not_finite_is_left_out_on_the_device(tmp_path):
    weights, bad = [], 2

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            weights.append(copy.deepcopy(model.state_dict()))
            if state.global_step == bad:
                model.transformer.ln_f.weight.data[0] = math.inf

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == bad + 1:
                model.transformer.ln_f.weight.data[0] = weights[bad]["transformer.ln_f.weight"][0]

    trainer = train(gpt2(), tmp_path, bf16=True, nonfinite="skip", callbacks=[Break()])
    for n, (before, after) in enumerate(itertools.pairwise(weights)):
        assert all(torch.equal(before[name], after[name]) for name in before) == (n == bad), n
    assert trainer.guard.skipped == 1 and trainer.state.global_step == STEPS
    assert [entry["skipped_steps"] for entry in trainer.state.log_history if "skipped_steps" in entry][-1] == 1
    assert all(map(math.isfinite, losses(trainer))) and losses(trainer)[-1] < losses(trainer)[0]


# ---- compiled: what takes longest, last


def train_alike(bound, tmp_path, monkeypatch, **half):
    sliced(monkeypatch, None)
    whole = losses(train(gpt2(), tmp_path / "whole", **half))
    sliced(monkeypatch, SLICE)
    eager = losses(train(gpt2(), tmp_path / "eager", **half))
    torch._dynamo.reset()
    compiled = losses(train(gpt2(), tmp_path / "compiled", torch_compile=True, torch_compile_backend=BACKEND, **half))
    assert whole[-1] < whole[0]
    assert eager == pytest.approx(whole, rel=bound)
    assert compiled == pytest.approx(whole, rel=bound)


@compiling_bf16
def test_compiled_eager_sliced_and_whole_train_alike_in_bf16(tmp_path, monkeypatch):
    train_alike(2e-3, tmp_path, monkeypatch, bf16=True)


@pytest.fixture(scope="module")
def kernels_of_training(tmp_path_factory):
    """Return the names of what two compiled steps in bf16 run on the GPU, of which a part in slices of the logits."""
    from torch.profiler import ProfilerActivity, profile

    folder = tmp_path_factory.mktemp("profiled")
    with pytest.MonkeyPatch.context() as patch:
        sliced(patch, SLICE)
        trainer = train(gpt2(), folder, bf16=True, max_steps=2, torch_compile=True)  # looks at its model, compiles
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            trainer.train()
            torch.cuda.synchronize()
    return {event.key.lower() for event in seen.key_averages()}


@needs_cuda
@compiling_bf16
def test_attention_runs_in_a_causal_kernel(kernels_of_training):
    parts = ("flash", "cudnn", "efficient", "fmha", "math_for")
    attention = {n for n in kernels_of_training if any(part in n for part in parts)}
    assert any("flash" in n or "cudnn" in n for n in attention), attention
    assert not any("efficient" in n or "fmha_cutlass" in n for n in attention), attention


@needs_cuda
@compiling_bf16
def test_no_gradient_of_logits_is_copied_into_zeros(kernels_of_training):
    fills = [n for n in kernels_of_training if "fillfunctor" in n and "bfloat16" in n]
    assert not fills and any("softmax" in n for n in kernels_of_training)


@compiling_bf16
def test_a_compiled_evaluation_gives_what_an_eager_one_gives(monkeypatch):
    compile_, calls = torch.compile, []

    def compiled(function, **_):
        graph = compile_(function, backend=BACKEND)
        return lambda *args, **given: calls.append(1) or graph(*args, **given)

    monkeypatch.setattr(torch, "compile", compiled)
    model, text = gpt2().to(DEVICE), np.resize(TEXT, 8 * MICRO * CONTEXT + 100)
    options = {"context": CONTEXT, "batch_size": MICRO}
    plain = perplexity(model, text, **options)
    assert not calls
    found = perplexity(model, text, compiled=True, **options)
    assert len(calls) >= 8 and found.tokens == plain.tokens
    assert found.nll == pytest.approx(plain.nll, rel=1e-6)


@compiling
def test_compiled_eager_sliced_and_whole_train_alike_in_fp32(tmp_path, monkeypatch):
    train_alike(1e-5, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def compiled_run(tmp_path_factory):
    """Run a recipe, compiled, whose arms come after a phase of the same model: one plain, one reset, one recycling."""
    folder = tmp_path_factory.mktemp("run")
    data = yaml.safe_load(tiny_recipe(folder).read_text())
    first, second = data["phases"]
    first |= {"steps": 4, "keep": []}
    second |= {"steps": 4}
    second["arms"] |= {"base": "keep", "redo": {"method": "redo", "every": 2, "threshold": 0.9}}
    config = gpt2().config  # whose graphs serve again
    names = ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions", "activation_function")
    data["model"] |= {"context": CONTEXT, "config": {name: getattr(config, name) for name in names}}
    data["batch"] = {"tokens_per_step": 2 * MICRO * CONTEXT, "sequences_per_device": MICRO}
    data |= {"compile": CUDA, "save_every_steps": 4}
    data["evaluate"]["every_steps"] = 4
    alive, start = [], stage_training.starting_model

    def models():
        return sum(type(thing) is GPT2LMHeadModel for thing in gc.get_objects())

    def starting_model(stage, run):
        alive.append(models())
        return start(stage, run)

    gc.collect()
    before = models()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_training, "starting_model", starting_model)
        sliced(patch, SLICE)
        results = run_recipe(load_recipe(data), folder / "out", workers=1, progress=False)
    return results, [count - before for count in alive]


@compiling
def test_a_compiled_run_finishes_every_arm(compiled_run):
    arms = compiled_run[0]["arms"]
    assert set(arms) == {"fire", "base", "redo"}
    for arm in arms.values():
        (run,) = arm["runs"]
        assert run["steps"] == 4 and run["tokens_per_step"] == 2 * MICRO * CONTEXT
        assert all(math.isfinite(score["nll"]) for score in run["final"].values())


@compiling
def test_redo_recycles_in_a_run_that_was_compiled_before_it(compiled_run):
    assert compiled_run[0]["arms"]["redo"]["runs"][0]["recycled_units"] > 0
    assert compiled_run[0]["arms"]["base"]["runs"][0]["recycled_units"] == 0


@compiling
def test_compiling_leaves_the_precision_of_fp32_products_alone(compiled_run):
    assert torch.backends.fp32_precision != "tf32"
    assert torch.get_float32_matmul_precision() == "highest"  # it raises where old and new settings disagree


@compiling
def test_a_units_model_leaves_the_memory_before_the_next_begins(compiled_run):
    assert compiled_run[1] == [0, 0, 0, 0]
