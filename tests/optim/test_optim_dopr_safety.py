"""DoPr in other hands: wrapped by accelerate, and interrupted inside a step."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from flowdopr.optim import DoPr


class Heads(nn.Module):
    """Two layers fed the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x)


def test_accelerate_does_not_end_the_sharing_of_statistics():
    model = Heads()
    optimizer = DoPr(torch.optim.SGD(model.parameters(), lr=0.1), model)
    wrapped_model, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    wrapped_model(torch.randn(8, 4)).square().mean().backward()
    wrapped.step()
    shared = [s.shared_with.name if s.shared_with else None for s in optimizer.statistics.moments]
    assert shared == [None, "q"]


def test_a_step_that_fails_inside_the_sandwich_keeps_the_weights():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    optimizer = DoPr(Failing(model.parameters(), lr=0.1), model, form="sandwich")
    model(torch.randn(8, 4)).square().mean().backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(model.weight, before)
