"""Check newton_schulz, polar and singular_values against fp64 SVDs of LAPACK (through scipy) and exact algebra."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import decaying, distance, gaussian, product_settings, scalar_map, svd, with_spectrum
from support.ranks import run_ranks
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg import matmul as products
from fire_llm.linalg import newton_schulz as paper_map
from fire_llm.linalg import polar as projection
from fire_llm.linalg.matmul import exact_products
from fire_llm.linalg.newton_schulz import newton_schulz, newton_schulz_factor, reference_newton_schulz
from fire_llm.linalg.polar import polar
from fire_llm.linalg.singular_values import singular_range, singular_values

SOLVERS = [newton_schulz, polar]


def sorted_sigma(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(svd(x)[1]))


def deviation(x: Tensor) -> float:
    """Return max |s - 1|."""
    return (sorted_sigma(x) - 1).abs().max().item()


MATRICES = {
    "square": gaussian(200, 200),
    "tall": gaussian(256, 64),
    "wide": gaussian(160, 480),
    "nearly square": gaussian(150, 180),
    "condition 1e4": decaying(160, 200),
    "condition 1e4, wide": decaying(64, 256),
    "1/i, wide": with_spectrum(100, 300, 1 / torch.arange(1, 101)),
    "rank 1, wide": gaussian(60, 1) @ gaussian(1, 400, seed=1),
    "one row": gaussian(1, 7),
}


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("key", MATRICES)
def test_newton_schulz_is_the_scalar_map(key: str, iterations: int) -> None:
    w = MATRICES[key].float()
    sigma, target = scalar_map(w, iterations)
    for compute_dtype, sigma_bound, bound in [
        (None, 1e-5, 5e-6),
        (torch.float64, 1e-7, 1e-7),
        (torch.bfloat16, 5e-4, 5e-4),
        (torch.float16, 5e-4, 2e-4),
    ]:
        x = newton_schulz(w, iterations, compute_dtype=compute_dtype)
        assert (sorted_sigma(x) - sigma.sort().values).abs().max() < sigma_bound
        assert distance(x, target) < bound
    assert distance(newton_schulz(w.double(), iterations), target) < 1e-13 * 4**iterations


def energies(n: int) -> Iterator[Tensor]:
    """Yield shares of the energy, summing to 1: a few values hold most of it, or all, before even and tiny others."""
    tiny = torch.logspace(0, -14, n, dtype=torch.float64)
    for count, held in itertools.product((1, 2, 5), (0.01, 0.15, 0.22, 0.35, 0.7, 1.0)):
        for rest in (torch.ones(n - count, dtype=torch.float64), tiny[count:]):
            yield torch.cat([torch.full((count,), held / count, dtype=torch.float64), (1 - held) * rest / rest.sum()])
    yield from (share / share.sum() for p in (0.4, 1, 2, 3) if len(share := torch.arange(1.0, n + 1).double() ** -p))


@pytest.mark.parametrize(
    ("shape", "iterations"),
    [((136, 136), (1, 2, 3, 4, 5, 15)), ((300, 136), (5, 15)), ((8, 8), (1, 5, 11, 14, 15)), ((64, 200), (5, 15))],
)
def test_fp32_is_within_1e_5_of_the_scalar_map_for_every_spectrum(shape: tuple[int, int], iterations) -> None:
    n = min(shape)
    left, right = (torch.linalg.qr(gaussian(side, n, seed=seed)).Q for seed, side in enumerate(shape))
    w = torch.stack([((left * energy.sqrt()) @ right.mT).float() for energy in energies(n)])
    start = singular_values(w)  # of what fp32 holds, in fp64
    for steps in iterations:
        sigma = start / start.norm(dim=-1, keepdim=True)
        for _ in range(steps):
            sigma = 1.5 * sigma - 0.5 * sigma**3
        x = newton_schulz(w, steps).double()
        found = torch.linalg.eigvalsh(x @ x.mT if shape[0] == n else x.mT @ x).clamp_min(0).sqrt()
        off = (found - sigma.sort().values).abs().amax(-1)
        assert off.max() < 1e-5, f"{steps} steps, spectrum {int(off.argmax())}"


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("key", MATRICES)
def test_the_reference_is_the_scalar_map(key: str, iterations: int) -> None:
    w = MATRICES[key]
    target = scalar_map(w, iterations)[1]
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
        assert distance(reference_newton_schulz(w, iterations, dtype), target) < bound
    stack = torch.stack([w, 3 * w]).bfloat16()
    assert reference_newton_schulz(stack).shape == stack.shape and reference_newton_schulz(stack).dtype == stack.dtype


@pytest.mark.parametrize("shape", [(2, 300, 300), (2, 200, 700), (2, 700, 200), (3, 60, 80)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_fast_path_gives_what_the_reference_gives(shape, dtype: torch.dtype, bound: float) -> None:
    w = gaussian(*shape)
    expected = reference_newton_schulz(w, dtype=torch.float64)
    assert distance(newton_schulz(w.to(dtype)), expected) < bound


def test_newton_schulz_converges_to_the_polar_factor() -> None:
    w = gaussian(64, 192)
    assert distance(newton_schulz(w, 40), torch.from_numpy(scipy.linalg.polar(w.numpy())[0])) < 1e-10


def test_a_frobenius_norm_in_fp32_would_show() -> None:
    """Many equal entries on which an fp32 sum of squares drifts: the norm is accumulated in float64."""
    w = torch.full((50304, 64), 0.1)
    assert newton_schulz(w, 0).double().norm().item() == pytest.approx(1, abs=2e-7)


def test_composition_takes_its_range_to_one() -> None:
    def through(steps: tuple[tuple[float, float, float], ...], s: Tensor) -> Tensor:
        for a, b, c in steps:
            s = a * s + b * s**3 + c * s**5
        return s

    s = torch.logspace(-4, 0, 100_001, dtype=torch.float64).clamp_max(1)
    assert (through(projection.COMPOSITION, s) - 1).abs().max() < 6e-6
    assert (through((*projection.COMPOSITION, *projection.POLISH), s) - 1).abs().max() < 1e-12
    again = torch.linspace(0.0132, 1.94, 100_001, dtype=torch.float64)
    assert (through(projection.LIFT, again) - 1).abs().max() < 1e-12
    assert through(projection.LIFT, torch.tensor(1e-6)) > 210e-6


@cache
def large(key: str, shape: tuple[int, int]) -> tuple[Tensor, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return a float32 matrix of GPT-2's size and its fp64 SVD."""
    if shape[0] > shape[1]:
        w, (u, sigma, vh) = large(key, (shape[1], shape[0]))
        return w.mT.contiguous(), (vh.T, sigma, u.T)
    w = (gaussian(*shape) if key == "gaussian" else decaying(*shape)).float()
    return w, svd(w)


