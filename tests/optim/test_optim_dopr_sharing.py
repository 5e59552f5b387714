"""Layers that read the same tensor share one Sigma."""

import copy

import pytest
import torch
from layer_cases import adamw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """q, k, v see one tensor; the output layer another; `apart` gives v a copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x.clone() if self.apart else x)
        return self.out((q @ k.mT).softmax(-1) @ v)


def shared_name(moment) -> str | None:
    """The name of the layer whose Sigma this one uses."""
    return moment.shared_with.name if moment.shared_with else None


def data(step: int) -> Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_modules_fed_the_same_tensor_share_one_statistic_and_change_nothing() -> None:
    runs = []
    for apart in (False, True):
        model = Attention()
        model.apart = apart
        optimizer = adamw(model, refresh_every=2)
        runs.append(train(model, optimizer, range(6)))
        shared = [
            s.shared_with.name if s.shared_with else None for s in optimizer.statistics.moments
        ]
        assert shared == [None, "q", None if apart else "q", None]
        kept = [s.sigma is not None for s in optimizer.statistics.moments]
        assert kept == [name is None for name in shared]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_sharing_is_resumed_bitwise() -> None:
    straight = Attention()
    expected = train(straight, adamw(straight, refresh_every=2), range(6))
    first = Attention()
    optimizer = adamw(first, refresh_every=2)
    train(first, optimizer, range(3))
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    assert set(state[1]["dopr"]["averages"]) == {"q", "out"}
    second = Attention()
    resumed = adamw(second, refresh_every=2)
    second.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for a, b in zip(train(second, resumed, range(3, 6)), expected, strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_shares_and_then_reads_another_tensor_is_refused_with_the_remedy() -> None:
    model = Attention()
    optimizer = adamw(model, refresh_every=1)
    train(model, optimizer, range(1))
    model.apart = True
    with pytest.raises(ValueError, match=r"layer 'v' shares the statistics of layer 'q'") as error:
        train(model, optimizer, range(1, 2))
    assert "LayerRule('^v$')" in str(error.value)
    model = Attention()
    optimizer = adamw(model, refresh_every=1, rules=[{"pattern": "^v$"}])
    for step in range(4):
        model.apart = step > 1
        train(model, optimizer, range(step, step + 1))
    assert [shared_name(s) for s in optimizer.statistics.moments] == [None, "q", None, None]


def test_recomputed_forwards_do_not_end_the_sharing() -> None:
    for reentrant in (False, True):
        model = Attention()
        optimizer = adamw(model, refresh_every=1)
        for step in range(2):
            optimizer.zero_grad()
            x = data(step).requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
            optimizer.step()
        names = [shared_name(s) for s in optimizer.statistics.moments]
        assert names == [None, "q", "q", None]


class Calls(nn.Module):
    """Calls its layers as a string says: "kx qy" is k(x) + q(y), "*" doubles x in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k, self.q = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, calls: str) -> Tensor:
        inputs = {"x": data(0), "y": data(1)}
        total = torch.zeros(())
        for call in calls.split():
            if call == "*":
                inputs["x"].mul_(2)
            else:
                total = total + getattr(self, call[0])(inputs[call[1]]).float().sin().sum()
        return total


def step_of_calls(model: Calls, optimizer: torch.optim.Optimizer, calls: str) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):  # keeps copies of inputs: changes go unnoticed
        loss = model(calls)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("calls", "shares"),
    [
        ("kx qx", True),
        ("qx kx ky qy", True),
        ("kx qx ky", False),
        ("kx kx qx ky qy", False),
        ("kx * qx", False),
    ],
)
def test_layers_share_if_they_read_the_same_tensors_as_often(calls: str, shares: bool) -> None:
    model = Calls()
    optimizer = adamw(model, refresh_every=1)
    step_of_calls(model, optimizer, calls)
    assert [shared_name(s) for s in optimizer.statistics.moments] == [None, "k" if shares else None]


@pytest.mark.parametrize(
    ("calls", "allowed"),
    [("qx kx", True), ("kx", True), ("qx", False), ("kx * qx", False), ("kx qx qy", False)],
)
def test_layers_that_share_may_change_their_order_but_not_their_inputs(
    calls: str, allowed: bool
) -> None:
    model = Calls()
    optimizer = adamw(model, refresh_every=1)
    step_of_calls(model, optimizer, "kx qx")
    if allowed:
        step_of_calls(model, optimizer, calls)
        assert shared_name(optimizer.statistics.moments[1]) == "k"
    else:
        with pytest.raises(ValueError, match="layer 'q' shares the statistics of layer 'k'"):
            step_of_calls(model, optimizer, calls)


@pytest.mark.parametrize("frozen", ["k", "q"])
def test_one_of_two_layers_that_share_may_be_frozen_while_the_other_trains(frozen: str) -> None:
    """The other one takes the steps that it takes with a Sigma of its own, also after a resume."""
    runs = []
    for rules in ([], [{"pattern": "^q$"}]):
        model = Calls()
        optimizer = adamw(model, refresh_every=1, rules=rules)
        for step in range(6):
            if step == 3:
                state, optimizer = (
                    optimizer.state_dict(),
                    adamw(model, refresh_every=1, rules=rules),
                )
                optimizer.load_state_dict(state)
            getattr(model, frozen).requires_grad_(step not in (1, 3, 4))
            step_of_calls(model, optimizer, "kx qx")
        assert shared_name(optimizer.statistics.moments[1]) == (None if rules else "k")
        other = model.q if frozen == "k" else model.k
        runs.append(other.weight.detach())
    assert torch.equal(*runs)


class TiedConvs(nn.Module):
    """Two convolutions of one weight and of two strides, and a third one; all read one tensor."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3, stride=2)
        self.two.weight = self.one.weight
        self.third = nn.Conv2d(2, 3, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x).sin().sum() + self.third(x).cos().sum()


@pytest.mark.parametrize(("stride", "shares"), [(1, False), (2, True)])
def test_tied_convolutions_share_by_the_stride_that_read_the_tensor(
    stride: int, shares: bool
) -> None:
    model = TiedConvs(stride)
    optimizer = adamw(model, refresh_every=1)
    model(torch.randn(4, 2, 9, 9)).backward()
    optimizer.step()
    assert shared_name(optimizer.statistics.moments[1]) == ("one" if shares else None)


def test_a_module_called_twice_on_one_tensor_counts_twice() -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    x = torch.ones(4, 3)
    (layer(x) + layer(x)).sum().backward()
    assert optimizer.statistics.moments[0].unused.rows == 8
    optimizer.step()
    assert optimizer.statistics.moments[0].shared_with is None
