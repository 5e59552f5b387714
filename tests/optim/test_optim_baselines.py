"""K-FAC against a dense Kronecker solve; SOAP's first real step against Adam in its eigenbasis."""

import pytest
import torch
from torch import nn

from flowdopr.optim import build_optimizer
from flowdopr.optim.kfac import KFAC


def per_row_factors(layer, z, target):
    """(n, d_in) and (n, d_out): inputs and output gradients, one autograd call a row."""
    rows = []
    for z_i, target_i in zip(z, target, strict=True):
        y = layer(z_i[None]).detach().requires_grad_()
        loss = (y - target_i).square().mean() / len(z)
        rows.append(torch.autograd.grad(loss, y)[0][0])
    return z, torch.stack(rows)


def test_kfac_equals_a_dense_kronecker_solve():
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    z = torch.randn(20, 4, dtype=torch.float64)
    target = torch.randn(20, 3, dtype=torch.float64)
    inputs, grads = per_row_factors(layer, z, target)
    factors = []
    for rows in (grads, inputs):
        factor = rows.T @ rows
        factor = factor / torch.linalg.eigvalsh(factor).mean()
        factors.append((factor + 0.2 * torch.eye(len(factor), dtype=torch.float64)) / 1.2)
    (layer(z) - target).square().mean().backward()
    step = torch.linalg.solve(torch.kron(*factors), layer.weight.grad.reshape(-1))
    layer.weight.grad = None

    before = layer.weight.detach().clone()
    optimizer = KFAC(layer, 0.1, damping=0.2, weight_decay=0.3)
    (layer(z) - target).square().mean().backward()
    optimizer.step()
    expected = (1 - 0.1 * 0.3) * before - 0.1 * step.reshape(3, 4)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_kfac_on_a_1x1_convolution_equals_linear():
    linear = nn.Linear(4, 3, dtype=torch.float64)
    conv = nn.Conv2d(4, 3, 1, dtype=torch.float64)
    conv.load_state_dict({"weight": linear.weight[..., None, None], "bias": linear.bias})
    optimizers = KFAC(linear, 0.1, refresh_every=2), KFAC(conv, 0.1, refresh_every=2)
    for _ in range(5):
        images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        linear(images.movedim(1, -1)).square().mean().backward()
        conv(images).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-10, atol=1e-12)


def test_kfac_pools_micro_batches():
    ours, theirs = (nn.Linear(4, 3, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(6, 4, dtype=torch.float64)
    for layer, batches in ((ours, [z]), (theirs, [z[:2], z[2:]])):
        optimizer = KFAC(layer, 0.1)
        for batch in batches:
            (layer(batch).square().sum() / 18).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)


def test_kfac_leaves_layers_it_cannot_factor_to_adamw():
    tied = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = tied.weight
    model = nn.ModuleList([tied, second, nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4)])
    optimizer = KFAC(model)
    by_kfac = [p for g in optimizer.param_groups if g["gp"] == "kfac" for p in g["params"]]
    assert len(by_kfac) == 1
    assert by_kfac[0] is model[3].weight


def test_kfac_refuses_values_out_of_range():
    for values in ({"damping": 0.0}, {"cov_decay": 1.0}, {"refresh_every": 1.5}):
        with pytest.raises(ValueError, match="KFAC: "):
            KFAC(nn.Linear(2, 2), **values)
    with pytest.raises(ValueError, match="no Linear or convolution"):
        KFAC(nn.LayerNorm(2))


def test_soap_is_adam_in_the_eigenbasis_of_its_factors():
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    first, second = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    optimizer = build_optimizer(layer, "soap", 0.1, betas=(0.9, 0.99))
    for grad in (first, second):  # the first step only gathers the factors
        layer.weight.grad = grad.clone()
        optimizer.step()
    left, _, right = torch.linalg.svd(first, full_matrices=True)
    rotated = left.T @ second @ right.T
    # Adam's first step: both moments are bias-corrected to the gradient and its square
    step = left @ (rotated / (rotated.abs() + 1e-8)) @ right
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * step, rtol=1e-5, atol=1e-6)