@pytest.mark.parametrize(
    ("shape", "expected", "compute_dtype"),
    [
        ((768, 768), (0.0, 0.22, 0.505), None),
        ((768, 768), (0.0, 0.22, 0.505), torch.bfloat16),
        ((3072, 768), (0.138, 0.26, 0.392), None),
    ],
)
def test_newton_schulz_at_gpt2_size(
    shape: tuple[int, int], expected: tuple[float, float, float], compute_dtype: torch.dtype | None
) -> None:
    """Five steps on Gaussians: min, median and max of the table in docs/newton-schulz.md."""
    w, decomposition = large("gaussian", shape)
    sigma, target = scalar_map(w, 5, decomposition)
    x = newton_schulz(w, compute_dtype=compute_dtype)
    found = singular_values(x).flip(0)
    assert (found - sigma.sort().values).abs().max() < (1e-6 if compute_dtype is None else 1e-4)
    assert distance(x, target) < (5e-7 if compute_dtype is None else 2e-4)
    for value, wanted in zip((found[0], found.median(), found[-1]), expected, strict=True):
        assert value.item() == pytest.approx(wanted, abs=5e-3)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), pytest.param((3072, 768), marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", ["gaussian", "condition 1e4"])
def test_polar_holds_its_tolerance_at_gpt2_size(key: str, shape: tuple[int, int], tolerance: float) -> None:
    w, (u, _, vh) = large(key, shape)
    q = torch.from_numpy(u @ vh)
    results = [polar(w, tolerance)]
    if shape == (768, 768):
        results.append(polar(w, tolerance, compute_dtype=torch.float32 if tolerance == 1e-3 else torch.float64))
    for x in results:
        assert distance(x, q) < tolerance
        gram = x.double() @ x.double().mT if shape[0] <= shape[1] else x.double().mT @ x.double()
        assert (torch.linalg.eigvalsh(gram).sqrt() - 1).abs().max() < tolerance


HARD = {
    "gaussian": gaussian(160, 160),
    "gaussian, wide": gaussian(100, 300),
    "condition 1e4": decaying(160, 160),
    "at the floor": with_spectrum(160, 160, torch.cat([torch.ones(80), torch.full((80,), 2.2e-4)])),
    "one under the floor": with_spectrum(160, 160, torch.cat([torch.ones(159), torch.tensor([1e-5])])),
    "one far under": with_spectrum(160, 160, torch.cat([torch.ones(159), torch.tensor([1e-6])])),
    "half far under": with_spectrum(160, 200, torch.cat([torch.ones(80), torch.full((80,), 1e-6)])),
    "out of reach": with_spectrum(160, 160, torch.cat([torch.ones(159), torch.tensor([1e-10])])),
}


@pytest.mark.parametrize("key", HARD)
def test_polar_against_svd(key: str) -> None:
    w = HARD[key]
    u, _, vh = svd(w)
    q = torch.from_numpy(u @ vh)
    for tolerance, compute_dtype in [
        (1e-3, None),
        (1e-5, None),
        (1e-3, torch.float32),
        (1e-3, torch.float64),
        (1e-5, torch.float64),
    ]:
        x = polar(w, tolerance, compute_dtype=compute_dtype)
        assert distance(x, q) < tolerance
        assert deviation(x) < tolerance


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.float64])
def test_polar_keeps_the_svd_for_the_last_resort(
    compute_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("SVD called")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    for key, w in HARD.items():
        if key != "out of reach" and not (compute_dtype is None and key == "half far under"):
            polar(w, compute_dtype=compute_dtype)
    polar(torch.stack([HARD["condition 1e4"], torch.zeros(160, 160)]), compute_dtype=compute_dtype)
    with pytest.raises(AssertionError, match="SVD called"):
        polar(HARD["out of reach"], compute_dtype=compute_dtype)


def test_float32_composition_starts_in_float64() -> None:
    """Half the singular values at the floor, where fp32 from the first step on would be off by 2e-4."""
    u, _, vh = svd(HARD["at the floor"])
    assert 1e-6 < distance(polar(HARD["at the floor"], compute_dtype=torch.float32), torch.from_numpy(u @ vh)) < 3e-5


def test_polar_reaches_float64() -> None:
    w = gaussian(96, 150)
    q = torch.from_numpy(scipy.linalg.polar(w.numpy())[0])
    for compute_dtype in (None, torch.float64):
        assert distance(polar(w, 1e-12, compute_dtype=compute_dtype), q) < 1e-12
    assert deviation(polar(w, 1e-15)) < 1e-13  # unreachable: the SVD's answer


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.float64])
def test_polar_leaves_null_directions_zero(compute_dtype: torch.dtype | None) -> None:
    duplicated = gaussian(140, 200)
    duplicated[7], duplicated[9] = duplicated[3], 0.0
    for w, rank in [(duplicated, 138), (gaussian(30, 4) @ gaussian(4, 20, seed=1), 4)]:
        u, _, vh = svd(w)
        x = polar(w, compute_dtype=compute_dtype)
        assert distance(x, torch.from_numpy(u[:, :rank] @ vh[:rank])) < 1e-9
    assert (polar(duplicated)[9].abs() < 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_polar_of_low_precision_is_exact_up_to_rounding(dtype: torch.dtype) -> None:
    w = gaussian(150, 260).to(dtype)
    u, _, vh = svd(w)
    for compute_dtype in (None, torch.float32):
        x = polar(w, compute_dtype=compute_dtype)
        assert x.dtype == dtype
        assert distance(x, torch.from_numpy(u @ vh)) < torch.finfo(dtype).eps / 2 + 1e-5


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.integers(-100, 100), st.sampled_from([torch.float32, torch.float64]))
def test_scale_and_transposition(shape: tuple[int, int], seed: int, exponent: int, dtype: torch.dtype) -> None:
    """Neither function feels a power of two (1e-30 to 1e30), and both commute with transposition."""
    w = gaussian(*shape, seed=seed).to(dtype)
    for solve in SOLVERS:
        x = solve(w)
        assert torch.equal(solve(w * 2.0**exponent), x)
        assert torch.equal(solve(-w), -x)
        assert torch.allclose(solve(w.mT), x.mT, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.sampled_from([None, torch.float64]))
