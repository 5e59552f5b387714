"""Signum, RowNorm and AdaMuon against their formulas, written once more in plain float64."""

import pytest
import torch
from torch import nn

from flowdopr.optim.adamuon import AdaMuon
from flowdopr.optim.rownorm import RowNorm
from flowdopr.optim.signum import Signum

STEPS = 5


def polar_steps(matrix):
    x = matrix / matrix.norm()
    if x.shape[0] > x.shape[1]:
        return polar_steps(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def plain_adamuon(weight, grads, *, lr, momentum, nesterov, weight_decay, eps):
    buffer, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        update = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
        step = polar_steps(update.sign().flatten(1)).reshape(weight.shape)
        second = momentum * second + (1 - momentum) * step**2
        step = step / (second.sqrt() + eps)
        step = step * 0.2 * step.numel() ** 0.5 / (step.norm() + eps)
        weight = (1 - lr * weight_decay) * weight - lr * step
    return weight


def run(optimizer, weights, grads):
    for step in zip(*grads, strict=True):
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_adamuon_equals_its_formulas(nesterov):
    shapes = [(6, 4), (4, 6), (5, 2, 3, 3), (6, 4)]
    weights = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    grads = [[torch.randn(s, dtype=torch.float64) for _ in range(STEPS)] for s in shapes]
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1, "eps": 1e-8}
    expected = [
        plain_adamuon(w.detach(), g, **settings) for w, g in zip(weights, grads, strict=True)
    ]
    run(AdaMuon(weights, **settings), weights, grads)
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-10, atol=1e-10)


def test_adamuon_treats_fused_blocks_as_separate_weights():
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "eps": 1e-8}
    fused = nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
    grads = [torch.randn(9, 4, dtype=torch.float64) for _ in range(STEPS)]
    apart = [
        plain_adamuon(fused.detach()[i : i + 3], [g[i : i + 3] for g in grads], **settings)
        for i in (0, 3, 6)
    ]
    run(AdaMuon([{"params": [fused], "fused_blocks": 3}], **settings), [fused], [grads])
    torch.testing.assert_close(fused.detach(), torch.cat(apart), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_signum_equals_its_formula(momentum):
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    grads = [torch.randn(4, 3, dtype=torch.float64) for _ in range(STEPS)]
    expected, buffer = weight.detach().clone(), torch.zeros(4, 3, dtype=torch.float64)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        expected = (1 - 0.01 * 0.5) * expected - 0.01 * buffer.sign()
    run(Signum([weight], 0.01, momentum=momentum, weight_decay=0.5), [weight], [grads])
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("values", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}])
def test_signum_refuses_values_out_of_range(values):
    with pytest.raises(ValueError, match="signum"):
        Signum([torch.ones(2)], **values)


def test_adamuon_refuses_values_out_of_range():
    with pytest.raises(ValueError, match="adamuon: eps"):
        AdaMuon([torch.ones(2, 2)], eps=-1.0)


def test_rownorm_equals_its_formula_for_matrices_and_convolutions():
    for shape in [(4, 3), (3, 2, 3, 3)]:
        weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        grads = [torch.randn(shape, dtype=torch.float64) for _ in range(STEPS)]
        expected, buffer = weight.detach().clone(), torch.zeros_like(weight)
        for grad in grads:
            buffer = 0.9 * buffer + 0.1 * grad
            expected = (1 - 0.01 * 0.5) * expected
            for i, row in enumerate(buffer):
                expected[i] -= 0.01 * 0.2 * row.numel() ** 0.5 * row / row.norm()
        run(RowNorm([weight], 0.01, momentum=0.9, weight_decay=0.5), [weight], [grads])
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
