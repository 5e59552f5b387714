"""How DoPr behaves in training: windows, accumulation, checkpointing, scaling, resume, errors."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from layer_cases import FORMS, adamw, batch, small_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdopr.optim.dopr import DoPr


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("cov_decay", [0.0, 0.95])
@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bitwise(stop: int, cov_decay: float, form: str) -> None:
    settings = {"cov_decay": cov_decay, "refresh_every": 2, **FORMS[form]}
    straight = small_model()
    train(straight, adamw(straight, **settings), range(10))
    first = small_model()
    optimizer = adamw(first, **settings)
    train(first, optimizer, range(stop))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = small_model(1)
    resumed = adamw(second, **settings)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(second, resumed, range(stop, 10))
    assert same(weights(straight), weights(second))
    numbers = resumed.diagnostics()["0"]
    assert (numbers.refreshes, numbers.skipped) == (5, 0)


def test_state_goes_through_a_file(tmp_path) -> None:
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = adamw(small_model())
    other.load_state_dict(state)
    assert other.steps == 2
    sigma = other.statistics.moments[0].sigma
    assert sigma is not None
    assert torch.equal(sigma.tril(), optimizer.statistics.moments[0].sigma.tril())


def test_state_of_a_bare_optimizer_or_another_model_is_refused() -> None:
    model = small_model()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="no entry 'dopr'"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    train(model, optimizer, range(1))
    renamed = nn.Sequential(nn.Sequential(small_model()))
    with pytest.raises(ValueError, match="which this model lacks"):
        adamw(renamed).load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    del state["dopr"]["shared"]
    with pytest.raises(ValueError, match="another version of flowdopr"):
        optimizer.load_state_dict(state)


class Checkpointed(nn.Module):
    """A model whose middle runs under activation checkpointing, or does not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reentrant = nn.Linear(5, 5), reentrant
        self.middle, self.last = (
            nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    runs = []
    for kind in (None, reentrant):
        model = Checkpointed(kind)
        optimizer = adamw(model, refresh_every=2)
        for step in range(6):
            optimizer.zero_grad()
            for half in torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(step)):
                model(half).square().mean().backward()
            counts = [s.unused.rows + s.used.rows for s in optimizer.statistics.moments]
            assert counts == ([12] * 4 if step % 2 == 0 else [0] * 4)
            optimizer.step()
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("order", ["before forward", "before backward"])
def test_a_skipped_step_leaves_no_trace(order: str) -> None:
    runs = []
    for skips in (False, True):
        model = small_model()
        optimizer = adamw(model)
        for step in [0, 100, 101, 1, 2, 3, 102, 4] if skips else [0, 1, 2, 3, 4]:
            if order == "before forward":
                optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            if order == "before backward":
                optimizer.zero_grad()
            loss.backward()
            if step < 100:
                optimizer.step()
        runs.append(weights(model))
    assert same(*runs)


def test_grad_scaler_skips_an_overflow() -> None:
    runs = []
    for overflow in (False, True):
        model = small_model()
        optimizer = adamw(model, refresh_every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        for step in [0, 100, 1, 2] if overflow else [0, 1, 2]:
            optimizer.zero_grad()
            factor = float("inf") if step == 100 else 1.0
            scaler.scale(model(batch(step)).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(weights(model))
        assert optimizer.steps == 3
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_did_not_run_and_missing_gradients() -> None:
    model = small_model()
    model.register_module("spare", nn.Linear(3, 3))
    optimizer = adamw(model)
    spare = model.spare.weight.detach().clone()
    for step in range(5):
        optimizer.zero_grad()
        nn.Sequential(*list(model)[:5])(batch(step)).square().mean().backward()
        if step == 2:
            model[4].weight.grad = None
        optimizer.step()
    assert torch.equal(spare, model.spare.weight)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_frozen_layers_are_left_alone() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = DoPr(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), model)
    before = model[0].weight.clone()
    train(model, optimizer, range(2))
    assert torch.equal(before, model[0].weight)
    assert ("0.weight", (4, 2, 3, 3), "none", "frozen") in optimizer.roles()


def test_statistics_are_gathered_on_refresh_steps_only() -> None:
    model = small_model()
    optimizer = adamw(model, refresh_every=3)
    weight_of = []
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        weight_of.append(optimizer.diagnostics()["0"].ema_weight)
    assert weight_of[0] == weight_of[2] < weight_of[3] == weight_of[5] < weight_of[6]


def test_a_scheduler_of_the_wrapper_sets_the_wrapped_optimizer() -> None:
    optimizer = adamw(small_model())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    optimizer.step()
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] < 1e-2
    assert optimizer.state is optimizer.optimizer.state


def test_copies_of_the_optimizer_are_refused_and_of_the_model_are_inert() -> None:
    model = small_model()
    optimizer = adamw(model)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(optimizer)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        duplicate(batch(0)).sum().backward()
    assert all(s.unused.rows == 0 for s in optimizer.statistics.moments)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_hooks_do_not_leak(how: str) -> None:
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    assert all(layer._forward_pre_hooks for layer in (model[0], model[3], model[4]))
    alive = weakref.ref(optimizer)
    if how == "close":
        optimizer.close()
    else:
        del optimizer
        gc.collect()
        assert alive() is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model(batch(0)).sum().backward()


def test_keyword_inputs_count() -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    layer(input=torch.ones(4, 3)).sum().backward()
    assert optimizer.statistics.moments[0].unused.rows == 4
