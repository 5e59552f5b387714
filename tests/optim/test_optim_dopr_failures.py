"""After a failed factorisation: bitwise resumes, powers, scheduled damping."""

import copy

import pytest
import torch
from layer_cases import adamw
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr


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
    assert expected.diagnostics()[""].least_damping > 0
    assert after.diagnostics() == expected.diagnostics()
    assert torch.equal(second.weight, straight.weight)


def test_damping_that_failed_stays_raised_and_a_higher_schedule_wins() -> None:
    layer, optimizer = make(damping=(1e-8, 0.5, 8))
    seen = []
    for step in range(11):
        train(layer, optimizer, range(step, step + 1))
        seen.append(optimizer.diagnostics()[""].damping)
    assert seen[0] == seen[1] == pytest.approx(1e-8)
    assert seen[2] == pytest.approx(10 * torch.finfo(torch.float32).eps)
    assert seen[-1] == pytest.approx(0.5)


def saved_every_step(train_to, steps: int) -> None:
    """A run resumed from its state at every step ends bitwise where the straight run does."""
    straight, _ = train_to(range(steps), None)
    for step in range(1, steps):
        _, state = train_to(range(step), None)
        resumed, _ = train_to(range(step, steps), state)
        for ours, expected in zip(resumed, straight, strict=True):
            assert torch.equal(ours, expected), step


def test_layers_of_two_precisions_resume_bitwise() -> None:
    def run(steps: range, state: tuple | None) -> tuple[list[Tensor], tuple]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(3, 2).double(), nn.Linear(30, 20)])
        optimizer = adamw(model, refresh_every=1)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            wide = model[1](torch.randn(40, 30)).square().mean()
            (wide + model[0](torch.randn(9, 3).double()).square().mean()).backward()
            optimizer.step()
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        return [p.detach().clone() for p in model.parameters()], state

    saved_every_step(run, 20)


def test_an_overflowing_sigma_gives_no_nan() -> None:
    """Its trace is finite, but what is added for the mean over offsets is not."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    optimizer = adamw(layer, conv_mode="sua-mean")
    layer(torch.full((1, 2, 1, 2), 6.2e18) + torch.randn(1, 2, 1, 2) * 3e17).sum().backward()
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.isfinite(optimizer.transforms[0]).all()
    assert torch.isfinite(layer.weight).all()


def test_a_failed_float32_layer_is_damped_for_float32_beside_a_float64_one() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"narrow": nn.Linear(40, 2), "wide": nn.Linear(3, 2).double()})
    optimizer = adamw(model, refresh_every=1, damping=0.0)
    for step in range(2):
        optimizer.zero_grad()
        loss = model["narrow"](singular(step)).square().sum()
        (loss + model["wide"](torch.randn(9, 3).double()).square().sum()).backward()
        optimizer.step()
    assert optimizer.diagnostics()["narrow"].damping >= 10 * torch.finfo(torch.float32).eps
