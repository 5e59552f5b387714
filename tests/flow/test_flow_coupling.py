"""Couplings: the exact one against all permutations, the entropic one against its limits."""

from itertools import permutations

import pytest
import torch

from flowdopr.flow import make_coupling
from flowdopr.flow.coupling import Entropic, squared_distances


def total_cost(x_0, x_1):
    return (x_0 - x_1).square().sum().item()


def rows(x):
    return sorted(map(tuple, x.tolist()))


def test_exact_is_the_best_of_all_permutations():
    x_0, x_1 = torch.randn(6, 3), torch.randn(6, 3)
    best = min(total_cost(x_0[list(order)], x_1) for order in permutations(range(6)))
    coupled = make_coupling("exact")(x_0, x_1, None, torch.rand(6))
    assert total_cost(coupled, x_1) == pytest.approx(best, rel=1e-5)
    assert rows(coupled) == rows(x_0)


def test_exact_is_the_best_within_each_class():
    x_0, x_1, y = torch.randn(10, 3), torch.randn(10, 3), torch.tensor([0] * 4 + [1] * 5 + [2])
    y = y[torch.randperm(10)]
    coupled = make_coupling("exact")(x_0, x_1, y, torch.rand(10))
    for label in range(3):
        a, b = x_0[y == label], x_1[y == label]
        best = min(total_cost(a[list(order)], b) for order in permutations(range(len(a))))
        assert total_cost(coupled[y == label], b) == pytest.approx(best, rel=1e-5)
        assert rows(coupled[y == label]) == rows(a)


@pytest.mark.parametrize("name", ["exact", "entropic"])
def test_noise_moves_only_between_equal_conditions_of_any_shape(name):
    x_0, x_1, y = torch.randn(9, 3), torch.randn(9, 3), torch.arange(9) % 3
    vectors = torch.stack([y.sin(), y.cos()], 1)
    coupling, u = make_coupling(name), torch.rand(9)
    assert torch.equal(coupling(x_0, x_1, vectors, u), coupling(x_0, x_1, y, u))
    alone = torch.randn(9, 2)
    assert torch.equal(coupling(x_0, x_1, alone, u), x_0)


def test_entropic_plan_has_uniform_marginals_and_stays_within_classes():
    x_0, x_1, y = torch.randn(12, 3), torch.randn(12, 3), torch.arange(12) % 3
    plan = Entropic(0.1, 500).plan(x_0, x_1, y)
    assert torch.allclose(plan.sum(1), torch.ones(12), atol=1e-5)
    assert torch.allclose(plan.sum(0), torch.ones(12), atol=1e-3)
    assert (plan[y[:, None] != y[None, :]] == 0).all()


def test_entropic_solves_sinkhorns_equations():
    """The plan is diag(a) K diag(b), so log plan + cost / eps has rank-one double differences."""
    x_0, x_1 = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    cost = squared_distances(x_1, x_0, None).double()
    potential = Entropic(0.3, 1000).plan(x_0, x_1).double().log() + cost / (0.3 * cost.mean())
    doubly_centred = potential - potential.mean(0) - potential.mean(1, keepdim=True)
    assert torch.allclose(doubly_centred, -potential.mean().expand(5, 5), atol=1e-4)


def test_entropic_limits_are_exact_and_independent():
    x_0, x_1, u = torch.randn(16, 3), torch.randn(16, 3), torch.rand(16)
    sharp = Entropic(1e-3, 3000)(x_0, x_1, None, u)
    assert torch.equal(sharp, make_coupling("exact")(x_0, x_1, None, u))
    flat = Entropic(1e6).plan(x_0, x_1)
    assert torch.allclose(flat, torch.full((16, 16), 1 / 16), atol=1e-5)


def test_entropic_draws_follow_the_plan_and_stay_within_classes():
    x_0, x_1, y = torch.randn(6, 2), torch.randn(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    coupling = Entropic(0.5, iterations=20)
    plan = coupling.plan(x_0, x_1, y)
    counts = torch.zeros(6, 6)
    for u in torch.linspace(0, 1, 400):
        chosen = coupling(x_0, x_1, y, u.expand(6))
        index = (chosen[:, None] == x_0[None]).all(2).float()
        counts += index
    assert torch.allclose(counts / 400, plan, atol=5e-3)
    assert (counts[plan == 0] == 0).all()


@pytest.mark.parametrize("name", ["independent", "exact", "entropic"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_shape_and_dtype(name, labels, dtype):
    x_0, x_1 = torch.randn(7, 1, 2, 2).to(dtype), torch.randn(7, 1, 2, 2).to(dtype)
    y = torch.tensor([0, 0, 1, 1, 1, 2, 2]) if labels else None
    coupled = make_coupling(name)(x_0, x_1, y, torch.rand(7))
    assert coupled.shape == x_0.shape
    assert coupled.dtype == dtype
    known = {tuple(row) for row in x_0.flatten(1).tolist()}
    assert {tuple(row) for row in coupled.flatten(1).tolist()} <= known


@pytest.mark.parametrize("name", ["exact", "entropic"])
def test_one_image_keeps_its_noise(name):
    x_0, x_1 = torch.randn(1, 4), torch.randn(1, 4)
    assert torch.equal(make_coupling(name)(x_0, x_1, torch.tensor([3]), torch.rand(1)), x_0)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="choose one of"):
        make_coupling("sinkhorn")
    with pytest.raises(ValueError, match="positive"):
        make_coupling("entropic", regularisation=0)
