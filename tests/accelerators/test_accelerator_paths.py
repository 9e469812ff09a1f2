"""What accelerators do, on a CPU: stacks in 16-bit products (exact ones of rounded operands here), waits counted."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.matrices import distance, gaussian, scalar_map, svd, with_spectrum
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fire_llm import UserError, fire_
from fire_llm.linalg import accelerated, curvature, split_products, stack_maps
from fire_llm.linalg import matmul as products
from fire_llm.linalg import newton_schulz as paper_map
from fire_llm.linalg import polar as projection
from fire_llm.linalg.curvature import top_hessian_eigenvalue
from fire_llm.models import config_for, fresh_model
from fire_llm.resets import execute as work
from fire_llm.resets import plan
from fire_llm.resets import report as reports
from fire_llm.resets.penalties import parseval

VIEWS = {
    "view",
    "_unsafe_view",
    "select",
    "slice",
    "transpose",
    "unsqueeze",
    "as_strided",
    "diagonal",
    "detach",
    "expand",
    "alias",
    "_reshape_alias",
}


class Waits(TorchDispatchMode):
    """Count what would make the host wait for an accelerator: numbers read, masks counted, tensors fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.lists = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in {"index", "index_put", "index_put_"} and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.kernels += not (name in VIEWS or name.startswith(("empty", "new_empty")))
        if name in {"_local_scalar_dense", "nonzero", "equal", "masked_select"} or masked:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(self.seen.values()) + self.lists


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """`tolist` reads a CPU's tensor without an operation, so it is counted by itself."""
    counting = Waits()
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor):
        counting.lists += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    return counting


@pytest.fixture(autouse=True)
def stacks_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_BATCH_SIDE", 1 << 30)


