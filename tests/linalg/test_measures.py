"""Check the metrics against numbers worked out by hand and against numpy in float64."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from fire_llm.core.errors import UserError
from fire_llm.linalg import measures
from fire_llm.linalg.activations import Activity, Features, dormant_scores, dormant_share, feature_srank
from fire_llm.linalg.curvature import gradient_norm, top_hessian_eigenvalue
from fire_llm.linalg.measures import dfi, effective_rank, sfe, srank
from fire_llm.linalg.newton_schulz import newton_schulz
from fire_llm.linalg.singular_values import extent, norm_and_dfi


@pytest.fixture(params=[1 << 20, 7], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 9)])
def test_against_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x, y = a.double().numpy(), b.double().numpy()
    gram = x.T @ x if shape[0] >= shape[1] else x @ x.T
    assert dfi(a) == pytest.approx(np.linalg.norm(gram - np.eye(min(shape))) ** 2, rel=1e-12)
    assert sfe(a, b) == pytest.approx(np.linalg.norm(x - y) ** 2, rel=1e-12)
    assert sfe(a.mT, b.mT) == pytest.approx(sfe(a, b), rel=1e-12)


def test_by_hand() -> None:
    assert sfe(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])) == 25
    assert sfe(torch.ones(3).bfloat16(), torch.zeros(3)) == 3
    assert dfi(torch.eye(3)) == 0
    assert dfi(2 * torch.eye(3)) == 27  # three times (4 - 1)^2
    assert dfi(torch.zeros(5, 2)) == 2
    assert dfi(torch.tensor([[1.0, 1.0]])) == 1  # the smaller Gram matrix is [2]
    assert dfi(torch.nn.Parameter(torch.eye(2))) == 0
    assert math.isnan(dfi(torch.tensor([[float("nan")]])))


def test_accumulates_in_float64() -> None:
    """A million equal terms, on which fp32 sums drift, and differences that fp32 would round away."""
    w = torch.full((1000, 1000), 0.1)
    assert sfe(w, torch.zeros_like(w)) == pytest.approx(1e6 * w[0, 0].item() ** 2, rel=1e-12)
    column = torch.full((1_000_000, 1), 1e-3)
    assert dfi(column) == pytest.approx((1e6 * column[0, 0].item() ** 2 - 1) ** 2, rel=1e-6)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"shapes \(2, 3\) and \(3, 2\) differ"):
        sfe(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(UserError, match=r"shape \(2, 3, 4\) is not a matrix"):
        dfi(torch.ones(2, 3, 4))


def test_ranks() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([0.0, 3.0])) == pytest.approx(1)
    # shares 1/2, 1/4, 1/4: the entropy is 1.5 bits
    assert effective_rank(torch.tensor([1.0, 2.0, 1.0])) == pytest.approx(2**1.5)
    assert srank(torch.ones(200)) == 198
    assert srank(torch.tensor([1.0, 97.0, 2.0])) == 2
    assert srank(torch.tensor([2.0, 1.0, 1.0]), delta=0.5) == 1
    assert srank(torch.tensor([2.0, 1.0, 1.0]), delta=0) == 3
    for zero in (torch.zeros(4), torch.zeros(0)):
        assert (effective_rank(zero), srank(zero)) == (0, 0)


def test_dfi_of_a_gram_matrix_leaves_that_as_it_was() -> None:
    w = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    g = measures.gram(w)
    before = g.clone()
    assert measures.dfi_of_gram(g) == pytest.approx(dfi(w)) and torch.equal(g, before)


# ---- features and units


def with_spectrum(rows: int, sigma: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Build a (rows, n) float64 matrix of given singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sigma)
    u, v = (torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64)).Q for k in (rows, n))
    return u * sigma @ v.mT


def test_srank_of_features_by_hand() -> None:
    """Singular values 100, 9, 1, 1 sum to 111; all but one in a hundred is 109.89, which three of them reach."""
    features = with_spectrum(50, torch.tensor([100.0, 9.0, 1.0, 1.0], dtype=torch.float64))
    assert feature_srank(features) == 3
    assert feature_srank(features, delta=0.1) == 1
    assert feature_srank(features, delta=0) == 4
    assert feature_srank(torch.ones(30, 5)) == 1
    assert feature_srank(torch.randn(3, 20, generator=torch.Generator().manual_seed(0))) == 3  # no more than rows


@pytest.mark.parametrize("split", [1, 7, 64, 300])
def test_small_singular_values_survive_the_streaming(split: int) -> None:
    """From 1 down to 1e-12: a Gram matrix would leave nothing of what is below 1e-8."""
    sigma = torch.logspace(0, -12, 13, dtype=torch.float64)
    features, gathered = with_spectrum(300, sigma), Features()
    for rows in features.split(split):
        gathered.add(rows.view(-1, 1, 13))
    assert (gathered.rows, gathered.width) == (300, 13)
    # The first one is 1: a rounding for each of the 13 columns. How many there are differs between LAPACKs.
    assert (gathered.singular_values() - sigma).abs().max() < 13 * torch.finfo(torch.float64).eps
    assert (gathered.singular_values() / sigma - 1).abs().max() < 1e-3
    by_gram = torch.linalg.eigvalsh(features.mT @ features).clamp(min=0).sqrt()
    assert (by_gram.flip(0) / sigma - 1).abs().max() > 0.1


def test_dormant_scores_by_hand() -> None:
    """Means of |h| are 2, 0, 4, 0.06 and 1.5; the layer's is 1.512."""
    h = torch.tensor([[2.0, 0.0, -6.0, 0.06, 1.0], [-2.0, 0.0, 2.0, -0.06, -2.0]])
    scores = dormant_scores(h)
    assert scores.tolist() == pytest.approx([2 / 1.512, 0, 4 / 1.512, 0.06 / 1.512, 1.5 / 1.512])
    assert float(scores.mean()) == pytest.approx(1)
    assert dormant_share(scores) == pytest.approx(1 / 5)
    assert dormant_share(scores, tau=0.1) == pytest.approx(2 / 5)
    assert dormant_share(torch.tensor([0.025, 0.02500001], dtype=torch.float64)) == 0.5  # at most tau
    assert dormant_share(dormant_scores(torch.zeros(4, 3))) == 1
    gathered = Activity()
    for row in h.bfloat16():
        gathered.add(row.view(1, 1, 5))
    assert gathered.scores().tolist() == pytest.approx(scores.tolist(), rel=1e-2)


