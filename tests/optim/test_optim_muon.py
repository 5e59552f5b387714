"""Muon and Newton-Schulz: against torch's own Muon and a float64 reference; B batch, K matrices."""

import copy

import pytest
import torch
from torch import nn

from flowdopr.optim.muon import SCALES, Muon, newton_schulz


def plain_newton_schulz(matrix):
    x = matrix / matrix.norm()
    if x.shape[0] > x.shape[1]:
        return plain_newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def plain_muon(weight, grads, *, lr, momentum, nesterov, weight_decay, adjust_lr, blocks=1):
    """Muon on one weight (C_out, ...) by the formulas alone, one block at a time."""
    weight, buffer = weight.clone(), torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        update = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
        weight = (1 - lr * weight_decay) * weight
        rows = weight.shape[0] // blocks
        for start in range(0, weight.shape[0], rows):
            part = update[start : start + rows]
            block = part.flatten(1)
            if (
                adjust_lr == "original"
            ):  # KellerJordan/Muon, 00ba60d: before the kernel is flattened
                scale = max(1, part.shape[-2] / part.shape[-1]) ** 0.5
            else:
                scale = 0.2 * max(rows, block.shape[1]) ** 0.5
            step = plain_newton_schulz(block).reshape(part.shape)
            weight[start : start + rows] -= lr * scale * step
    return weight


def run(optimizer, weights, grads):
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("adjust_lr", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_formulas_in_float64_for_matrices_and_convolutions(adjust_lr, nesterov):
    shapes = [(6, 4), (4, 6), (6, 4), (5, 3, 3, 3), (8, 8), (40, 2, 3, 3), (4, 3, 5, 2)]
    weights = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    grads = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(4)]
    settings = {"lr": 0.03, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    expected = [
        plain_muon(w.detach(), [g[i] for g in grads], adjust_lr=adjust_lr, **settings)
        for i, w in enumerate(weights)
    ]
    run(Muon(weights, adjust_lr=adjust_lr, **settings), weights, grads)
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjust_lr", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_torch_muon(adjust_lr, nesterov):
    ours = [nn.Parameter(torch.randn(s)) for s in [(16, 8), (8, 16), (8, 8)]]
    theirs = copy.deepcopy(ours)
    grads = [[torch.randn_like(w) for w in ours] for _ in range(10)]
    settings = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1}
    run(Muon(ours, adjust_lr=adjust_lr, ns_dtype=torch.bfloat16, **settings), ours, grads)
    run(torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, **settings), theirs, grads)
    # bfloat16 rounds at 2^-8 and the two round in different orders
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.detach(), their.detach(), rtol=0.0, atol=0.01)


def test_blocks_of_a_fused_weight_are_orthogonalised_apart():
    weight = nn.Parameter(torch.randn(12, 5, dtype=torch.float64))
    grads = [[torch.randn(12, 5, dtype=torch.float64)] for _ in range(3)]
    settings = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0}
    expected = plain_muon(
        weight.detach(), [g[0] for g in grads], adjust_lr="original", blocks=3, **settings
    )
    groups = [{"params": [weight], "fused_blocks": 3}]
    run(Muon(groups, adjust_lr="original", **settings), [weight], grads)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_everything_else_follows_adamw_bitwise():
    model = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    other_model = copy.deepcopy(model)
    muon = Muon(model, 0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6, adamw_lr=0.003)
    others = [other_model[0].weight, *other_model[1].parameters(), other_model[2].bias]
    adamw = torch.optim.AdamW(others, 0.003, weight_decay=0, betas=(0.8, 0.99), eps=1e-6)
    tokens = torch.randint(7, (5, 3))
    for _ in range(5):
        other_model[2].weight.data.copy_(model[2].weight)
        for network, optimizer in ((model, muon), (other_model, adamw)):
            optimizer.zero_grad()
            network(tokens).square().mean().backward()
            optimizer.step()
    ours = [model[0].weight, *model[1].parameters(), model[2].bias]
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4), (1, 1, 5)])
def test_newton_schulz_is_near_orthogonal_and_keeps_singular_vectors(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    result = newton_schulz(matrices)
    assert result.dtype == torch.float64
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ result @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0.0, atol=1e-10)
    assert values.min() > 0.3
    assert values.max() < 1.25


def test_newton_schulz_of_zero_is_zero_and_scale_does_not_matter():
    assert newton_schulz(torch.zeros(2, 3, 4)).abs().sum() == 0
    matrices = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(1e-3 * matrices), newton_schulz(matrices))


def test_updates_are_as_large_as_those_of_adamw():
    weight = nn.Parameter(torch.zeros(48, 160))
    run(Muon([weight], 0.01), [weight], [[torch.randn(48, 160)]])
    assert 0.002 * 0.7 < weight.detach().square().mean().sqrt() < 0.002 * 1.3


def test_half_precision_weights_stay_so():
    weight = nn.Parameter(torch.randn(8, 4).bfloat16())
    run(Muon([weight], 0.01), [weight], [[torch.randn(8, 4).bfloat16()]])
    assert weight.dtype == torch.bfloat16
    assert weight.isfinite().all()


def test_layers_left_to_adamw_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = Muon(model, adamw_for=[r"^0\.", r"^2\."])
    by_muon = [p for g in optimizer.param_groups if g["gp"] == "muon" for p in g["params"]]
    assert len(by_muon) == 1
    assert by_muon[0] is model[1].weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon([torch.ones(2, 2)], -1.0), "lr=-1.0"),
        (lambda: Muon([torch.ones(2, 2)], momentum=1.0), "momentum and betas"),
        (lambda: Muon([torch.ones(2, 2)], betas=(0.9, 1.5)), "momentum and betas"),
        (lambda: Muon([torch.ones(2, 2)], adjust_lr="none"), "adjust_lr='none'"),
        (lambda: Muon([torch.ones(2, 2)], ns_steps=-3), "ns_steps=-3"),
        (lambda: Muon([torch.ones(2, 2)], adamw_lr=-3.0), "adamw_lr=-3.0"),
        (lambda: Muon([torch.ones(2, 2)], adamw_for=["x"]), "needs a model"),
        (lambda: Muon(nn.Linear(2, 2), adamw_for=["head"]), "matches no parameter"),
        (lambda: Muon([{"params": torch.ones(3), "gp": "muon"}]), "takes matrices"),
        (lambda: Muon([{"params": torch.ones(3, 2), "fused_blocks": 2}]), "takes matrices"),
        (lambda: Muon([{"params": torch.ones(3, 2), "gp": "sgd"}]), "gp='sgd'"),
    ],
)
def test_refuses_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