def test_polar_is_scipys(shape: tuple[int, int], seed: int, compute_dtype: torch.dtype | None) -> None:
    w = gaussian(*shape, seed=seed)
    x = polar(w, 1e-6, compute_dtype=compute_dtype)
    assert distance(x, torch.from_numpy(scipy.linalg.polar(w.numpy())[0])) < 1e-6
    # x is the projection if and only if it is orthonormal and x^T w is symmetric positive semidefinite (the short side)
    h = x @ w.mT if shape[0] <= shape[1] else x.mT @ w
    assert torch.allclose(h, h.mT, atol=1e-5 * w.norm().item())
    assert torch.linalg.eigvalsh((h + h.mT) / 2).min() > -1e-5 * w.norm()


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e38])
def test_extreme_scales_in_fp32(solve, scale: float) -> None:
    w = gaussian(20, 30).clamp(-3, 3).float()
    assert torch.allclose(solve(w * scale), solve(w), atol=1e-5)


@pytest.mark.parametrize("solve", [*SOLVERS, singular_values])
def test_extreme_scales_in_fp64(solve) -> None:
    for scale in (2.0**-1000, 2.0**1000):
        x = solve(gaussian(20, 30) * scale)
        assert torch.equal(x, solve(gaussian(20, 30)) * (scale if solve is singular_values else 1))
        assert torch.allclose(
            newton_schulz(gaussian(20, 30) * scale, compute_dtype=torch.float32),
            newton_schulz(gaussian(20, 30)),
            atol=1e-6,
        )