def test_activity_is_summed_in_float64() -> None:
    """2^24 ones, and one more that fp32 would not count."""
    gathered = Activity()
    gathered._sum, gathered.rows = torch.tensor([2.0**24, 2.0**24], dtype=torch.float64), 2**24
    gathered.add(torch.tensor([[1.0, 0.0]]))
    assert float(gathered.scores()[0] - gathered.scores()[1]) == pytest.approx(2.0**-24, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_srank(torch.ones(3)), r"shape \(3,\) is not \(..., d\): give a row a token"),
        (lambda: feature_srank(torch.tensor([[1.0, math.inf]])), "features hold NaN or infinity"),
        (lambda: feature_srank(torch.ones(0, 4)), "no rows"),
        (lambda: Features().singular_values(), "no rows"),
        (lambda: dormant_scores(torch.ones(3)), r"shape \(3,\) is not \(..., units\)"),
        (lambda: dormant_scores(torch.tensor([[math.nan]])), "activations hold NaN or infinity"),
        (lambda: dormant_scores(torch.ones(0, 4)), "no rows"),
        (lambda: gradient_norm(lambda: torch.ones(()), []), "give at least one tensor"),
        (lambda: gradient_norm(lambda: torch.ones(()), [torch.ones(2)]), "only such as require gradients"),
        (lambda: eigenvalue_at(torch.bfloat16), "parameters are bfloat16, too coarse for second derivatives"),
        (lambda: eigenvalue_at(torch.float32, iterations=0), "iterations: 0 products"),
        (lambda: eigenvalue_at(torch.float32, at=math.inf), "the Hessian is not finite on this sample"),
        (lambda: gradient_at(math.nan), "the gradient is not finite on this sample"),
    ],
)
def test_what_cannot_be_measured_is_named(call, message) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_widths_must_agree() -> None:
    gathered = Features()
    gathered.add(torch.ones(2, 3))
    with pytest.raises(UserError, match=r"shape \(2, 4\) is not \(..., 3\)"):
        gathered.add(torch.ones(2, 4))


# ---- curvature


