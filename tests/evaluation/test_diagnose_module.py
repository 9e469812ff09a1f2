"""Diagnostics of networks that are no language models, against numpy and Hessians in closed form."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fire_llm import UserError, diagnose_module


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def batches(count, rows, inputs, outputs):
    torch.manual_seed(1)
    return [(torch.randn(rows, inputs), torch.randn(rows, outputs)) for _ in range(count)]


def test_a_linear_regression_has_the_hessian_and_gradient_of_its_formula():
    """Of the mean over rows and outputs of (x w − y)²: the Hessian is 2/(n·k) XᵀX for each of the k outputs."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    [(x, y), _] = data = [(x.double() * torch.logspace(0, -1, 6), y.double()) for x, y in batches(2, 20, 6, 3)]
    found = diagnose_module(model, loss, data, features="0", iterations=300, tolerance=1e-6)
    top = 2 / (20 * 3) * np.linalg.eigvalsh((x.T @ x).numpy())[-1]
    assert found.hessian_eigenvalue == pytest.approx(top, rel=1e-5)
    w = model[0].weight.detach()
    gradient = 2 / (20 * 3) * (x @ w.T - y).T @ x
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
    both = torch.cat([x, data[1][0]]).numpy()
    shares = np.cumsum(sigma := np.linalg.svd(both, compute_uv=False)) / sigma.sum()
    assert found.srank == np.searchsorted(shares, 0.99) + 1 and found.srank_share == found.srank / 6
    assert (found.rows, found.batches, found.hessian_batches) == (40, 2, 1)
    small = np.linalg.norm(w.numpy() @ w.numpy().T - np.eye(3)) ** 2
    assert found.dfi_mean == pytest.approx(small, rel=1e-6)
    assert found.dormant_share is None and found.not_measured["sfe"] == "no reference was given"
    whole = diagnose_module(model, loss, data, hessian_batches=2, hessian=False)
    other, target = data[1]
    mean = (gradient + 2 / (20 * 3) * (other @ w.T - target).T @ other) / 2
    assert whole.gradient_norm == pytest.approx(float(mean.norm()), rel=1e-9)
    assert whole.not_measured == {"hessian_eigenvalue": "not asked for", "srank": "features names no module",
                                  "sfe": "no reference was given"}  # fmt: skip


def test_dead_channels_and_the_matrices_of_a_kernel_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).train()  # fmt: skip
    with torch.no_grad():
        model[1].weight[:3], model[1].bias[:3] = 0, -1
        model[3].weight[1], model[3].bias[1] = 0, -1
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model[3].weight[0] += 0.5
        model[6].weight[0] -= 0.25
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = diagnose_module(
        model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)], features="6", units=["3"], reference=reference,
        iterations=3,
    )  # fmt: skip
    assert found.dormant == {"3": 3 / 8} and found.dormant_share == 3 / 8
    kernels = [model[i].weight.detach().numpy()[:, :, a, b] for i in (0, 3) for a in range(3) for b in range(3)]
    kernels.append(model[6].weight.detach().numpy())
    small = [w.T @ w if w.shape[0] > w.shape[1] else w @ w.T for w in kernels]
    deviations = [np.linalg.norm(g - np.eye(len(g))) ** 2 for g in small]
    assert found.dfi_mean == pytest.approx(np.mean(deviations), rel=1e-5)
    assert found.dfi_median == pytest.approx(np.median(deviations), rel=1e-5)
    assert found.sfe == pytest.approx(0.25 * 8 * 9 + 0.0625 * 4 * 36, rel=1e-5)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_pre_hooks for m in model.modules())
    assert set(found.measures()) >= {"srank", "dormant_share", "hessian_eigenvalue", "sfe"}


def test_what_cannot_be_measured_is_named():
    model, data = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), batches(1, 8, 4, 2)
    with pytest.raises(UserError, match="no module '2'"):
        diagnose_module(model, loss, data, features="2")
    with pytest.raises(UserError, match="batches: none"):
        diagnose_module(model, loss, [])
    with pytest.raises(UserError, match="'1' is not called"):
        diagnose_module(model, lambda m, b: m[0](b[0]).square().mean(), data, units=["1"])
    with pytest.raises(UserError, match="holds no matrix"):
        diagnose_module(nn.BatchNorm1d(4), lambda m, b: m(b[0]).mean(), data)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert diagnose_module(frozen, loss, data).not_measured["hessian_eigenvalue"] == "nothing is trained"