@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.float32}, {"compute_dtype": torch.float64}])
@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("shape", [(2, 3, 20, 30), (5, 30, 20), (3, 140, 150)])
def test_a_batch_is_its_matrices(solve, shape: tuple[int, ...], options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 2 * 20 * 30)
    w = gaussian(*shape).float()
    flat = w.view(-1, *shape[-2:])
    flat[1] = 0
    flat[2] = decaying(*shape[-2:], condition=1e6)  # needs another attempt than its neighbours
    x = solve(w, **options).view_as(flat)
    for one, alone in zip(x, flat, strict=True):
        assert torch.allclose(one, solve(alone, **options), atol=1e-6)
    assert not x[1].any()


def test_low_precision_batch_mixes_steps() -> None:
    """A matrix that bf16 would not carry (rank 1) does not take its neighbours, or their precision, with it."""
    n, m = 400, 900  # 16 bits carry a Gaussian of this shape
    w = torch.stack([gaussian(n, m), gaussian(n, 1) @ gaussian(1, m, seed=1), torch.zeros(n, m)]).float()
    x = newton_schulz(w, compute_dtype=torch.bfloat16)
    assert distance(x[0], newton_schulz(w[0].double())) > 1e-5
    assert distance(x[1], newton_schulz(w[1].double())) < 5e-6
    assert not x[2].any()