def eigenvalue_at(dtype: torch.dtype, at: float = 1.0, **options):
    w = torch.full((2,), at, dtype=dtype, requires_grad=True)
    return top_hessian_eigenvalue(lambda: (w**4).sum(), [w], **options)


def gradient_at(at: float) -> float:
    w = torch.full((2,), at, requires_grad=True)
    return gradient_norm(lambda: (w**4).sum(), [w])


def quadratic(eigenvalues: list[float], seed: int = 0):
    """Build a loss x'Ax / 2 + g'x over two parameters, whose Hessian A has the given eigenvalues."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    a, g = q * torch.tensor(eigenvalues, dtype=torch.float64) @ q.mT, torch.arange(n, dtype=torch.float64)
    parameters = [torch.zeros(1, dtype=torch.float64), torch.zeros(n - 1, dtype=torch.float64)]
    for p in parameters:
        p.requires_grad_()

    def loss() -> torch.Tensor:
        x = torch.cat(parameters)
        return x @ a @ x / 2 + g @ x

    return loss, parameters


class TinyNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 4)
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("sign", [1, -1])
def test_top_eigenvalue_equals_the_dense_hessian_of_a_network(sign: int) -> None:
    """Cross-entropy of an untrained network of 46 parameters, whose top eigenvalue is negative; and its negative."""
    model = TinyNetwork()
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(20) % 4
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)

    def of_vector(v: torch.Tensor) -> torch.Tensor:
        parts = v.split([shape.numel() for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return sign * torch.nn.functional.cross_entropy(functional_call(model, weights, (x,)), y)

    dense = torch.linalg.eigvalsh(hessian(of_vector, parameters_to_vector(model.parameters()).detach()))
    expected = dense[dense.abs().argmax()]
    assert (expected < 0) == (sign > 0)

    def in_parts():
        for some in torch.arange(20).split(7):
            yield sign * torch.nn.functional.cross_entropy(model(x[some]), y[some], reduction="sum") / 20

    for loss in (in_parts, lambda: sum(in_parts())):
        top = top_hessian_eigenvalue(loss, model.parameters(), iterations=2000, tolerance=1e-7)
        assert top.converged and top.value == pytest.approx(float(expected), rel=1e-9)
        assert top.residual <= 1e-7 * abs(top.value)
        norm = torch.linalg.vector_norm(torch.func.grad(of_vector)(parameters_to_vector(model.parameters()).detach()))
        assert gradient_norm(loss, model.parameters()) == pytest.approx(float(norm), rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("top", [[-5.0, 3.0], [5.0, -4.9], [5.0, -5.0], [5.0, 5.0]])
def test_eigenvalues_near_each_other_in_magnitude(top: list[float]) -> None:
    """Opposite pairs are what power iteration alone never settles between."""
    loss, parameters = quadratic([*top, 1.0, 0.5, -0.25])
    found = top_hessian_eigenvalue(loss, parameters, iterations=200, tolerance=1e-6)
    assert found.converged and abs(found.value) == pytest.approx(5, abs=1e-5)
    if top != [5.0, -5.0]:
        assert math.copysign(1, found.value) == math.copysign(1, top[0])
    assert gradient_norm(loss, parameters) == pytest.approx(math.sqrt(30))  # 0, 1, 2, 3, 4


def test_the_residual_bounds_the_error_and_says_what_did_not_converge() -> None:
    spectrum = [5.0, 4.999, -4.99, 1.0, 0.1]
    loss, parameters = quadratic(spectrum)
    found = top_hessian_eigenvalue(loss, parameters, iterations=3, tolerance=1e-9)
    assert not found.converged and found.iterations == 3
    assert 0 < min(abs(found.value - eigenvalue) for eigenvalue in spectrum) <= found.residual
    again = top_hessian_eigenvalue(loss, parameters, iterations=3, tolerance=1e-9)
    assert found == again  # the start is drawn from a seed of its own
    assert top_hessian_eigenvalue(loss, parameters, iterations=3, tolerance=1e-9, seed=1) != found


def test_a_loss_without_curvature() -> None:
    w = torch.ones(3, requires_grad=True)
    found = top_hessian_eigenvalue(lambda: 2 * w.sum(), [w])
    assert (found.value, found.residual, found.converged) == (0, 0, True)


# ---- the theorems of FIRE, on what these functions return

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    sizes=SIZES, samples=st.integers(1, 8), scale=st.floats(0.05, 3), step=st.floats(1e-4, 3), seed=st.integers(0, 9)
)
@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.ReLU()], ids=["linear", "relu"])
def test_theorem_1_features_move_no_further_than_sfe_allows(activation, sizes, samples, scale, step, seed) -> None:
    """Check ||C - C~||_F <= (4 ||Z||_F / m) sqrt(l) S^(l-1) sqrt(SFE) at every layer l.

    Z (d_0, n) is the data, H_l = W_l ... W_1 Z the features of layer l, C_l = H_l H_l^T / ||H_l||_F^2 their covariance
    normalised to trace 1, m_l the smaller of ||H_l||_F and ||H~_l||_F, S the largest spectral norm of any W_k or W~_k
    with k <= l, SFE summed over the layers k <= l. These are the definitions under which the constant comes out: C
    moves by at most 2 in units of H / ||H||_F, these by at most 2 / m of H, and H by at most S^(l-1) ||Z||_F times the
    sum of ||W_k - W~_k||_F, which is at most sqrt(l SFE). An activation of slope at most 1 through 0 changes nothing.

    Source: FIRE, arXiv 2602.08040, theorem 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, by: float) -> torch.Tensor:
        return by * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    z = normal(sizes[0], samples, 1.0)
    before = [normal(out, inner, scale) for inner, out in pairwise(sizes)]
    after = [w + normal(*w.shape, step) for w in before]
    h, moved, total, top = z, z, 0.0, 0.0
    for depth, (w, v) in enumerate(zip(before, after, strict=True), 1):
        h, moved = activation(w @ h), activation(v @ moved)
        total += sfe(w, v)
        top = max(top, *(float(torch.linalg.matrix_norm(x, 2)) for x in (w, v)))
        smaller = min(float(torch.linalg.matrix_norm(x)) for x in (h, moved))
        if smaller == 0:  # every unit of a ReLU layer is off: there is no covariance here or above
            return
        shift = torch.linalg.matrix_norm(h @ h.mT / h.square().sum() - moved @ moved.mT / moved.square().sum())
        bound = 4 * float(torch.linalg.matrix_norm(z)) / smaller * math.sqrt(depth * total) * top ** (depth - 1)
        assert float(shift) <= bound * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(out=st.integers(1, 8), more=st.integers(0, 4), noise=st.floats(0, 0.3), seed=st.integers(0, 9))