def mapped(w: torch.Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    paper_map._write_maps(w, out, iterations, dtype, "matrix")
    return out


def projected(w: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    projection._write_polar_factors(w, out, 1e-3, "matrix")
    return out


def polar_factor(w: torch.Tensor) -> torch.Tensor:
    u, _, vh = svd(w)
    return torch.from_numpy(u @ vh)


def spectra(n: int) -> dict[str, torch.Tensor]:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "1/i": 1 / i,
        "i^-0.5": i**-0.5,
        "condition 1e2": torch.logspace(0, -2, n),
        "condition 1e4": torch.logspace(0, -4, n),
        "condition 1e7": torch.logspace(0, -7, n),
        "half at 1e-2": torch.where(i > n // 2, 1e-2, 1.0),
        "half at 1e-4": torch.where(i > n // 2, 1e-4, 1.0),
        "one dominant": torch.cat([torch.tensor([1e3]), torch.linspace(1, 0.1, n - 1)]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The paper's map


@pytest.mark.parametrize("shape", [(400, 400), (300, 900), (900, 300)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-4), (torch.float16, 4e-5), (torch.float32, 3e-7)])
def test_the_map_of_a_stack(shape, dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_maps, "LOW_PRECISION_SHARE", 0.2)  # matrices of this size would be done in fp32
    w = gaussian(2, *shape).float() * 0.02
    for x, one in zip(mapped(w, 5, dtype), w, strict=True):
        off = distance(x, scalar_map(one.double(), 5)[1])
        assert off < bound and (dtype == torch.float32 or off > bound / 30)  # the dtype is what it is done in


@pytest.mark.parametrize("shape", [(150, 150), (140, 400), (400, 140)])
@pytest.mark.parametrize("key", spectra(3))
@pytest.mark.parametrize("split", [True, False])
def test_what_low_precision_does_not_carry_is_done_precisely(
    shape, key: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_map, "accumulates", lambda *_: split)
    w = with_spectrum(*shape, spectra(min(shape))[key]).float()
    for dtype in (torch.bfloat16, torch.float16):
        assert distance(mapped(w[None], 5, dtype)[0], scalar_map(w.double(), 5)[1]) < 5e-6


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_scales_steps_and_small_sides(iterations: int, scale: float) -> None:
    for shape in ((150, 200), (40, 50), (1, 7)):
        w = gaussian(2, *shape).float() * scale
        expected = torch.stack([scalar_map(one.double(), iterations)[1] for one in w])
        assert distance(mapped(w, iterations), expected) < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-4), (torch.float16, 4e-5), (torch.float32, 3e-7)])
def test_a_gaussian_stack_takes_one_polynomial_and_one_wait(dtype, bound: float, waits: Waits) -> None:
    n = 768
    growth, end = paper_map._gaussian_polynomial(5, n, n, True)
    t = torch.linspace(0, end, 999, dtype=torch.float64)
    s = t.sqrt()
    for _ in range(5):
        s = 1.5 * s - 0.5 * s**3
    q = sum(c * t**power for power, c in enumerate(growth.coefficients))
    assert len(growth.coefficients) == 5 and not growth.centre and (q[1:] / (s / t.sqrt())[1:] - 1).abs().max() < 3e-7
    w = gaussian(1, n, n).float() * 0.02
    products.accumulates("cpu", dtype)
    with waits:
        x = mapped(w, 5, dtype)
    assert waits.count == 1, waits.seen
    assert waits.kernels <= 20 or dtype != torch.float32  # the CPU casts operands of 16 bits in kernels of its own
    assert distance(x[0], scalar_map(w[0].double(), 5)[1]) < bound


def test_a_matrix_does_not_depend_on_its_neighbours() -> None:
    """Each has a polynomial of its own, of its own degree."""
    n = 200
    w = torch.stack(
        [
            gaussian(n, n),
            with_spectrum(n, n, torch.logspace(0, -1, n)),
            with_spectrum(n, n, torch.linspace(1, 0.9, n)),
            gaussian(n, 1) @ gaussian(1, n),
            torch.zeros(n, n, dtype=torch.float64),
        ]
    ).float()
    for dtype in (torch.float32, torch.bfloat16):
        together = mapped(w, 5, dtype)
        for x, one in zip(together, w, strict=True):
            assert torch.equal(x, mapped(one[None], 5, dtype)[0])
    assert not together[-1].any()


def test_other_dtypes_and_strides() -> None:
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)):
        w = gaussian(2, 3, 200, 150).to(dtype)
        for v in (w, w.mT, w[:, ::2]):
            x, q = mapped(v), projected(v)
            assert x.shape == q.shape == v.shape and x.dtype == q.dtype == dtype
            for one, a, b in zip(v.flatten(0, 1), x.flatten(0, 1), q.flatten(0, 1), strict=True):
                assert distance(a, scalar_map(one.double(), 5)[1]) < bound
                assert distance(b, polar_factor(one)) < bound + 1e-5


@pytest.mark.parametrize("solve", [mapped, projected])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(solve, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 2 * 150 * 160)
    w = gaussian(2, 3, 150, 160).float()
    w[1, 2, 4, 5] = value
    with pytest.raises(UserError, match=r"^matrix\[1, 2\]: holds NaN or infinity"):
        solve(w)
    with pytest.raises(UserError, match=r"^matrix: holds NaN"):
        solve(w[1, 2])


@pytest.mark.parametrize("solve", [mapped, projected])
def test_nothing_is_made_of_nothing(solve) -> None:
    for shape in ((0, 3), (2, 0, 3), (0, 4, 5)):
        assert solve(torch.zeros(shape)).shape == shape


