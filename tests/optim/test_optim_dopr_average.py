"""The running average of Sigma and its warm-up, against the reference's weighted mean."""

import copy

import pytest
import reference
import torch
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr


def rows(step: int) -> Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(step)).double() * (1 + step)


def make(cov_decay: float) -> tuple[nn.Linear, DoPr]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    gp = torch.optim.SGD(layer.parameters(), lr=0.0)
    return layer, DoPr(gp, layer, cov_decay=cov_decay, refresh_every=2)


def train(layer: nn.Linear, optimizer: DoPr, inputs: list[Tensor]) -> Tensor:
    """Step on each of the inputs; returns the last G."""
    grad = torch.empty(0)
    for z in inputs:
        optimizer.zero_grad()
        layer(z).sin().sum().backward()
        assert layer.weight.grad is not None
        grad = layer.weight.grad
        optimizer.step()
    return grad


@pytest.mark.parametrize("cov_decay", [0.0, 0.05, 0.4, 0.95, 0.999])
def test_the_average_warms_up_as_the_reference_does(cov_decay: float) -> None:
    layer, optimizer = make(cov_decay)
    grad = train(layer, optimizer, [rows(step) for step in range(13)])
    moments = [reference.second_moment(rows(step)) for step in range(0, 13, 2)]
    expected = reference.precondition(grad, reference.average(moments, cov_decay), 0.1)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_the_warm_up_goes_on_after_a_resume_and_skips_what_was_not_finite() -> None:
    layer, optimizer = make(0.95)
    inputs = [rows(step) for step in range(12)]
    straight = train(layer, optimizer, inputs), layer.weight.grad
    first, before = make(0.95)
    train(first, before, [*inputs[:4], torch.full((9, 4), torch.nan).double(), inputs[5]])
    assert before.diagnostics()[""].refreshes == 2
    second, after = make(0.95)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.diagnostics()[""].refreshes == 2
    resumed = train(second, after, inputs[4:]), second.weight.grad
    for ours, expected in zip(resumed, straight, strict=True):
        assert torch.equal(ours, expected)