def test_theorem_4_dfi_bounds_the_scores_of_units(out, more, noise, seed) -> None:
    """Check sqrt((1-e)/(1+e)) <= s_j <= sqrt((1+e)/(1-e)), e = sqrt(DfI) < 1, for relu(W z) with z standard normal.

    It holds for a W (out, in) with out <= in, whose DfI is that of W W^T: the diagonal of that, |w_j|^2, is then within
    e of 1, and for any law of z that knows no direction, and a nonlinearity with f(ax) = a f(x) for a > 0, the mean of
    |h_j| is |w_j| times a constant. A tall W with DfI = 0 may have rows of zeros, whose units are dormant.

    Source: FIRE, arXiv 2602.08040, theorem 4.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = out + more
    w = torch.linalg.qr(torch.randn(inner, out, generator=generator, dtype=torch.float64)).Q.mT
    w = w * (1 + noise * torch.rand(out, 1, generator=generator, dtype=torch.float64))
    e = math.sqrt(dfi(w))
    assume(e < 0.95)
    z = torch.randn(inner, 20_000, generator=generator, dtype=torch.float64)
    scores = dormant_scores((w @ z).relu().mT)
    low, high = math.sqrt((1 - e) / (1 + e)), math.sqrt((1 + e) / (1 - e))
    assert low * 0.95 <= float(scores.min()) and float(scores.max()) <= high * 1.05  # 20,000 samples: 1 % a score


def test_theorem_4_says_nothing_of_tall_matrices() -> None:
    w = torch.cat([torch.eye(3), torch.zeros(2, 3)])
    z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    assert dfi(w) == 0 and dormant_share(dormant_scores((z @ w.mT).relu())) == pytest.approx(2 / 5)


# ---- norm, DfI and the range of singular values, without the whole spectrum

SPECTRA = {
    "flat": lambda n: torch.ones(n),
    "linear": lambda n: torch.linspace(2, 1, n),
    "one large": lambda n: torch.cat([torch.tensor([100.0]), torch.ones(n - 1)]),
    "one small": lambda n: torch.cat([torch.ones(n - 1), torch.tensor([1e-5])]),
    **{
        f"down to 1e-{power}": partial(lambda n, power: torch.logspace(0, -power, n), power=power)
        for power in (1, 3, 5)
    },
}


@pytest.mark.parametrize("shape", [(64, 64), (300, 300), (300, 500), (1000, 280)])
@pytest.mark.parametrize("key", [*SPECTRA, "Gaussian"])
def test_the_extent_is_that_of_the_svd(key: str, shape: tuple[int, int]) -> None:
    """The smallest singular value of a square Gaussian is 1e-4 of the largest: no float32 product holds that."""
    generator, k = torch.Generator().manual_seed(3), min(shape)
    w = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if key != "Gaussian":
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        w = 7 * (u * SPECTRA[key](k).double()) @ vh
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded = w.to(dtype)
        sigma = torch.linalg.svdvals(rounded.double())
        found = extent(rounded)
        assert found.largest == pytest.approx(float(sigma[0]), rel=2e-3)
        assert found.smallest == pytest.approx(float(sigma[-1]), rel=2e-2)
        assert found.norm == pytest.approx(float(sigma.norm()), rel=1e-6)
        assert found.dfi == pytest.approx(float((sigma.square() - 1).square().sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(300, 300), (300, 500), (900, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [1e-9, 0.02, 1e9])
def test_the_gram_matrix_that_newton_schulz_forms_serves(shape: tuple[int, int], dtype: torch.dtype, largest: float):
    """The reset's result is the same to the bit, and what is measured is that of an SVD, at any scale."""
    w = (largest * torch.randn(*shape, generator=torch.Generator().manual_seed(5))).to(dtype)
    sigma, grams = torch.linalg.svdvals(w.double()), []
    assert torch.equal(newton_schulz(w.float(), grams=grams), newton_schulz(w.float()))
    known = grams[0][0] if grams else None
    assert known is not None or largest != 0.02
    found = extent(w, known)
    assert found.largest == pytest.approx(float(sigma[0]), rel=2e-3)
    assert found.smallest == pytest.approx(float(sigma[-1]), rel=1e-2)
    assert found.norm == pytest.approx(float(sigma.norm()), rel=1e-6)
    assert found.dfi == pytest.approx(float((sigma.square() - 1).square().sum()), rel=1e-4)
    assert norm_and_dfi(w, known) == pytest.approx((found.norm, found.dfi))


