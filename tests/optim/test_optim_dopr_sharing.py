"""One statistic for modules that are fed the same tensor."""

import copy
import logging

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
        twins = [
            s.shared_with.name if s.shared_with else None for s in optimizer.statistics.moments
        ]
        assert twins == [None, "q", None if apart else "q", None]
        kept = [s.sigma is not None for s in optimizer.statistics.moments]
        assert kept == [twin is None for twin in twins]
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


def test_parted_twins_are_reported(caplog) -> None:
    model = Attention()
    optimizer = adamw(model, refresh_every=1)
    train(model, optimizer, range(1))
    model.apart = True
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        train(model, optimizer, range(1, 4))
    assert caplog.text.count("layer v: no longer fed the tensor of q") == 1


def test_parted_twins_have_statistics_of_their_own_from_the_next_refresh_on() -> None:
    """Their M is what a layer that never shared gets, once the common past is forgotten."""
    ends = []
    for apart_first in (False, True):
        model = Attention()
        model.apart = apart_first
        optimizer = adamw(model, refresh_every=1, cov_decay=0.0)
        train(model, optimizer, range(1))
        model.apart = True
        train(model, optimizer, range(1, 2))  # notices
        train(model, optimizer, range(2, 3))  # gathers for itself
        v = optimizer.statistics.moments[2]
        assert (v.name, v.shared_with) == ("v", None)
        ends.append((v.transform, optimizer.transforms[0]))
    for shared, alone in zip(*ends, strict=True):
        torch.testing.assert_close(shared, alone)


def test_a_twin_outlives_a_leader_that_no_longer_runs() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    model = nn.ModuleList([first, second])
    optimizer = adamw(model, refresh_every=1, cov_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        x = (step + 1) * torch.randn(5, 3)
        (first(x) + second(x) if step == 0 else second(x)).square().mean().backward()
        optimizer.step()
    own = optimizer.statistics.moments[1]
    assert own.shared_with is None
    torch.testing.assert_close(
        (own.sigma / optimizer.diagnostics()["1"].ema_weight)[0, 0].tril(),
        (x.mT @ x / 5).tril(),
    )


def test_recomputed_forwards_pair_once() -> None:
    for reentrant in (False, True):
        model = Attention()
        optimizer = adamw(model, refresh_every=1)
        for step in range(2):
            optimizer.zero_grad()
            x = data(step).requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
            optimizer.step()
        assert [s.shared_with is not None for s in optimizer.statistics.moments] == [
            False,
            True,
            True,
            False,
        ]


def test_a_module_called_twice_on_one_tensor_counts_twice() -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    x = torch.ones(4, 3)
    (layer(x) + layer(x)).sum().backward()
    assert optimizer.statistics.moments[0].unused.rows == 8
    optimizer.step()
    assert optimizer.statistics.moments[0].shared_with is None
