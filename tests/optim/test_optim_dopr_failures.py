"""After a failed factorisation: bitwise resumes, the dual form, powers, scheduled damping."""

import copy

import pytest
import torch
from layer_cases import adamw
from torch import Tensor, nn

from flowdopr.optim import reference
from flowdopr.optim.dopr import DoPr
from flowdopr.optim.plan import LayerRule


def singular(step: int) -> Tensor:
    """Three rows in 40 coordinates."""
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(step))


def train(layer: nn.Linear, optimizer: DoPr, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        layer(singular(step)).square().sum().backward()
        optimizer.step()


def make(**settings: object) -> tuple[nn.Linear, DoPr]:
    torch.manual_seed(0)
    layer = nn.Linear(40, 2, bias=False)
    return layer, adamw(layer, refresh_every=2, cov_decay=0.0, **settings)


@pytest.mark.parametrize("saved_at", range(1, 8))
@pytest.mark.parametrize("settings", [{}, {"form": "sandwich"}, {"power": 0.5}], ids=str)
def test_a_resume_is_bitwise_whatever_failed_before(saved_at: int, settings: dict) -> None:
    straight, expected = make(damping=0.0, **settings)
    train(straight, expected, range(8))
    first, before = make(damping=0.0, **settings)
    train(first, before, range(saved_at))
    second, after = make(damping=0.0, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, after, range(saved_at, 8))
    assert expected.preconditioner.records()[""].least_damping > 0
    assert after.preconditioner.records() == expected.preconditioner.records()
    assert torch.equal(second.weight, straight.weight)


def test_the_dual_form_falls_back_to_a_multiple_of_g() -> None:
    layer, optimizer = make(damping=1e-9, rules=[LayerRule("", "dual")])
    z = torch.ones(4, 40)
    seen = []
    for _ in range(9):
        optimizer.zero_grad()
        layer(z).sum().backward()
        grad = layer.weight.grad.clone()
        optimizer.step()
        seen.append((grad, layer.weight.grad, optimizer.preconditioner.records()[""].damping))
    grad, m, damping = seen[0]
    torch.testing.assert_close(m, grad / (1 + damping))
    grad, m, damping = seen[-1]
    assert 1e-9 < damping < 1e-3
    expected = reference.precondition(grad.double(), reference.second_moment(z), damping)
    torch.testing.assert_close(m.double(), expected, rtol=1e-2, atol=1e-2)


def test_damping_that_failed_stays_raised_and_a_higher_schedule_wins() -> None:
    layer, optimizer = make(damping=(1e-8, 0.5, 8))
    seen = []
    for step in range(11):
        train(layer, optimizer, range(step, step + 1))
        seen.append(optimizer.preconditioner.records()[""].damping)
    assert seen[0] == seen[1] == pytest.approx(1e-8)
    assert seen[2] == pytest.approx(10 * torch.finfo(torch.float32).eps)
    assert seen[-1] == pytest.approx(0.5)