@pytest.mark.parametrize("power", [2, 4, 5, 6, 7, 9])
def test_the_smallest_value_of_a_square_is_right_or_found_otherwise(power: int) -> None:
    """LU factors in float32 hold it to 1e-6 of the largest; two smallest that lie side by side share a vector."""
    u, _, vh = torch.linalg.svd(torch.randn(320, 320, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    for last in (1.0, 1.001):
        sigma = torch.cat([torch.linspace(1, 0.1, 318), 10.0**-power * torch.tensor([last, 1.0])]).double()
        w = ((u * sigma) @ vh).float()
        exact = float(torch.linalg.svdvals(w.double())[-1])
        assert extent(w).smallest == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("shape", [(300, 300), (900, 300), (20, 40)])
def test_what_a_gram_matrix_loses_is_found_in_the_matrix_itself(shape: tuple[int, int]) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    for smallest in (1e-8, 1e-11):
        w = (u * torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.float64)) @ vh
        assert extent(w).smallest == pytest.approx(float(torch.linalg.svdvals(w)[-1]), rel=0.05)
    w = (u * torch.linspace(1, 0, min(shape), dtype=torch.float64)) @ vh
    assert extent(w).smallest < 1e-13
    assert extent(torch.zeros(*shape)) == (0, min(shape), 0, 0)


def test_dfi_near_an_isometry_is_no_rounding() -> None:
    """A rectangle in float32, whose Gram matrix of float32 products would be 1e-6 off the identity."""
    w = torch.linalg.qr(torch.randn(900, 300, dtype=torch.float64)).Q * (1 + 1e-5)
    assert extent(w.float()).dfi == pytest.approx(dfi(w.float()), rel=1e-3)
