"""AP on the gradient of the effective weight f(W), before it is carried through f to the raw W."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdopr.models import add_pc_layers, update_spectral_norms
from flowdopr.models.layers import Conv2d, Linear
from flowdopr.optim.dopr import DoPr

X, Y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Linear(6, 9), nn.Tanh(), Linear(9, 6)).double()


def dopr(model: nn.Module, pc_gradient: str = "effective", **settings) -> DoPr:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return DoPr(optimizer, model, pc_gradient=pc_gradient, **settings)


def backward(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> None:
    (model(x) - y).square().mean().backward()


def steps(model: nn.Module, optimizer: DoPr, number: int) -> list[Tensor]:
    for _ in range(number):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("pc_gradient", ["raw", "effective"])
def test_without_a_map_both_gradients_give_plain_dopr(pc_gradient):
    plain, mapped = network(), network()
    mapped[0].weight_map = nn.Identity()
    theirs, ours = dopr(plain, "raw", refresh_every=4), dopr(mapped, pc_gradient, refresh_every=4)
    steps(plain, theirs, 1)
    mapped.load_state_dict(plain.state_dict())
    ours.load_state_dict(
        copy.deepcopy(theirs.state_dict())
    )  # steps 1 to 3 take the T of step 0 in both
    for expected, found in zip(steps(plain, theirs, 3), steps(mapped, ours, 3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