@pytest.mark.parametrize("solve", [*SOLVERS, singular_values])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_matrices_are_refused_by_name(solve, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 2 * 8 * 9)
    w = gaussian(2, 3, 8, 9).float()
    w[1, 2, 4, 5] = value
    w[1, 1] = 0
    named = {} if solve is singular_values else {"name": "h.0.attn.c_attn.weight[q]"}
    with pytest.raises(UserError, match=r"\[1, 2\]: holds NaN or infinity") as caught:
        solve(w, **named)
    assert str(caught.value).startswith(named.get("name", "matrix"))
    with pytest.raises(UserError, match=r"^(matrix|h\.0\.attn\.c_attn\.weight\[q\]): holds NaN"):
        solve(w[1, 2], **named)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: newton_schulz(torch.ones(3)), r"matrix: shape \(3,\) is not a matrix"),
        (lambda: polar(torch.ones(()), name="b"), r"b: shape \(\) is not a matrix"),
        (lambda: singular_values(torch.ones(3)), "is not a matrix"),
        (lambda: newton_schulz(torch.ones(3, 3, dtype=torch.long)), "dtype torch.int64 cannot be orthogonalised"),
        (lambda: polar(torch.ones(3, 3, dtype=torch.complex64)), "dtype torch.complex64"),
        (lambda: newton_schulz(torch.ones(3, 3), -1), "iterations: -1 is not a number of steps"),
        (lambda: newton_schulz(torch.ones(3, 3), 2.5), "iterations: 2.5"),
        (lambda: newton_schulz(torch.ones(3, 3), True), "iterations: True"),
        (lambda: newton_schulz(torch.ones(3, 3), compute_dtype=torch.int8), "compute_dtype: torch.int8 is not one of"),
        (lambda: polar(torch.ones(3, 3), 0.0), r"tolerance: 0.0 is outside \(0, 0.1\]"),
        (lambda: polar(torch.ones(3, 3), 0.11), "tolerance: 0.11"),
        (lambda: polar(torch.ones(3, 3), float("nan")), "tolerance: nan"),
        (lambda: polar(torch.ones(3, 3), "1e-3"), "tolerance: '1e-3'"),
        (lambda: polar(torch.ones(3, 3), compute_dtype=torch.bfloat16), "torch.bfloat16 is not one of torch.float32"),
        (lambda: polar(torch.ones(3, 3), 1e-5, compute_dtype=torch.float32), "float32 holds a tolerance of 0.001"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("solve", SOLVERS)
def test_result_is_new_contiguous_and_detached(solve) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for w in (gaussian(40, 20).to(dtype), gaussian(20, 40).to(dtype).mT, gaussian(40, 40).to(dtype)[::2, ::2]):
            parameter = torch.nn.Parameter(w.clone())
            x = solve(parameter)
            assert (x.dtype, x.shape, x.is_contiguous(), x.requires_grad) == (dtype, w.shape, True, False)
            assert torch.equal(parameter, w)
    for shape in ((0, 3), (3, 0), (0, 4, 5), (2, 0, 3)):
        assert solve(torch.zeros(shape)).shape == shape
    assert not solve(torch.zeros(3, 4, 5)).any()


@pytest.mark.filterwarnings("ignore:Please use the new API settings")  # torch 2.9 says so of the old ones asked here
@pytest.mark.parametrize("solve", SOLVERS)
def test_ambient_precision_is_neither_felt_nor_changed(solve, monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(140, 200).float()
    expected = solve(w)
    before = torch.get_float32_matmul_precision()
    seen: list[str] = []
    spans = products.spans

    def recorded(w: Tensor) -> Iterator[slice]:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return spans(w)

    for module in (products, paper_map, projection):
        monkeypatch.setattr(module, "spans", recorded)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(solve(w), expected)
            assert torch.is_autocast_enabled("cpu")
        with pytest.raises(UserError):
            solve(w / 0)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen) >= 2 and set(seen) == {"ieee"}


def test_singular_values() -> None:
    for w in (*MATRICES.values(), decaying(100, 130, 1e7), gaussian(40, 40).bfloat16(), torch.zeros(5, 7)):
        expected = svd(w)[1]
        found = singular_values(w)
        assert found.dtype == torch.float64
        # relative, down to 1e-12 of the largest: under it LAPACK itself only says "zero"
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-12 * expected[0])
    batch = gaussian(2, 3, 15, 9)
    found = singular_values(batch)
    assert found.shape == (2, 3, 9)
    assert torch.allclose(found, torch.linalg.svdvals(batch), rtol=1e-10)
    assert singular_values(torch.zeros(2, 0, 3)).shape == (2, 0)


