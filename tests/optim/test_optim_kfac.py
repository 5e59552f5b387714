"""K-FAC where training is not plain: no factors, NaN, bfloat16, odd calls, copies of the model."""

import copy
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn

from flowdopr.optim.kfac import KFAC


class Bypassed(nn.Module):
    """Reads the weight of one layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def train(model: nn.Module, optimizer: KFAC, steps: range, batch: int = 8) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(step))
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_weight_read_past_its_module_has_sgd_with_momentum_and_is_named_once(caplog):
    model = Bypassed()
    optimizer = KFAC(model, 0.1, momentum=0.5, weight_decay=0.2)
    weight, velocity = model.read.weight.detach().clone(), torch.zeros(3, 4)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        grad = model.read.weight.grad
        assert grad is not None
        velocity = 0.5 * velocity + grad
        weight = (1 - 0.1 * 0.2) * weight - 0.1 * velocity
        torch.testing.assert_close(model.read.weight.detach(), weight)
    warnings = warnings_of(caplog)
    assert len(warnings) == 1
    assert warnings[0].startswith("layer read: has a gradient, but no refresh has seen")


def test_all_of_attention_is_left_to_adamw(caplog):
    model = nn.MultiheadAttention(4, 2)
    gates = nn.ModuleList([model, nn.Linear(4, 4)])
    optimizer = KFAC(gates, 0.1)
    by_kfac = [p for g in optimizer.param_groups if g["gp"] == "kfac" for p in g["params"]]
    assert [p is gates[1].weight for p in by_kfac] == [True]
    before = model.out_proj.weight.detach().clone()
    x = torch.randn(3, 2, 4)
    gates[1](model(x, x, x)[0]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.out_proj.weight, before)
    assert not caplog.records


def train_in(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten())
    model.append(nn.Linear(3, 2)).to(dtype)
    train(model, KFAC(model, 0.02, refresh_every=2), range(6))
    return model


def test_bfloat16_weights_take_nearly_the_steps_of_float64():
    start = nn.utils.parameters_to_vector(train_in(torch.float64).parameters())
    rough = nn.utils.parameters_to_vector(train_in(torch.bfloat16).parameters())
    torch.testing.assert_close(rough.double(), start, rtol=0.03, atol=0.03)


def transforms(optimizer: KFAC) -> list[torch.Tensor]:
    """The inverses of both factors of the only layer."""
    return [optimizer.transform_of(m) for m in optimizer.statistics.moments]


def test_factors_of_bfloat16_weights_stay_float32_and_resume_bitwise():
    torch.manual_seed(0)
    models = [nn.Linear(4, 3).bfloat16()]
    optimizers = [KFAC(models[0], 0.02, refresh_every=4)]
    train(models[0], optimizers[0], range(2))
    models.append(nn.Linear(4, 3).bfloat16())
    optimizers.append(KFAC(models[1], 0.02, refresh_every=4))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        assert {found.dtype for found in transforms(optimizer)} == {torch.float32}
        train(model, optimizer, range(2, 6))
    assert torch.equal(models[0].weight, models[1].weight)


def test_sums_are_float32_though_the_backward_runs_under_autocast():
    steps = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = KFAC(layer, 0.1)
        loss = layer(torch.randn(8, 4)).square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        optimizer.step()
        steps.append(transforms(optimizer)[0])
    assert torch.equal(*steps)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 3), (4,)), (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 5))],
)
def test_keywords_and_inputs_without_a_batch_axis_count_alike(layer, shape):
    weights = []
    x = torch.randn(shape)
    for call in (lambda m: m(x[None]), lambda m: m(x), lambda m: m(input=x)):
        model = copy.deepcopy(layer)
        optimizer = KFAC(model, 0.1)
        call(model).square().sum().backward()
        optimizer.step()
        assert all(found is not None for found in transforms(optimizer))
        weights.append(model.weight)
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["input", "gradient"])
def test_a_refresh_that_is_not_finite_keeps_the_old_factors(value, poisoned, caplog):
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, 0.1, refresh_every=1)
    train(model, optimizer, range(1))
    old = transforms(optimizer)[poisoned == "gradient"]
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    x = torch.ones(8, 4)
    x[0, 0] = value if poisoned == "input" else 1.0
    y = model(x)
    y.backward(torch.full_like(y, value if poisoned == "gradient" else 1.0))
    model.weight.grad = torch.zeros_like(model.weight)  # as clipping or a scaler may have it
    optimizer.step()
    torch.testing.assert_close(transforms(optimizer)[poisoned == "gradient"], old)
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)  # the momentum moves on
    optimizer.close()
    skipped = [w for w in warnings_of(caplog) if w.endswith("are not finite, refresh skipped")]
    assert len(skipped) == 1


def test_without_finite_factors_the_gradient_is_taken_as_it_is():
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, 0.1)
    before = model.weight.detach().clone()
    y = model(torch.full((2, 4), float("nan")))
    y.backward(torch.full_like(y, float("nan")))
    model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1)


class Overflowing(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


@pytest.mark.parametrize("overflow_at", [None, 4, 6])
def test_a_loss_scale_that_changes_leaves_the_steps_as_they_are(overflow_at):
    """The scale doubles every other step, and halves after an overflow, whose step is skipped."""
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)).double()
        optimizer = KFAC(model, 0.01, refresh_every=2)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0, growth_interval=2)
        for step in range(12):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).double()
            for overflows in [True, False] if scaled and step == overflow_at else [False]:
                optimizer.zero_grad()
                y = model(x)
                y = Overflowing.apply(y) if overflows else y
                scaler.scale((y - x.prod(1, keepdim=True)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
        runs.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        assert not scaled or scaler.get_scale() > 64
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def gathered(optimizer: KFAC) -> list[int]:
    """Rows of inputs and of output gradients since the last step."""
    return [m.unused.rows + m.used.rows for m in optimizer.statistics.moments]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_the_model_feeds_no_statistics(duplicate):
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, 0.1)
    copied = duplicate(model)
    copied(torch.randn(8, 4)).square().mean().backward()
    assert gathered(optimizer) == [0, 0]
    model(torch.randn(8, 4)).square().mean().backward()
    assert gathered(optimizer) == [8, 8]
    again = KFAC(copied, 0.1)
    train(copied, again, range(1))
    assert all(found is not None for found in transforms(again))


def test_the_optimizer_cannot_be_copied_or_pickled():
    optimizer = KFAC(nn.Linear(4, 3))
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="KFAC holds hooks on its model"):
            duplicate(optimizer)


def test_the_optimizer_is_freed_while_the_model_lives():
    model = nn.Linear(4, 3)
    optimizer = KFAC(model)
    train(model, optimizer, range(1))
    loss = model(torch.randn(8, 4)).square().mean()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    loss.backward()  # begun while it lived


def test_one_pattern_is_not_taken_for_its_letters_and_frozen_layers_are_left_out():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    model["frozen"] = nn.Conv2d(4, 4, 1, groups=2).requires_grad_(False)
    optimizer = KFAC(model, 0.1, adamw_for="head")
    taken = [g["params"] for g in optimizer.param_groups if g["gp"] == "kfac"]
    assert [p is model["body"].weight for params in taken for p in params] == [True]


def test_a_damping_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="damping is None, it must be one number above 0"):
        KFAC(nn.Linear(4, 4), 0.1, damping=None)  # pyright: ignore