# ---------------------------------------------------------------------------------------------------------------------
# The polar factor


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record of how many matrices the path of products of 16 bits was not certain."""
    seen: list[int] = []
    path = projection._project
    monkeypatch.setattr(projection, "_project", lambda x, *rest: (seen.append(len(x)), path(x, *rest))[1])
    return seen


@pytest.mark.parametrize("shape", [(150, 150), (130, 400), (400, 130)])
@pytest.mark.parametrize("key", spectra(3))
def test_the_polar_factor_of_any_spectrum(shape, key: str, in_float64) -> None:
    w = with_spectrum(*shape, spectra(min(shape))[key]).float()
    assert distance(projected(w[None])[0], polar_factor(w)) < 1e-4
    assert bool(in_float64) == (key in {"condition 1e4", "condition 1e7", "half at 1e-4", "one dominant"})


@pytest.mark.parametrize("shape", [(130, 200), (130, 400)])
@pytest.mark.parametrize("least", [3e-5, 6e-5])
def test_one_small_singular_value_among_large_ones_is_not_hidden_by_their_mean(shape, least, in_float64) -> None:
    """Sums are exact here: on a GPU the distance would be several times what it is on this path."""
    values = torch.ones(min(shape))
    values[-1] = least
    w = with_spectrum(*shape, values).float()
    assert distance(projected(w[None])[0], polar_factor(w)) < 1e-4 and in_float64


def test_gaussian_matrices_need_no_float64(in_float64) -> None:
    for shape in ((20, 160, 160), (3, 100, 300), (3, 300, 100), (1, 500, 500), (4, 5, 5), (2, 1, 3)):
        w = gaussian(*shape).float() * 0.02
        for x, one in zip(projected(w), w, strict=True):
            single = max(one.shape) >= 2 * min(one.shape)  # the longest products in single fp16 operands
            assert distance(x, polar_factor(one)) < (1e-4 if single else 1e-5)
    assert not in_float64


def test_a_stack_of_easy_hard_and_empty_matrices(in_float64) -> None:
    n = 140
    w = torch.stack(
        [
            gaussian(n, n),
            with_spectrum(n, n, torch.logspace(0, -6, n)),
            torch.zeros(n, n, dtype=torch.float64),
            gaussian(n, 3) @ gaussian(3, n),
            gaussian(n, n, seed=1) * 1e-20,
        ]
    ).float()
    x = projected(w)
    assert in_float64 == [3]
    for i in (0, 1, 4):
        assert distance(x[i], polar_factor(w[i])) < 1e-5
    assert not x[2].any()
    small = projected((gaussian(n, 3) @ gaussian(3, n))[None])[0]  # fp64: no rounding noise to be made orthogonal
    assert torch.linalg.svdvals(small)[:4] == pytest.approx([1, 1, 1, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(140, 140), (130, 200)])
def test_a_part_of_a_stack_needs_a_second_attempt(shape, in_float64, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "more_steps", lambda *_: 0)
    monkeypatch.setattr(accelerated, "SPLIT_ROUNDING", 2.4e-7)  # sums are exact here
    n = min(shape)
    easy, hard = torch.linspace(1, 0.5, n), torch.linspace(1, 0.5, n)
    hard[-1] = 1e-5 if shape == (140, 140) else 1e-2
    w = torch.stack([with_spectrum(*shape, s) for s in (easy, hard, easy, hard, easy)]).float()
    seen: list[int] = []
    path = accelerated.finish
    monkeypatch.setattr(accelerated, "finish", lambda x: (seen.append(len(x)), path(x))[1])
    for x, one in zip(projected(w), w, strict=True):
        assert distance(x, polar_factor(one)) < 1e-4
    assert seen[:2] == [5, 2] and not in_float64


def test_squares_of_any_size_succeed_at_the_first_attempt(in_float64, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps grow with the size as a Gaussian's condition does; here that of 4096 x 4096, in a small matrix."""
    n = 150
    u, s, vh = (torch.from_numpy(one) for one in svd(gaussian(n, n)))
    s[-1] = s[0] * 0.03 / (2 * 4096)
    w = ((u * s) @ vh).float()
    monkeypatch.setattr(accelerated, "SPLIT_ROUNDING", 2.4e-7)  # sums are exact here
    monkeypatch.setattr(projection, "more_steps", lambda _, gain: accelerated.more_steps(4096, gain))
    path, seen = accelerated.finish, []
    monkeypatch.setattr(accelerated, "finish", lambda x: (seen.append(len(x)), path(x))[1])
    assert distance(projected(w[None])[0], polar_factor(w)) < 1e-4
    assert seen == [1] and not in_float64


def test_split_products_hold_22_bits() -> None:
    a, b = gaussian(1, 60, 5000).float() / 10, gaussian(1, 5000, 70, seed=1).float() / 10
    found = split_products.product(split_products.split(a), split_products.split(b))
    assert distance(found, a.double() @ b.double()) < 3e-7
    base = gaussian(1, 60, 70).float()
    more = split_products.accumulate(base.clone(), split_products.split(a), split_products.split(b), alpha=-2, beta=3)
    assert distance(more, 3 * base.double() - 2 * (a.double() @ b.double())) < 3e-7