@pytest.mark.parametrize("shape", [(3, 130, 140), (4, 40, 56), (3, 300, 129)])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_matrix_comes_out_the_same_bit_for_bit_whatever_is_beside_it(shape, compute_dtype) -> None:
    """Ranks share a stack out; on a CPU nobody must be able to tell."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w[1] *= torch.logspace(0, -3, shape[-1])  # another spectrum, which takes another path
    together = newton_schulz(w, compute_dtype=compute_dtype)
    assert all(torch.equal(x, newton_schulz(m, compute_dtype=compute_dtype)) for x, m in zip(together, w, strict=True))


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_the_polynomials_stand_for_the_steps_on_their_intervals(steps: int) -> None:
    found = paper_map._polynomials(steps)
    ends = [end for _, end in found]
    assert [len(growth.coefficients) for growth, _ in found] == [3, 5, 7, 9, 11, 13] and ends == sorted(ends)
    for growth, end in found:
        t = np.linspace(1e-9, end * paper_map.BOUND_MARGIN, 777)
        sigma = np.sqrt(t)
        for _ in range(steps):
            sigma = 1.5 * sigma - 0.5 * sigma**3
        powers = (t[:, None] - growth.centre) ** np.arange(len(growth.coefficients))
        assert np.abs(powers @ growth.coefficients * np.sqrt(t) / sigma - 1).max() < 3e-7
        # In fp32 every term is rounded: together they may be but little larger than what they sum to.
        assert (np.abs(powers * growth.coefficients).sum(1) * np.sqrt(t) / sigma).max() < 50


@pytest.mark.parametrize(("bound", "degree"), [(1e-3, 2), (0.0133, 4), (0.05, 8), (0.19, 12), (0.5, None), (1, None)])
def test_five_steps_take_the_least_degree_that_their_spectrum_allows(bound: float, degree: int | None) -> None:
    found = paper_map._polynomial_for(5, bound)
    assert (found and len(found.coefficients) - 1) == degree and paper_map._polynomial_for(5, math.nan) is None


@pytest.mark.parametrize("iterations", [0, 1, 5, 9])
def test_the_factor_of_the_gram_matrix_is_the_map(iterations: int) -> None:
    w = torch.randn(90, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = newton_schulz_factor(w.T @ w, iterations)
    assert torch.allclose(w @ factor, scalar_map(w, iterations)[1], rtol=0, atol=1e-12)
    assert not newton_schulz_factor(torch.zeros(3, 3), iterations).isnan().any()


def rational(function, s):
    scale, terms = function
    return s * scale * (1 + sum(weight / (s**2 + shift) for weight, shift in terms))


def test_the_rational_function_does_what_is_said_of_it() -> None:
    assert np.abs(rational(projection.ZOLOTAREV, np.geomspace(0.1, 1, 9999)) - 1).max() < 5e-3
    assert np.abs(rational(projection.ZOLOTAREV, np.geomspace(1, 1.3, 99)) - 1).max() < 0.1  # an underestimated norm


HALVES = [torch.cat([torch.ones(100), torch.full((100,), floor)]) for floor in (0.1, 4e-3, 4e-4, 1.1e-4, 1e-6)]
SPECTRA = {  # of 200
    "gaussian": torch.linspace(1, 1 / 200, 200),
    "gaussian, one far under": torch.cat([torch.linspace(1, 0.01, 199), torch.tensor([1e-5])]),
    "power law": torch.logspace(0, -4, 200),
    "1/i": 1 / torch.arange(1, 201),
    "one dominant": torch.cat([torch.ones(1), torch.full((199,), 1e-3)]),
    "nearly degenerate": torch.linspace(1, 1 + 1e-6, 200),
    "steep": torch.logspace(0, -6, 200),
    "half at 0.1": HALVES[0],
    "half at 4e-3": HALVES[1],
    "half at 4e-4": HALVES[2],
    "half at 1e-4": HALVES[3],
    "half at 1e-6": HALVES[4],
}


@pytest.mark.parametrize("shape", [(200, 200), (200, 500), (500, 200)])
@pytest.mark.parametrize("key", SPECTRA)
def test_polar_of_float32_is_right_on_any_spectrum(key: str, shape: tuple[int, int]) -> None:
    w = with_spectrum(*shape, SPECTRA[key]).float()
    u, _, vh = svd(w)
    x = polar(w)
    assert distance(x, torch.from_numpy(u @ vh)) < 1e-3
    assert deviation(x) < (1e-4 if key == "steep" else 1e-5)


@pytest.mark.parametrize(("condition", "certain"), [(1, True), (8, True), (1e2, False), (1e6, False)])
@pytest.mark.parametrize("shape", [(150, 400), (400, 150)])
def test_the_rational_function_is_right_or_says_that_it_may_not_be(shape, condition: float, certain: bool) -> None:
    w = decaying(*shape, condition=condition).float()
    u, _, vh = svd(w)
    q = torch.from_numpy(u @ vh)
    tall = shape[0] > shape[1]
    found = projection._by_rational_function((w.mT if tall else w)[None], 1e-3)
    assert (found is not None) == certain
    if found is not None:
        assert distance(found[0].mT if tall else found[0], q) < 1e-3
        assert deviation(found[0]) < 1e-5


def test_the_rational_function_refuses_what_has_no_inverse() -> None:
    singular = gaussian(150, 400)
    singular[7] = singular[3]
    for w in (singular, torch.zeros(150, 400), gaussian(150, 1) * torch.logspace(0, -40, 400, dtype=torch.float64)):
        assert projection._by_rational_function(w.float()[None], 1e-3) is None


# ---------------------------------------------------------------------------------------------------------------------
# The largest and the smallest singular value


@pytest.mark.parametrize("shape", [(300, 300), (900, 300), (300, 900), (40, 70)])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e5])
def test_the_range_is_that_of_the_svd(shape: tuple[int, int], spread: float) -> None:
    n = min(shape)
    w = with_spectrum(*shape, 7 * torch.logspace(0, -math.log10(spread), n, dtype=torch.float64))
    gram = w.mT @ w if shape[0] >= shape[1] else w @ w.mT
    assert singular_range(gram) == pytest.approx((7, 7 / spread), rel=1e-2)


@pytest.mark.parametrize("side", [30, 300])
def test_the_range_of_what_has_no_smallest_value(side: int) -> None:
    low_rank = gaussian(side, 5) @ gaussian(5, side)
    largest, smallest = singular_range(low_rank @ low_rank.mT)
    assert largest == pytest.approx(float(torch.linalg.matrix_norm(low_rank, 2)), rel=1e-3)
    assert smallest is None
    assert singular_range(torch.zeros(side, side, dtype=torch.float64)) == (0, 0)
    assert singular_range(torch.eye(side, dtype=torch.float64)) == pytest.approx((1, 1))


def settings_around(rank: int, world: int, set_by: str) -> list[dict]:
    exec(set_by)
    found = [product_settings()]
    with exact_products(torch.device("cpu")):
        found.append(product_settings())
    found.append(product_settings())
    torch.backends.fp32_precision = "ieee"
    return [*found, product_settings()]


@pytest.mark.parametrize(
    ("set_by", "follows"),
    [
        ("pass", True),
        ("torch.set_float32_matmul_precision('medium')", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.mkldnn.fp32_precision = 'bf16'", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", False),
    ],
)
def test_no_setting_is_felt_or_left_changed(set_by, follows, tmp_path):
    """In a process of its own: what was never set cannot be had again."""
    ((before, inside, behind, later),) = run_ranks(1, settings_around, tmp_path, set_by)
    assert inside["older"] == ("highest", False)
    assert set(inside["matmul"].values()) == {"ieee"} and inside["conv"]["mkldnn"] == "ieee"
    assert behind == before
    assert not follows or set(later["matmul"].values()) == {"ieee"}


def test_threads_that_overlap_leave_settings_as_they_were():
    before = torch.get_float32_matmul_precision()
    inside, outside, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with exact_products(torch.device("cpu")):
            inside.wait(30)
        outside.set()

    try:
        torch.set_float32_matmul_precision("medium")
        thread = threading.Thread(target=first)
        thread.start()
        with exact_products(torch.device("cpu")):
            inside.set()
            assert outside.wait(30)
            seen.append(torch.get_float32_matmul_precision())
        thread.join()
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
