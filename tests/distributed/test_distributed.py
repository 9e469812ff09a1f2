"""The same reset on one rank and on many: replicas, shards, replicas of shards; and what must be refused."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_gpt2, tiny_llama
from support.ranks import Raised, run_ranks

from fire_llm import UserError, apply_reset, fire_
from fire_llm.architectures.matrices import logical_matrices, register_layout
from fire_llm.distributed.balance import assign, buckets, cost, makespan, worthwhile

LLAMA = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 14}
"""Sizes that neither 2 nor 3 ranks divide evenly; k and v have two rows, fewer than three ranks."""


# ---- planning


@given(st.lists(st.integers(1, 10**12), max_size=200), st.integers(1, 64))
def test_the_longest_jobs_first_stay_within_grahams_bound(costs, ranks):
    owners = assign(costs, ranks)
    assert owners == assign(costs, ranks) and all(0 <= owner < ranks for owner in owners)
    best = max([*costs, -(-sum(costs) // ranks), 0])  # no plan is better than this
    assert makespan(costs, owners, ranks) <= best * (2 - 1 / ranks)


def test_a_plan_by_hand():
    assert [cost((2, 3)), cost((3, 2)), cost((4, 4)), cost((7,))] == [12, 12, 64, 7]
    assert assign([3, 3, 2, 2, 2], 2) == [0, 1, 0, 1, 0]
    assert buckets([4, 4, 4, 9, 1], [0, 0, 1, 0, 0], 2, limit=8) == [[0, 1, 2], [3], [4]]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4)), max_size=60), st.integers(1, 200))
def test_rounds_hold_every_job_once_in_order_and_within_the_limit(jobs, limit):
    sizes, owners = [s for s, _ in jobs], [o for _, o in jobs]
    parted = buckets(sizes, owners, 5, limit)
    assert sorted(job for jobs in parted for job in jobs) == list(range(len(sizes)))
    for owner in range(5):
        own = [[job for job in jobs if owners[job] == owner] for jobs in parted]
        assert [job for jobs in own for job in jobs] == [job for job in range(len(sizes)) if owners[job] == owner]
        assert all(sum(sizes[job] for job in jobs) <= limit or len(jobs) == 1 for jobs in own)


def test_sharing_is_refused_where_it_costs_more_than_it_saves():
    gpt2 = 48 * cost((768, 768)) + 24 * cost((3072, 768))
    assert worthwhile(gpt2, 4 * 85_000_000, 2, "cpu")
    assert not worthwhile(gpt2, 4 * 85_000_000, 1, "cpu")
    assert not worthwhile(2 * cost((32, 32)), 4 * 2048, 2, "cpu")


# ---- replicas


def share_always():
    """Share however small the work, in rounds of a few matrices, so that tiny models take every path."""
    import fire_llm.distributed.redistribute as exchange
    import fire_llm.resets.execute as work

    work.worthwhile = lambda cost, size, ranks, device: ranks > 1
    exchange.Redistribution.__init__.__defaults__ = (6000,)


def mixed(kind):
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama(**LLAMA)
    if kind == "mixed dtypes":
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.data = parameter.data.bfloat16()
    return model


def state(model):
    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def facts(report):
    return [(t.name, t.reason, t.sfe, t.dfi_after, t.norm_after) for t in [*report.touched, *report.untouched]]


KINDS = ("gpt2", "llama", "mixed dtypes")


def replicas(rank, world):
    share_always()
    results = {}
    for kind in KINDS:
        model = mixed(kind)
        target = torch.nn.parallel.DistributedDataParallel(model) if kind == "gpt2" else model
        report = fire_(target, iterations=5)
        results[kind] = state(model), facts(report), report.shared_by
    return results


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_replicas_end_bitwise_equal_to_each_other_and_to_one_process(world, tmp_path):
    results = run_ranks(world, replicas, tmp_path)
    for kind in KINDS:
        model = mixed(kind)
        alone = fire_(model)
        for result in results:
            weights, report, shared = result[kind]
            assert shared == world
            assert report == facts(alone)
            assert all(torch.equal(weights[name], p) for name, p in state(model).items())


def drifted(rank, world):
    share_always()
    model = tiny_gpt2(seed=rank)
    fire_(model)
    return {m.name: m.read().clone() for m in logical_matrices(model)}


def test_replicas_that_had_drifted_apart_agree_on_what_was_reset(tmp_path):
    first, second = run_ranks(2, drifted, tmp_path)
    assert first and all(torch.equal(first[name], second[name]) for name in first)


# ---- shards


def shard(model, world, mesh_shape=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard") if mesh_shape else ("shard",)
    mesh = init_device_mesh("cpu", mesh_shape or (world,), mesh_dim_names=names)
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(model, optimizer):
    """Take a step on the same batch on every rank, and return the loss before it."""
    ids = torch.arange(40).view(2, 20) % 97
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train_reset_train(model, resets, initial=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [step(model, optimizer) for _ in range(2)]
    before = state(model)
    with torch.no_grad():
        model(input_ids=torch.arange(10)[None])  # leaves FSDP2's root gathered
    report = apply_reset(model, resets, initial=initial, optimizer=optimizer)
    after = state(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    cleared = {n for n, p in model.named_parameters() if p not in optimizer.state}
    losses += [step(model, optimizer) for _ in range(2)]
    return losses, after, changed, cleared, report


def build(kind):
    """Build a model in fp64: AdamW makes steps of 1e-4 out of rounding where a gradient is zero but for that."""
    return (tiny_gpt2() if kind == "gpt2" else tiny_llama(**LLAMA)).double()


def sharded(rank, world, mesh_shape, cases):
    share_always()
    results = []
    for kind, reset in cases:
        model = shard(build(kind), world, mesh_shape)
        placements = {n: (p.placements, p.dtype, p.to_local().shape) for n, p in model.named_parameters()}
        losses, after, changed, cleared, report = train_reset_train(model, RESETS[reset], build(kind))
        same = placements == {n: (p.placements, p.dtype, p.to_local().shape) for n, p in model.named_parameters()}
        results.append((losses, after, changed, cleared, same, facts(report), report.shared_by))
    return results


RESETS = {
    "fire": "fire",
    "polar": {"method": "fire", "solver": "polar", "roles": ["attention", "mlp", "lm_head"], "exclude": [r"layers\.1"]},
    "all": [{"method": "fire"}, {"method": "shrink_perturb", "shrink": 0.25}],
}


CASES = [("gpt2", "fire"), ("llama", "fire"), ("llama", "polar"), ("llama", "all")]


@pytest.mark.parametrize(
    ("world", "mesh", "cases"),
    [pytest.param(2, None, CASES, marks=pytest.mark.slow), (3, None, CASES), (4, (2, 2), [CASES[0], CASES[3]])],
    ids=["2", "3", "2x2"],
)
def test_shards_end_equal_to_one_process_and_train_on(world, mesh, cases, tmp_path):
    """FSDP2, uneven rows, fewer rows than ranks, and HSDP."""
    ranks = run_ranks(world, sharded, tmp_path, mesh, cases)
    assert not any(isinstance(results, Raised) for results in ranks)
    for number, (kind, reset) in enumerate(cases):
        losses, after, changed, cleared, report = train_reset_train(build(kind), RESETS[reset], build(kind))
        for results in ranks:
            g_losses, g_after, g_changed, g_cleared, placements_kept, g_report, shared = results[number]
            assert placements_kept and shared == world
            assert g_changed == changed == cleared == g_cleared
            for name, weight in after.items():
                assert torch.allclose(g_after[name], weight, rtol=0, atol=1e-6), name
            assert g_losses == pytest.approx(losses, abs=1e-5)
            assert [(n, r) for n, r, *_ in g_report] == [(n, r) for n, r, *_ in facts(report)]
            touched = len(report.touched)
            assert [v for row in g_report[:touched] for v in row[2:] if v is not None] == pytest.approx(
                [v for row in facts(report)[:touched] for v in row[2:] if v is not None], rel=1e-3, abs=1e-6
            )


class ToyExperts(torch.nn.Module):
    """Five experts in one tensor, which FSDP2 shards along the stack."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(0)))