def test_the_short_composition_does_what_is_said_of_it() -> None:
    s = torch.linspace(0.1, 1, 9999, dtype=torch.float64)
    for a, b, c in accelerated.SHORT:
        s = s * (a + b * s**2 + c * s**4)
    assert (s - 1).abs().max() < 2.5e-4


# ---------------------------------------------------------------------------------------------------------------------
# Waits of the host


@pytest.mark.parametrize("shape", [(6, 200, 200), (3, 300, 150)])
def test_a_stack_costs_one_wait_or_two(shape, waits: Waits) -> None:
    w = gaussian(*shape).float() * 0.02
    products.accumulates("cpu", torch.float16)
    with waits:
        mapped(w, 5, torch.float32)
    assert waits.count == 1, waits.seen
    with waits:
        projected(w)
    assert waits.count <= 3, waits.seen


def test_a_reset_waits_a_handful_of_times_a_stack(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model(config_for("gpt-tiny"), 0)
    monkeypatch.setattr(work, "on_host", lambda tensor: False)
    monkeypatch.setattr(reports, "on_host", lambda tensor: False)
    with waits:
        report = fire_(model)
    groups = len({tuple(row.shape) for row in report.touched})
    assert len(report.touched) > 2 * groups
    assert waits.count <= 4 + 4 * groups, (waits.seen, waits.lists, groups)


def test_values_are_fetched_once_a_device(waits: Waits) -> None:
    tensors = [torch.ones(3), torch.tensor([float("nan")]), torch.zeros(2, 2)]
    with waits:
        assert plan.all_finite(tensors) == [True, False, True]
    assert waits.count == 1 and plan.all_finite([]) == []


def test_a_product_with_the_hessian_waits_twice(waits: Waits) -> None:
    parameters = [torch.nn.Parameter(torch.full((k,), 0.5, dtype=torch.float64)) for k in (2, 3, 4)]
    curvatures = torch.arange(1.0, 10, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (curvatures * torch.cat(parameters) ** 2).sum() / 2

    with waits:
        found = top_hessian_eigenvalue(loss, parameters, iterations=40, tolerance=1e-3)
    assert found.value == pytest.approx(9, rel=1e-3)
    assert waits.count <= 2 * found.iterations + 1
    assert curvature._dots([(parameters, parameters)]) == [9 / 4]


# ---------------------------------------------------------------------------------------------------------------------
# Products and their precision


class Products(TorchFunctionMode):
    """Read, at each product, how CUDA would take it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in {"__matmul__", "matmul", "bmm", "baddbmm", "mm"}:
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_no_tf32_in_parseval_or_in_the_factor() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    w = gaussian(6, 4).float()
    gram = w.mT @ w
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with Products() as seen:
            parseval(w)
            paper_map.newton_schulz_factor(gram, 2)
        assert len(seen.seen) >= 8 and set(seen.seen) == {"ieee"}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_the_benchmark_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    script = Path(__file__).parents[2] / "scripts" / "benchmark_newton_schulz.py"
    found = tmp_path / "ns.json"
    line = [str(script), "--shape", "30", "20", "--repeat", "1", "--without", "svd", "Muon", "bf16"]
    monkeypatch.setattr(sys, "argv", [*line, "--targets", "newton-schulz", "--json", str(found)])
    runpy.run_path(str(script), run_name="__main__")
    told = json.loads(found.read_text())
    assert told["shapes"] == [[1, 30, 20]]
    rows = {row["solver"]: row for row in told["rows"]}
    assert set(rows) == {"paper's loop, fp32", "newton_schulz, fp32", "polar, 1e-3", "polar, 1e-5"}
    assert all(row["distance"] < 1e-4 and row["milliseconds"] > 0 for row in rows.values())
    script_globals = runpy.run_path(str(script))
    w = gaussian(30, 20).float()
    by_svd, iterated = script_globals["targets_by_svd"](w), script_globals["targets_by_iteration"](w)
    for key in ("map", "polar"):
        assert torch.allclose(by_svd[key][1], iterated[key][1], atol=1e-9)
