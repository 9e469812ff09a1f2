"""Check the metrics against numbers worked out by hand and against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fire_llm import metrics
from fire_llm.errors import UserError
from fire_llm.metrics import dfi, effective_rank, sfe, srank


@pytest.fixture(params=[1 << 20, 7], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", request.param)


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


def test_a_quick_gram_is_exact_for_what_is_not_coarse() -> None:
    w = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(metrics.gram(w), metrics.gram(w, quick=True))
    coarse = w.bfloat16()
    exact, quick = metrics.gram(coarse), metrics.gram(coarse, quick=True)
    assert quick.dtype == torch.float64 and (quick - exact).abs().max() < 1e-6 * exact.abs().max()
    before = exact.clone()
    assert metrics.dfi_of_gram(exact) == pytest.approx(dfi(coarse)) and torch.equal(exact, before)
