"""Resets against an SVD in fp64, by hand, and by what they must leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.models import tiny_gpt2, tiny_llama

from fire_llm import UserError, apply_reset, fire_, logical_matrices, register_reset
from fire_llm.models import fresh_model
from fire_llm.resets import RESETS, ROLES, ResetSpec
from fire_llm.resets.methods import fire_by_gram


def cubic(sigma: torch.Tensor, steps: int) -> torch.Tensor:
    """Iterate p(σ) = 1.5σ − 0.5σ³ from the Frobenius norm, in fp64."""
    x = sigma.double() / sigma.double().norm()
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x**3
    return x


def spectrum(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w.double())


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


EXPECTED = {
    "gpt2": {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"},
    "llama": {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    },
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("compute_dtype", "tolerance"), [(None, 1e-5), ("bfloat16", 5e-4)])
@pytest.mark.parametrize("iterations", [5, 10])
def test_fire_changes_exactly_the_attention_and_mlp_matrices(kind, compute_dtype, tolerance, iterations):
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama()
    before = snapshot(model)
    matrices = {m.name: m.read().clone() for m in logical_matrices(model)}
    report = fire_(model, iterations=iterations, compute_dtype=compute_dtype)

    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {n.split(".", 3)[-1] for n in changed} == EXPECTED[kind]
    assert len(changed) == 2 * len(EXPECTED[kind])
    # q, k and v are matrices of their own, even where they are stored as one.
    parts = {m.part for m in logical_matrices(model, ("attention",))}
    assert len(matrices) == 2 * (6 if kind == "gpt2" else 7) == len(report.touched)
    assert kind != "gpt2" or {"q", "k", "v"} <= parts
    for matrix in logical_matrices(model):
        d_out, d_in = matrix.shape
        wanted = cubic(spectrum(matrices[matrix.name]), iterations) * math.sqrt(d_out / d_in)
        assert torch.allclose(spectrum(matrix.read()), wanted.sort(descending=True)[0], rtol=0, atol=tolerance)


def test_polar_gives_orthogonal_matrices_at_the_scale():
    model = tiny_llama()
    fire_(model, solver="polar", tolerance=1e-5)
    for matrix in logical_matrices(model):
        d_out, d_in = matrix.shape
        assert torch.allclose(
            spectrum(matrix.read()), torch.full((min(d_out, d_in),), math.sqrt(d_out / d_in)).double(), rtol=3e-5
        )


@pytest.mark.parametrize(("scale", "factor"), [("none", 1.0), ("keep-norm", None)])
def test_scales(scale, factor):
    model = tiny_llama()
    before = {m.name: m.read().clone() for m in logical_matrices(model)}
    fire_(model, scale=scale)
    for m in logical_matrices(model):
        norm = before[m.name].norm() if factor is None else cubic(spectrum(before[m.name]), 5).norm().float()
        assert torch.isclose(m.read().norm(), norm, rtol=1e-5)


def test_rescale_has_fires_norms_and_its_own_direction():
    fired, scaled = tiny_gpt2(), tiny_gpt2()
    before = {m.name: m.read().clone() for m in logical_matrices(scaled)}
    fire_(fired)
    apply_reset(scaled, "rescale")
    for f, s in zip(logical_matrices(fired), logical_matrices(scaled), strict=True):
        assert torch.isclose(f.read().norm(), s.read().norm(), rtol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(s.read().flatten(), before[s.name].flatten(), dim=0)
        assert cosine > 1 - 1e-6


@pytest.mark.parametrize("scale", ["sqrt", "keep-norm", "none"])
def test_a_strength_goes_a_part_of_the_way(scale):
    start, whole, part = tiny_llama(), tiny_llama(), tiny_llama()
    fire_(whole, scale=scale)
    fire_(part, scale=scale, strength=0.25)
    for w, x, y in zip(logical_matrices(start), logical_matrices(whole), logical_matrices(part), strict=True):
        assert torch.allclose(y.read(), 0.75 * w.read() + 0.25 * x.read(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["sqrt", "keep-norm", "none"])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_a_map_from_the_gram_matrix_goes_as_far(scale, strength):
    w = torch.randn(40, 12, dtype=torch.float64)
    p = fire_by_gram(w.T @ w, 40, iterations=5, scale=scale, strength=strength)
    whole = RESETS["fire"].function(w, iterations=5, scale=scale, strength=strength)
    assert torch.allclose(w @ p, whole, rtol=0, atol=1e-9)


def test_a_strength_of_one_is_the_whole_reset_to_the_bit_and_of_none_leaves_the_weights():
    w = torch.randn(6, 20)
    fire = RESETS["fire"].function
    assert torch.equal(fire(w, strength=1.0), fire(w))
    assert torch.equal(fire(w, strength=0.0), w)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (3, 6, 4)])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_flattened_spectrum_keeps_its_vectors_and_its_mean_direction(shape, strength):
    w = torch.randn(shape)
    x = RESETS["flatten_spectrum"].function(w, strength=strength)
    for before, after in zip(w.reshape(-1, *shape[-2:]).numpy(), x.reshape(-1, *shape[-2:]).numpy(), strict=True):
        u, sigma, vh = np.linalg.svd(before.astype(np.float64), full_matrices=False)
        wanted = np.exp((1 - strength) * np.log(sigma) + strength * np.log(sigma.mean()))
        assert np.allclose(u.T @ after @ vh.T, np.diag(wanted), atol=1e-5)


def test_a_matrix_of_zeros_has_no_spectrum_to_flatten():
    assert torch.equal(RESETS["flatten_spectrum"].function(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_a_tied_head_is_touched_only_when_asked_for_and_once():
    model = tiny_gpt2()
    fire_(model)
    embedding = model.transformer.wte.weight.detach().clone()
    report = fire_(model, roles=("attention", "mlp", "lm_head"))
    assert not torch.equal(embedding, model.transformer.wte.weight)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum("wte" in t.name or "lm_head" in t.name for t in report.touched) == 1
    wanted = cubic(spectrum(embedding), 5) * math.sqrt(97 / 32)
    assert torch.allclose(spectrum(model.lm_head.weight.detach()), wanted.sort(descending=True)[0], atol=1e-5)


def test_full_reset_and_shrink_perturb_act_on_every_parameter():
    model = tiny_gpt2(seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    initial = fresh_model(model.config, seed=7)
    before = snapshot(model)
    apply_reset(model, {"method": "shrink_perturb", "shrink": 0.25}, initial=initial)
    for name, p in model.named_parameters():
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * dict(initial.named_parameters())[name], atol=1e-6)
    apply_reset(model, "full_reset", initial=initial)
    again = dict(fresh_model(model.config, seed=7).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())


def test_a_pair_of_resets_splits_the_parameters_by_role():
    model, initial = tiny_gpt2(seed=1), tiny_gpt2(seed=2)
    before = snapshot(model)
    pair = [
        {"method": "fire", "roles": ["attention", "mlp"]},
        {"method": "shrink_perturb", "shrink": 0.5, "roles": ["embedding", "lm_head", "norm", "bias"]},
    ]
    report = apply_reset(model, pair, initial=initial)
    assert not report.untouched
    alone = tiny_gpt2(seed=1)
    fire_(alone)
    fired, start = dict(alone.named_parameters()), dict(initial.named_parameters())
    for name, p in model.named_parameters():
        block_matrix = p.ndim == 2 and ".h." in name
        wanted = fired[name] if block_matrix else 0.5 * before[name] + 0.5 * start[name]
        assert torch.allclose(p, wanted, atol=1e-6), name


def test_keep_changes_nothing_and_still_reports_the_matrices():
    model = tiny_gpt2()
    before = snapshot(model)
    report = apply_reset(model, "keep", spectra=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not report.touched
    rows = [t for t in report.untouched if t.role in ("attention", "mlp", "lm_head")]
    assert len(rows) == 13
    assert all(t.sfe == 0 and t.dfi_before == t.dfi_after and t.reason == "the reset is none" for t in rows)


def test_report_measures_before_and_after():
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name).detach().double().clone()
    report = apply_reset(model, "fire", spectra=True)
    entry = next(t for t in report.touched if t.name == name)
    after = model.get_parameter(name).detach().double()
    gram = after.T @ after
    assert entry.sfe == pytest.approx(float((before - after).square().sum()), rel=1e-6)
    assert entry.dfi_after == pytest.approx(float((gram - torch.eye(32)).square().sum()), rel=1e-5)
    assert entry.sigma_after == pytest.approx(spectrum(after).tolist(), rel=1e-5)
    assert entry.norm_before == pytest.approx(float(before.norm()), rel=1e-6)
    assert {t.reason for t in report.untouched if t.role == "norm"} == {"role norm is not among attention, mlp"}
    assert report.to_dict()["resets"][0]["method"] == "fire"


def test_optimizer_state_of_exactly_the_touched_parameters_is_cleared():
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    optimizer.step()
    report = fire_(model, optimizer=optimizer, exclude=[r"h\.0\.attn"])
    touched = {t.parameter for t in report.touched}
    assert report.optimizer_states_cleared == len(touched) == 6
    for name, p in model.named_parameters():
        assert (p in optimizer.state) == (name not in touched)
    optimizer.step()  # the cleared ones begin anew


def test_wrapped_models_are_peeled():
    plain, wrapped = tiny_gpt2(), tiny_gpt2()
    fire_(plain)
    fire_(torch.nn.parallel.DataParallel(wrapped))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_named_and_nothing_is_changed(bad):
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = bad
    before = snapshot(model)
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight"):
        fire_(model)
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


def test_a_zero_matrix_stays_zero():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    for method in ("fire", "rescale", {"method": "fire", "solver": "polar"}):
        apply_reset(model, method)
        assert not model.transformer.h[0].mlp.c_proj.weight.any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fier", "unknown reset 'fier'. Did you mean 'fire'?"),
        ({"roles": ["mlp"]}, "method: missing"),
        ({"method": "fire", "iteratons": 5}, "Did you mean 'iterations'?"),
        ({"method": "fire", "iterations": -1}, "iterations: -1 is not allowed"),
        ({"method": "fire", "iterations": 2.5}, "iterations: 2.5 is not allowed"),
        ({"method": "fire", "solver": "svd"}, "solver: 'svd' is not allowed"),
        ({"method": "fire", "tolerance": 0.5}, "tolerance: 0.5 is not allowed"),
        ({"method": "fire", "roles": ["atention"]}, "Did you mean 'attention'?"),
        ({"method": "fire", "roles": []}, "roles"),
        ({"method": "fire", "roles": ["norm"]}, "'fire' acts on matrices"),
        ({"method": "fire", "exclude": ["("]}, "'(' is not a regular expression"),
        (
            {"method": "shrink_perturb", "shrink": 1.5},
            "shrink: 1.5 is not allowed: it should be less than or equal to 1",
        ),
        ("full_reset", "'full_reset' needs the run's initial weights"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError) as error:
        apply_reset(tiny_gpt2(), spec)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_initial_weights_of_another_architecture_are_refused():
    with pytest.raises(UserError, match="another architecture"):
        apply_reset(tiny_gpt2(), "full_reset", initial=tiny_gpt2(n_embd=64))


def test_registering_a_reset_makes_its_signature_the_schema():
    @register_reset("halve", roles=("mlp",))
    def halve(w, *, times: int = 1):
        return w / 2**times

    try:
        model = tiny_gpt2()
        before = snapshot(model)
        apply_reset(model, {"method": "halve", "times": 2})
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name] / 4 if ".mlp." in name and p.ndim == 2 else before[name])
        with pytest.raises(UserError, match="times"):
            ResetSpec.parse({"method": "halve", "times": "two"})
    finally:
        del RESETS["halve"]


def test_an_option_may_have_the_name_of_a_tensor_that_other_resets_read():
    @register_reset("named")
    def named(w, *, initial: float = 2.0, gradient: float = 3.0, grams: float = 4.0):
        return w * initial * gradient * grams

    try:
        model = tiny_gpt2()
        before = snapshot(model)
        apply_reset(model, {"method": "named", "initial": 0.5})
        assert all(torch.equal(p, before[name] * 6) for name, p in model.named_parameters())
    finally:
        del RESETS["named"]


def test_labels_say_what_differs():
    assert ResetSpec.parse("fire").label() == "fire, iterations 5, roles attention mlp"
    assert ResetSpec.parse("full_reset").label() == "full_reset"
    assert ResetSpec.parse({"method": "shrink_perturb"}).label() == "shrink_perturb, shrink 0.5"
    assert "tolerance 0.001" in ResetSpec.parse({"method": "fire", "solver": "polar"}).label()
    assert ResetSpec.parse({"method": "fire", "strength": 0.3}).label() == (
        "fire, iterations 5, strength 0.3, roles attention mlp"
    )
    assert ResetSpec.parse("l2_init").label().startswith("l2_init, strength 0.001")
    assert ResetSpec.parse("keep") == ResetSpec.parse({"method": "none"})  # its former name
    assert ResetSpec.parse("none").roles == ROLES


def test_low_precision_weights_are_computed_in_fp32_and_rounded_once():
    exact, low = tiny_llama(), tiny_llama().to(torch.bfloat16)
    exact.load_state_dict(low.state_dict())
    initial = tiny_llama(seed=9)
    resets = [{"method": "fire"}, {"method": "shrink_perturb", "shrink": 0.3, "roles": ["mlp", "norm", "embedding"]}]
    for model in (exact, low):
        apply_reset(model, resets, initial=initial)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact.parameters(), low.parameters(), strict=True))
    doubles = tiny_llama().double()
    apply_reset(doubles, "fire")
    assert all(p.dtype == torch.float64 for p in doubles.parameters())
