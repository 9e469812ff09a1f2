"""The accelerator's branches on a simulated GPU: no mix of devices, the CPU's results, and how often the host waits.

The first part tests the simulator itself, the second the package on it, the third the graphs of torch.compile.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_gpt2, tiny_llama
from support.simulated import Graphs, Simulated, attention_calls, attention_masks, plain, simulated_cuda
from support.training import Samples, arguments, losses
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from fire_llm import (
    ContinualTrainer,
    PenaltyCallback,
    RecyclingCallback,
    ResetCallback,
    apply_reset,
    diagnose,
    fire_,
    newton_schulz,
    perplexity,
    polar,
    reset_checkpoint,
)
from fire_llm.checkpoint.inspection import inspect_checkpoint
from fire_llm.resets import RESETS
from fire_llm.training import EvaluationSet
from fire_llm.training import loss as sliced
from fire_llm.training.loss import SummedLoss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: `pytest -m gpu` tests on that one")

STACK_WAITS = 2
"""Of `newton_schulz` and `polar` on a stack of matrices."""
STEP_WAITS = 1
"""Of an optimizer step."""
BATCH_WAITS = 1
"""Of a batch of evaluation."""


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def log():
    with simulated_cuda() as log:
        yield log


# ---- the simulator


def test_tensors_say_that_they_are_on_the_gpu(log):
    x = torch.zeros(2, 3, device="cuda")
    for t in (x, x + 1, x.T, torch.ones_like(x), torch.ones(2, device=x.device), x.new_tensor([1.0]), seeded(2).cuda()):
        assert t.is_cuda and not t.is_cpu and t.device == torch.device("cuda:0") and isinstance(t, Simulated)
    assert x.to("cuda") is x and x.cuda() is x
    assert torch.tensor([1, 2], device="cuda").dtype == torch.int64
    assert not torch.zeros(2).is_cuda and torch.zeros(2, device="meta").is_meta
    assert torch.accelerator.current_accelerator().type == "cuda" and torch.cuda.device_count() == 1


def test_everything_is_as_it_was_afterwards():
    before = torch.cuda.is_available, torch.tensor, torch.Generator, torch.Tensor.to, torch.Tensor.pin_memory
    with simulated_cuda():
        assert torch.cuda.is_available() and torch.accelerator.is_available()
    assert before == (torch.cuda.is_available, torch.tensor, torch.Generator, torch.Tensor.to, torch.Tensor.pin_memory)
    assert not torch.accelerator.is_available()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda x: x[0].item(), "item"),
        (lambda x: float(x.sum()), "item"),
        (lambda x: int(x[0]), "item"),
        (lambda x: bool((x > 0).all()), "item"),
        (lambda x: f"{x.sum():.3f}", "item"),
        (lambda x: torch.allclose(x, x), "item"),
        (lambda x: torch.equal(x, x), "item"),
        (lambda x: x.tolist(), "copy"),
        (lambda x: x.cpu().numpy(), "copy"),
        (lambda x: x.to("cpu"), "copy"),
        (lambda x: x.to(torch.zeros(1)), "copy"),
        (lambda x: torch.empty(3).copy_(x), "copy"),
        (lambda x: torch.empty(3).copy_(x, non_blocking=True), "copy"),
        (lambda x: x.nonzero(), "shape"),
        (lambda x: x[x > 0], "shape"),
        (lambda x: x.index_put_((x > 0,), x[:1]), "shape"),
        (lambda x: x.masked_select(x > 0), "shape"),
        (lambda x: x.unique(), "shape"),
        (lambda x: torch.where(x > 0), "shape"),
        (lambda x: torch.linalg.eigvalsh(x.outer(x)), "linalg"),
        (lambda x: torch.linalg.cholesky(x.outer(x) + torch.eye(3, device="cuda")), "linalg"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_a_read_of_the_host_is_one_wait(mode, read, kind, log):
    with mode():
        x = seeded(3).cuda()
        log.clear()
        read(x)
    assert [wait.kind for wait in log.waits] == [kind]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x.__setitem__(slice(1, 3), 0.0),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(3).pin_memory().copy_(x, non_blocking=True),
        lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
        lambda x: torch.empty(3).pin_memory().cuda(non_blocking=True),
        lambda x: torch.where(x > 0, x, 1.0) * torch.tensor(2.0) + 3,
        lambda x: x.sort().values.cumsum(0).argmax(),
        lambda x: torch.linalg.qr(x.outer(x)),
        lambda x: torch.linalg.cholesky_ex(x.outer(x)),
        lambda x: F.cross_entropy(x[None], torch.zeros(1, dtype=torch.long, device="cuda")),
        lambda x: torch.nn.utils.clip_grad_norm_([x.clone().requires_grad_()], 1.0),
        lambda x: x.index_add_(0, torch.arange(3, device="cuda"), x.clone()),
        lambda x: torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)),
    ],
)
def test_what_stays_on_the_device_is_no_wait(work, log):
    x = seeded(3).cuda()
    log.clear()
    work(x)
    assert not log.waits and not log.uploads


def test_a_wait_names_the_line_of_this_package_and_that_of_a_library(log):
    newton_schulz(seeded(8, 8).cuda())
    assert all(wait.ours.startswith("fire_llm/linalg/") for wait in log.waits)
    log.clear()
    seeded(2).cuda().sum().item()
    assert [wait.ours for wait in log.waits] == [None] and "test_simulated.py" in log.waits[0].cause
    assert "upload" in str(log.uploads[0]) and log.where() == {str(log.waits[0]): 1}


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x.add_(y),
        lambda x, y: y.add_(x),
        lambda x, y: y * x.sum(),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x.sum(), y.sum()]),
        lambda x, y: torch.outer(x, y),
        lambda x, y: x.index_add_(0, torch.arange(3), x.clone()),
        lambda x, y: F.embedding(torch.arange(3), x.outer(x)),
        lambda x, y: torch._foreach_add_([x], [y]),
        lambda x, y: torch.empty(3).normal_(generator=torch.Generator("cuda")) + x,
    ],
)
def test_a_mix_of_devices_raises(mixed, log):
    with pytest.raises(RuntimeError, match="same device"):
        mixed(seeded(3).cuda(), seeded(3))


def test_generators_belong_to_a_device(log):
    assert torch.Generator("cuda").device.type == "cuda" and isinstance(torch.Generator("cuda"), torch.Generator)
    drawn = torch.randn(4, device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    assert torch.equal(plain(drawn), torch.randn(4, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(4, device="cuda", generator=torch.Generator())


def test_what_was_copied_without_waiting_must_not_be_read(log):
    x = seeded(3)
    first = x.cuda().to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    second = torch.empty(3, dtype=torch.int64).pin_memory().copy_(torch.ones(3, device="cuda"), non_blocking=True)
    assert first.isnan().all() and (second < 0).all() and first.is_pinned() and not log.waits
    done.synchronize()
    assert torch.equal(first, x) and (second < 0).all()
    torch.cuda.synchronize()
    assert (second == 1).all() and [w.kind for w in log.waits] == ["event", "synchronize"]


def test_gradients_and_modules(log):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4))
    module[3].weight = module[0].weight
    here, first = copy.deepcopy(module), module[0].weight
    here.to("cuda")
    assert module.to("cuda")[0].weight is first is module[3].weight and isinstance(first, nn.Parameter)
    module.cpu()
    assert not module[0].weight.is_cuda and type(module[0].weight) is nn.Parameter
    x = seeded(5, 4)
    (module(x) ** 2).sum().backward()
    (here(x.cuda()) ** 2).sum().backward()
    for a, b in zip(module.parameters(), here.parameters(), strict=True):
        assert b.grad.is_cuda and torch.equal(a.grad, plain(b.grad))
    other = copy.deepcopy(here)
    assert other[0].weight.is_cuda and other[0].weight is other[3].weight is not here[0].weight


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_adamw_waits_for_nothing(options, log):
    weights, gradients = seeded(4, 5), seeded(4, 5, seed=1)
    ours, theirs = nn.Parameter(weights.cuda()), nn.Parameter(weights.clone())
    ours.grad, theirs.grad = gradients.cuda(), gradients.clone()
    log.clear()
    for parameter in (ours, theirs):
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, **options)
        optimizer.step()
        optimizer.step()
    assert ours.is_cuda and not log.waits and torch.allclose(plain(ours), theirs.detach(), atol=1e-6)


def test_autocast_gives_the_dtypes_that_torchs_lists_promise(log):
    x = nn.Parameter(seeded(4, 4).cuda())
    with torch.autocast("cuda", torch.bfloat16):
        y = x @ x
        assert [t.dtype for t in (y, F.linear(x, x), torch.addmm(x, x, x))] == [torch.bfloat16] * 3
        kept = (y.softmax(-1), F.layer_norm(y, (4,)), y.pow(2), y.sum(), F.cross_entropy(y, torch.zeros_like(y)))
        assert {t.dtype for t in kept} == {torch.float32}
        assert (y + x).dtype == torch.float32 and (y * 2).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
        assert (seeded(4, 4) @ seeded(4, 4)).dtype == torch.float32
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_products_in_fp32_of_low_precision_operands(log):
    a, b = seeded(2, 3, 4).bfloat16(), seeded(2, 4, 5, seed=1).bfloat16()
    wide = torch.bmm(a.cuda(), b.cuda(), out_dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(plain(wide), a.float() @ b.float())
    with pytest.raises(RuntimeError, match="out_dtype"):
        torch.bmm(a.float().cuda(), b.float().cuda(), out_dtype=torch.float64)


# ---- the package on it


def gaussians(seed=0):
    """Return a stack of matrices as they are drawn at step 0: wide enough for the steps to be one polynomial."""
    return seeded(3, 160, 640, seed=seed)


def waits_of(log, work):
    log.clear()
    result = work()
    return result, len(log.waits)


def may_wait(log, limit):
    assert len(log.waits) <= limit, log.where()


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bf16", "fp32"])
def test_newton_schulz_gives_what_the_cpu_gives(dtype, log):
    for w in (gaussians(), seeded(2, 200, 160), seeded(40, 24), gaussians() + 3 * seeded(3, 1, 1) * torch.ones(640)):
        found = newton_schulz(w.cuda(), compute_dtype=dtype)
        wanted = newton_schulz(w, compute_dtype=torch.float32)
        assert found.is_cuda and torch.allclose(plain(found), wanted, atol=1e-5 if dtype else 2e-3)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bf16", "fp32"])
def test_newton_schulz_waits(dtype, log):
    w = gaussians().cuda()
    newton_schulz(w, compute_dtype=dtype)  # what a device can is tried once
    log.clear()
    newton_schulz(w, compute_dtype=dtype)
    may_wait(log, STACK_WAITS)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_polar_gives_what_the_cpu_gives(tolerance, log):
    for w in (gaussians(), seeded(2, 200, 160), seeded(40, 24)):
        found = polar(w.cuda(), tolerance)
        u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
        assert found.is_cuda and torch.linalg.matrix_norm(plain(found).double() - u @ vh).max() < 2 * tolerance


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_polar_waits(tolerance, log):
    w = gaussians().cuda()
    log.clear()
    polar(w, tolerance)
    may_wait(log, STACK_WAITS)


def with_gradients(model):
    for n, parameter in enumerate(model.parameters()):
        parameter.grad = seeded(*parameter.shape, seed=n)
    return model


def compare(found, wanted, atol=1e-5):
    """Assert that two models hold the same, one of them on the simulated device."""
    for (name, a), b in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert a.is_cuda, name
        assert torch.allclose(plain(a), b.detach(), atol=atol), (name, (plain(a) - b.detach()).abs().max())


TRANSITIONS = [name for name, method in RESETS.items() if method.kind == "transition"]
OPTIONS = {"fire": {"compute_dtype": "float32"}, "rescale": {"compute_dtype": "float32"}}


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("method", TRANSITIONS)
def test_every_reset_gives_what_the_cpu_gives(method, build, log):
    wanted, found, initial = with_gradients(build()), build(), build(seed=1)
    spec = {"method": method, **OPTIONS.get(method, {})}
    found.to("cuda")
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        a.grad = b.grad.cuda()
    told = apply_reset(wanted, spec, initial=initial)
    report = apply_reset(found, spec, initial=initial)
    compare(found, wanted)
    assert [t.name for t in report.touched] == [t.name for t in told.touched]
    for a, b in zip(report.touched, told.touched, strict=True):
        assert (a.sfe, a.norm_after) == pytest.approx((b.sfe, b.norm_after), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("solver", ["newton-schulz", "polar"])
def test_fire_with_a_tied_head_and_its_optimizer(solver, log):
    wanted, found = tiny_gpt2(), tiny_gpt2()
    found.to("cuda")
    optimizer = torch.optim.AdamW(found.parameters(), fused=True)
    sum(p.sum() for p in found.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    found.load_state_dict(wanted.state_dict())
    options = {"solver": solver, "roles": ("attention", "mlp", "lm_head"), "compute_dtype": "float32"}
    fire_(wanted, **options)
    report = fire_(found, **options, optimizer=optimizer)
    compare(found, wanted, atol=1e-5 if solver == "newton-schulz" else 1e-3)
    assert found.lm_head.weight is found.transformer.wte.weight
    assert report.optimizer_states_cleared == len({t.parameter for t in report.touched})


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_perplexity_gives_what_the_cpu_gives(build, log):
    model = build()
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(0))
    ends = [150, 200, 300]
    for options in ({}, {"stride": 8}, {"documents": ends}, {"documents": ends, "per_document": True, "prefix": 0}):
        wanted = perplexity(model.cpu(), ids, context=32, batch_size=4, **options)
        found = perplexity(model.to("cuda"), ids, context=32, batch_size=4, **options)
        assert found.nll == pytest.approx(wanted.nll, rel=1e-6) and found.tokens == wanted.tokens
        assert found.scores.nll == pytest.approx(wanted.scores.nll, rel=1e-6)


def test_perplexity_names_what_is_not_finite(log):
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match="not finite"):
        perplexity(model.to("cuda"), torch.arange(90), context=32)


def test_a_batch_of_evaluation_waits(log):
    model = tiny_gpt2().to("cuda")
    ids = torch.randint(0, 97, (1281,), generator=torch.Generator().manual_seed(0))
    perplexity(model, ids[:65], context=32, batch_size=2)
    counts = {}
    for batches in (5, 20):
        log.clear()
        perplexity(model, ids[: 64 * batches + 1], context=32, batch_size=2)
        counts[batches] = Counter(map(str, log.waits))
    more = counts[20] - counts[5]
    assert sum(more.values()) <= 15 * BATCH_WAITS, {where: count / 15 for where, count in more.items()}


def test_diagnose_gives_what_the_cpu_gives(log):
    model, reference = tiny_gpt2(), tiny_gpt2(seed=1)
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(0))
    wanted = diagnose(model, ids, context=32, reference=reference, iterations=3)
    found = diagnose(model.to("cuda"), ids, context=32, reference=reference.to("cuda"), iterations=3)
    for a, b in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float | dict) and b != found.not_measured else b)


@pytest.mark.parametrize("method", ["fire", "shrink_perturb"])
def test_apply_and_inspect_give_what_the_cpu_gives(method, tmp_path, log):
    tiny_llama().save_pretrained(tmp_path / "model")
    start = {"seed": 3} if method == "shrink_perturb" else {}
    spec = {"method": method, **OPTIONS.get(method, {})}
    for device in ("cpu", "cuda"):
        reset_checkpoint(tmp_path / "model", tmp_path / device, spec, device=device, progress=False, **start)
    found = [inspect_checkpoint(tmp_path / d, tmp_path / "model", device=d, progress=False) for d in ("cpu", "cuda")]
    for a, b in zip(*(one.rows for one in found), strict=True):
        assert a.pop("sigma") == pytest.approx(b.pop("sigma"), abs=1e-4)
        names = [a.pop(key) == b.pop(key) for key in ("name", "role", "shape")]
        assert all(names) and a == pytest.approx(b, rel=1e-3, abs=1e-4)


# ---- training


class Steps(TrainerCallback):
    """Count the waits of each step."""

    def __init__(self, log):
        self.log, self.counts, self.uploads, self.attention = log, [], [], []

    def on_step_begin(self, *_, **__):
        self.counts.append(Counter(map(str, self.log.waits)))
        self.uploads.append(len(self.log.uploads))
        self.attention = [*self.log.attention]

    def a_step(self):
        """Return what a step waited for that neither logs nor is the first."""
        return self.counts[-1] - self.counts[-2]


def same_attention():
    """Let the CPU take the attention that the simulated device does; what follows is then the same to the last bits."""
    return sdpa_kernel(SDPBackend.MATH)


def train(model, folder, cpu, callbacks=(), sets=None, **changes):
    settings = {
        "max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 50, "save_strategy": "no", "use_cpu": cpu,
        "dataloader_pin_memory": not cpu, "accelerator_config": {"non_blocking": not cpu}, **changes,
    }  # fmt: skip
    trainer = ContinualTrainer(model, arguments(folder / "out", **settings), Samples(), sets, callbacks)
    trainer.train()
    return trainer


ADAMW = {"optim": "adamw_torch_fused"}
MUON = {"muon": True}


@pytest.mark.parametrize(("build", "changes"), [(tiny_gpt2, ADAMW), (tiny_llama, MUON)], ids=["adamw", "muon"])
def test_training_gives_what_the_cpu_gives(build, changes, tmp_path):
    sets = {"web": EvaluationSet(torch.arange(200) % 97)}
    with same_attention():
        wanted = train(build(), tmp_path / "cpu", True, sets=sets, logging_steps=1, **changes)
    with simulated_cuda():
        found = train(build(), tmp_path / "gpu", False, sets=sets, logging_steps=1, **changes)
        compare(found.model, wanted.model, atol=1e-5 if changes is ADAMW else 1e-3)  # Muon's steps are in bf16
        scores = found.evaluate()
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-5 if changes is ADAMW else 1e-3)
    assert scores["eval_web_nll"] == pytest.approx(wanted.evaluate()["eval_web_nll"], abs=1e-3)


@pytest.mark.parametrize(
    "changes", [ADAMW, {**ADAMW, "nonfinite": "skip"}, MUON], ids=["adamw-halt", "adamw-skip", "muon"]
)
def test_a_step_in_bf16_waits(changes, tmp_path, log):
    steps = Steps(log)
    trainer = train(tiny_gpt2(), tmp_path, False, [steps], bf16=True, **changes)
    assert next(trainer.model.parameters()).is_cuda and len(steps.counts) == 3
    assert sum(steps.a_step().values()) <= STEP_WAITS, steps.a_step()


def test_batches_reach_the_gpu_without_a_wait(tmp_path, log):
    steps = Steps(log)
    train(tiny_gpt2(), tmp_path, False, [steps], **ADAMW)
    assert steps.uploads[-1] == steps.uploads[-2], list(map(str, log.uploads[steps.uploads[-2] :]))


def test_attention_takes_no_mask_in_training(tmp_path, log):
    steps = Steps(log)
    train(tiny_gpt2(), tmp_path, False, [steps], bf16=True, **ADAMW)
    assert len(steps.attention) >= 2 * 2 * 2 and set(steps.attention) == {(False, True)}


def test_a_loss_that_is_not_finite_stops_the_step(tmp_path, log):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("inf")

    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        train(tiny_gpt2(), tmp_path, False, [Break()], bf16=True, **ADAMW)


PENALTIES = [name for name, method in RESETS.items() if method.kind == "penalty"]
RECYCLING = [name for name, method in RESETS.items() if method.kind == "recycling"]


@pytest.mark.parametrize("methods", [["dash", "fire"], PENALTIES, *([name] for name in RECYCLING)], ids=", ".join)
def test_arms_that_act_in_training_give_what_the_cpu_gives(methods, tmp_path):
    options = {**OPTIONS, "redo": {"every": 2, "threshold": 0.9}, "dash": {"batches": 2}}
    specs = [{"method": method, **options.get(method, {})} for method in methods]

    def callback():
        if methods == PENALTIES:
            return PenaltyCallback(specs, initial=tiny_gpt2(seed=1))
        return RecyclingCallback(*specs, seed=0) if methods[0] in RECYCLING else ResetCallback(specs)

    with same_attention():
        wanted = train(tiny_gpt2(), tmp_path / "cpu", True, [callback()], **ADAMW)
    with simulated_cuda():
        found = train(tiny_gpt2(), tmp_path / "gpu", False, [callback()], **ADAMW)
        compare(found.model, wanted.model, atol=1e-5 if "fire" not in methods else 1e-3)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_the_loss_in_slices_gives_what_whole_logits_give(build, monkeypatch, log):
    monkeypatch.setattr(sliced, "SLICES", (97 * 20, 97 * 20))
    monkeypatch.setattr(sliced, "WHOLE", 97 * 20)
    ids, labels = batch()
    labels[1, 3] = -100
    wanted, found = build(), build().to("cuda")
    loss = F.cross_entropy(wanted(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    summed = SummedLoss(found, contextlib.nullcontext)
    assert summed.sliced(found, labels.cuda())
    total = summed(found, labels.cuda(), input_ids=ids.cuda())
    total.backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(plain(a.grad), b.grad, atol=1e-4)


# ---- graphs of torch.compile


def batch(rows=3, seed=0):
    tokens = torch.randint(0, 97, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:].clone()


def compiled(model, graphs, rows=3):
    """Take the loss and its gradients in slices, trunk and softmax compiled whole (a graph break raises)."""
    ids, labels = batch(rows)
    summed = SummedLoss(model, contextlib.nullcontext, compiling={"backend": graphs, "fullgraph": True})
    assert summed.sliced(model, labels)
    summed(model, labels, input_ids=ids).backward()


@pytest.fixture(
    scope="module",
    params=[
        lambda seed: tiny_gpt2(seed, n_layer=1),
        pytest.param(lambda seed: tiny_llama(seed, num_hidden_layers=1), marks=pytest.mark.slow),
    ],
    ids=["gpt2", "llama"],
)
def traced(request):
    """Give a model's builder and the graphs of its loss, traced anew."""
    build = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliced, "SLICE", 97 * 24)
        patch.setattr(sliced, "WHOLE", 97 * 10)
        patch.setattr(sliced, "CACHED", 97 * 24)  # a slice at once, as on a GPU
        torch._dynamo.reset()
        graphs = Graphs()
        compiled(build(0), graphs)
        yield build, graphs
        torch._dynamo.reset()


def trunks(graphs):
    return [graph for graph in graphs if attention_calls([graph])]


def test_compiled_attention_takes_no_mask(traced):
    _, graphs = traced
    assert len(attention_calls(graphs)) == 1 and not attention_masks(graphs)


def test_graphs_of_the_compiled_loss(traced):
    """One graph of the trunk and one of the softmax; those of the first model serve all others of its kind."""
    build, graphs = traced
    assert len(trunks(graphs)) == 1 and len(graphs) == 2
    for seed in range(1, 12):
        compiled(build(seed), graphs)
    assert len(graphs) == 2
    model = build(0)
    for rows in (4, 5):
        compiled(model, graphs, rows)
    # Of each a second graph, for any number of rows, and of the softmax at most one for a last slice of one row.
    assert len(trunks(graphs)) <= 2 and len(graphs) <= 5