def experts(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    share_always()
    register_layout("ToyExperts", "w", role="mlp", parts=("gate", "up"), stack=5, leaf=None)
    model = ToyExperts()
    alone = ToyExperts()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    sharing = fire_(model).shared_by
    for one in alone.w.data:
        for part in one.chunk(2):
            part.copy_(reference(part))
    return torch.allclose(state(model)["w"], alone.w, rtol=0, atol=1e-6), sharing


def reference(w):
    """Iterate the cubic on the singular values, in fp64."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 1.5 * s - 0.5 * s**3
    return ((u * s) @ vh * (w.shape[0] / w.shape[1]) ** 0.5).to(w.dtype)


def test_experts_of_a_stack_are_shared_one_by_one(tmp_path):
    assert run_ranks(3, experts, tmp_path) == [(True, 3)] * 3


# ---- other placements


def placed_otherwise(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    share_always()
    results = {}
    for how, shape, placements in [
        ("columns", (4,), [Shard(1)]),
        ("replicas of columns", (2, 2), [Replicate(), Shard(1)]),
        ("both", (2, 2), [Shard(0), Shard(1)]),
        ("replicated", (4,), [Replicate()]),
    ]:
        model, mesh = tiny_llama(), init_device_mesh("cpu", shape)
        for module in model.modules():
            if type(module).__name__ == "Linear":
                module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), mesh, placements))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = fire_(model)
        kept = all(p.placements == tuple(placements) for p in model.parameters() if hasattr(p, "placements"))
        said = [str(w.message) for w in caught if "placed" in str(w.message)]
        results[how] = state(model), kept, report.gathered_whole, said
    return results


def test_placements_without_a_plan_are_gathered_counted_and_warned_about(tmp_path):
    model = tiny_llama()
    fire_(model)
    for results in run_ranks(4, placed_otherwise, tmp_path):
        for how, (weights, kept, gathered, said) in results.items():
            assert kept
            assert all(torch.equal(weights[name], p) for name, p in state(model).items())
            assert gathered == (14 if how == "both" else 0)
            assert len(said) == bool(gathered) and all(m.startswith("14 parameters are placed neither") for m in said)


def by_plan(rank, world, folders):
    from transformers import AutoModelForCausalLM

    share_always()
    results = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        placements = {str(p.placements) for p in model.parameters() if hasattr(p, "placements")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = fire_(model)
        results.append((state(model), placements, report.gathered_whole, report.shared_by))
    return results


def test_tensor_parallel_models_are_reset_in_their_shards(tmp_path):
    """Sizes that two ranks do not divide evenly; experts, of which a plan cuts one stack along its last axis."""
    import transformers
    from packaging.version import parse
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    odd = {"vocab_size": 97 if parse(transformers.__version__) >= parse("5.18") else 98}  # 5.17 wants an even one
    sizes |= {"num_hidden_layers": 1, "num_local_experts": 3, **odd}
    torch.manual_seed(0)
    whole = [tiny_llama(**odd), tiny_llama(intermediate_size=15, **odd), MixtralForCausalLM(MixtralConfig(**sizes))]
    folders = [tmp_path / str(number) for number in range(len(whole))]
    for model, folder in zip(whole, folders, strict=True):
        model.save_pretrained(folder)
        fire_(model)
    if torch.__version__.startswith("2.11"):  # which cannot put strided shards together
        assert all("lies in parts (_Strided" in str(each) for each in run_ranks(2, by_plan, tmp_path, folders[2:]))
        whole, folders = whole[:2], folders[:2]
    for each in run_ranks(2, by_plan, tmp_path, folders):
        for model, (weights, placements, gathered, shared) in zip(whole, each, strict=True):
            strided = sum("Strided" in placement for placement in placements)  # gate and up of Mixtral's experts
            assert {"(Shard(dim=0),)", "(Shard(dim=1),)"} <= placements and gathered == strided and shared == 2
            assert all(torch.equal(weights[name], p) for name, p in state(model).items())


# ---- what is refused, on every rank alike


FAULTS = {
    "nan": "on rank 1: 'model.layers.1.mlp.up_proj.weight' holds NaN or infinity",
    "spec": "rank 1 holds another model than rank 0, or was asked for another reset",
    "option": "on rank 1: iterations: -6",
    "meta": "'model.layers.0.self_attn.q_proj.weight' is on the meta device",
    "missing": "rank 1 did not come to the reset within 3 s: every one of the 2 ranks must call it",
}


def faulty(rank, world):
    said = {}
    for fault in FAULTS:
        model = shard(tiny_llama(**LLAMA).to("meta" if fault == "meta" else "cpu"), world)
        spec = {"method": "fire", "iterations": 5}
        if rank == 1 and fault == "nan":
            model.model.layers[1].mlp.up_proj.weight.detach().to_local()[0, 0] = float("nan")
        elif rank == 1 and fault in ("spec", "option"):
            spec["iterations"] = 6 if fault == "spec" else -6
        elif rank == 1 and fault == "missing":
            continue
        before = [p.detach().to_local().clone() for p in model.parameters()]
        try:
            apply_reset(model, spec, timeout=3)
        except UserError as error:
            unchanged = fault == "meta" or all(
                torch.equal(p.to_local().nan_to_num(), b.nan_to_num())
                for p, b in zip(model.parameters(), before, strict=True)
            )
            said[fault] = str(error), unchanged
    return said


def test_a_fault_on_one_rank_is_told_on_all_and_nothing_is_changed(tmp_path):
    first, second = run_ranks(2, faulty, tmp_path)
    assert set(first) == set(FAULTS) and set(second) == set(FAULTS) - {"missing"}
    for said in (first, second):
        for fault, (message, unchanged) in said.items():
            assert FAULTS[fault] in message
            assert unchanged


def raising(rank, world):
    share_always()
    import fire_llm.resets.execute as work

    if rank == 1:
        work.ResetExecutor._reset = lambda *_: 1 / 0
    fire_(tiny_gpt2(), timeout=5)


def test_a_reset_that_fails_on_one_rank_fails_on_all(tmp_path):
    first, second = run_ranks(2, raising, tmp_path, seconds=60)
    assert first == "RuntimeError: on rank 1 of the reset: division by zero"
    assert second == "ZeroDivisionError: division by zero"


def dying(rank, world):
    share_always()
    import fire_llm.resets.execute as work

    if rank == 1:
        work.ResetExecutor._reset = lambda *_: os._exit(9)
    fire_(tiny_gpt2(), timeout=5)


def test_a_rank_that_dies_leaves_an_error_not_a_hang(tmp_path):
    first, second = run_ranks(2, dying, tmp_path, seconds=60)
    assert second is None and first.startswith(("RuntimeError", "DistNetworkError", "DistBackendError"))


def test_meta_frozen_and_shared_parameters():
    with pytest.raises(UserError, match="is on the meta device: load the weights"):
        fire_(tiny_llama().to("meta"))
    model = tiny_llama()
    model.model.layers[0].mlp.requires_grad_(False)
    report = fire_(model)
    left = {t.name for t in report.untouched if t.reason == "frozen: requires_grad is off"}
    assert left == {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert len(report.touched) == 11
    with pytest.raises(UserError, match="every parameter that the reset would touch is frozen"):
        fire_(tiny_llama().requires_grad_(False))
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    report = fire_(model)
    assert sum("up_proj" in t.name for t in report.touched) == 1
    assert torch.allclose(model.model.layers[1].mlp.up_proj.weight.detach(), reference(before), atol=1e-6)


def test_fsdp1_and_deepspeed_are_refused():
    class FullyShardedDataParallel(torch.nn.Module):
        __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"

        def __init__(self, module):
            super().__init__()
            self.module = module

    class DeepSpeedZeroOptimizer:
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"
        state: dict = {}  # noqa: RUF012

    model = tiny_llama()
    before = state(model)
    with pytest.raises(UserError, match=r"FSDP1 flattens parameters.*fsdp_version: 2"):
        fire_(FullyShardedDataParallel(model))
    with pytest.raises(UserError, match=r"DeepSpeed keeps master.*use FSDP with fsdp_version: 2.*fire-llm apply"):
        fire_(model, optimizer=DeepSpeedZeroOptimizer())
    model.lm_head.weight._hp_mapping = object()
    with pytest.raises(UserError, match="DeepSpeed"):
        fire_(model)
    assert all(torch.equal(p, before[n]) for n, p in state(model).items())


def test_a_result_that_is_not_finite_is_not_written(monkeypatch):
    from dataclasses import replace

    from fire_llm.resets import RESETS as REGISTRY

    def half(w, **options):
        return w * float("nan") if w.shape == (32, 32) else -w

    monkeypatch.setitem(REGISTRY, "fire", replace(REGISTRY["fire"], function=half))
    model = tiny_llama()
    before = state(model)
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.o_proj.weight, .* was not written"):
        fire_(model)
    for name, weight in state(model).items():
        matrix = "proj" in name
        square = matrix and weight.shape == (32, 32)
        assert torch.equal(weight, -before[name] if matrix and not square else before[name])


def test_matrices_of_one_shape_are_taken_together_where_that_is_faster(monkeypatch):
    """An accelerator's path, taken on a CPU: the result must not depend on it."""
    import fire_llm.resets.execute as work

    one, all_at_once = tiny_llama(), tiny_llama()
    alone = fire_(one, scale="keep-norm")
    monkeypatch.setattr(work, "together", lambda tensor: True)
    sizes = []
    reset = work.ResetExecutor._reset
    monkeypatch.setattr(
        work.ResetExecutor, "_reset", lambda self, group: (sizes.append(len(group)), reset(self, group))
    )
    report = fire_(all_at_once, scale="keep-norm")
    assert sorted(sizes) == [2, 4, 4, 4]
    assert [t.name for t in report.touched] == [t.name for t in alone.touched]
    for name, weight in state(one).items():
        assert torch.allclose(state(all_at_once)[name], weight, rtol=0, atol=1e-6)


def tall(rank, world, iterations, scale):
    """A model whose head is much taller than wide, and split by rows however small it is."""
    import fire_llm.distributed.balance as sharing

    share_always()
    sharing.SPLIT_BYTES = 0
    sharing.SPLIT_RATIO = 3
    model = shard(tiny_llama(), world)
    spec = {"method": "fire", "iterations": iterations, "scale": scale, "roles": ["attention", "mlp", "lm_head"]}
    report = apply_reset(model, spec, spectra=True)
    row = next(t for t in report.touched if t.name == "lm_head.weight")
    return state(model), [row.sfe, row.dfi_before, row.dfi_after, row.norm_before, row.norm_after], row.sigma_after


@pytest.mark.parametrize("scale", ["sqrt", "keep-norm"])
def test_a_tall_matrix_is_reset_where_its_rows_are(scale, tmp_path):
    model = tiny_llama()
    roles = ["attention", "mlp", "lm_head"]
    report = apply_reset(model, {"method": "fire", "iterations": 7, "scale": scale, "roles": roles}, spectra=True)
    row = next(t for t in report.touched if t.name == "lm_head.weight")
    measures = [row.sfe, row.dfi_before, row.dfi_after, row.norm_before, row.norm_after]
    for weights, found, sigma in run_ranks(3, tall, tmp_path, 7, scale):
        for name, weight in state(model).items():
            assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), name
        assert found == pytest.approx(measures, rel=1e-5)
        assert sigma == pytest.approx(row.sigma_after, rel=1e-5)
