"""Weights of bfloat16 and float16: their steps are those of float32 weights, up to rounding."""

import copy

import pytest
import torch
from labels import LABELS, build
from torch import nn
from torch.nn.utils import parameters_to_vector

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
LR = {"sgd": 200.0, "kfac": 0.01}
# Signs of momenta, and Adam's in a basis that rounding turns, differ where gradients are near zero.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.025}
ROUGH = {"signum": 0.25, "soap": 0.35, "pytorch_optimizer.Lion": 0.25}


class Network(nn.Module):
    """Small gradients, a row of the table that no label reads, and a unit that is always off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(5, 8), nn.LayerNorm(8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        nn.init.constant_(self.first.bias[:1].data, -100)

    def forward(self, x, labels):
        return self.last(self.first(self.norm(x + self.table(labels))).relu())


def make(label, dtype):
    network = Network().to(dtype)
    name = label.removeprefix("dopr-")
    options = {"refresh_every": 4} if name != label or name == "kfac" else {}
    return network, build(network, label, LR.get(name, 0.01), **options)


def train(network, optimizer, steps):
    dtype = next(network.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 8, generator=generator)
        labels = torch.randint(4, (32,), generator=generator)
        optimizer.zero_grad()
        y = network(x.to(dtype), labels)
        (1e-3 * (y.float() - x[:, :4]).square().mean()).backward()
        optimizer.step()
    return parameters_to_vector(network.parameters()).detach()


@HALVES
@pytest.mark.parametrize("label", LABELS)
def test_steps_are_those_of_float32_up_to_rounding(label, dtype):
    start = parameters_to_vector(Network().parameters()).detach()
    exact = train(*make(label, torch.float32), range(50))
    network, optimizer = make(label, dtype)
    places = [p.data_ptr() for p in network.parameters()]
    rough = train(network, optimizer, range(50))
    assert rough.dtype == dtype
    assert [p.data_ptr() for p in network.parameters()] == places
    tolerance = ROUGH.get(label.removeprefix("dopr-"), TOLERANCE[dtype])
    assert (rough.float() - exact).norm() < tolerance * (exact - start).norm()


@HALVES
@pytest.mark.parametrize("label", LABELS)
def test_state_is_float32_and_resumes_bitwise(label, dtype):
    straight = train(*make(label, dtype), range(7))
    network, optimizer = make(label, dtype)
    train(network, optimizer, range(5))
    values = [v for state in optimizer.state.values() for v in state.values()]
    assert {v.dtype for v in values if isinstance(v, torch.Tensor)} <= {torch.float32}
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    again, resumed = make(label, dtype)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert torch.equal(train(again, resumed, range(5, 7)), straight)


@HALVES
def test_a_step_that_fails_gives_weights_and_gradients_back(dtype):
    network, optimizer = make("adamw", dtype)
    optimizer.param_groups[0]["lr"] = "wrong"
    network(torch.randn(4, 8).to(dtype), torch.arange(4)).sum().backward()
    with pytest.raises(TypeError):
        optimizer.step()
    assert {t.dtype for p in network.parameters() for t in (p, p.grad)} == {dtype}


def test_weights_without_memory_load_a_state():
    network = Network().to("meta", torch.bfloat16)
    optimizer = build(network, "muon", 0.01)
    optimizer.load_state_dict(optimizer.state_dict())
