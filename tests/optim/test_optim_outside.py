"""Optimizers of other packages: found, checked and built by path, and schedule-free trajectories
against the paper's formulas."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from flowdopr.optim import build_optimizer

SCHEDULE_FREE = "schedulefree.AdamWScheduleFree"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


def build(class_path: str, model: nn.Module | None = None, **options: Any) -> torch.optim.Optimizer:
    model = model or network()
    return build_optimizer(model, "outside", 0.01, class_path=class_path, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 1, 4, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("class_path", "options", "message"),
    [
        ("not_there.Adam", {}, "not_there cannot be imported .*: pip install not_there"),
        ("schedulefree.AdamWScheduleFre", {}, r"no optimizer class; did you mean 'AdamWScheduleFr"),
        ("schedulefree.x.y", {}, "no optimizer class; give a subclass of torch's Optimizer"),
        ("heavyball.PSGDKron", {}, r"resumed run would differ: .* such as pytorch_optimizer.Kron"),
        ("torch.optim.lr_scheduler.StepLR", {}, r"no optimizer class; give a subclass"),
        ("pytorch_optimizer.SAM", {}, "SAM: the class takes no learning rate lr: choose another"),
        ("pytorch_optimizer.Lookahead", {}, "takes 'optimizer' and not params: choose another"),
        ("pytorch_optimizer.Ranger21", {}, "needs 'num_iterations': give it in options if it is"),
        ("pytorch_optimizer.Muon", {}, r"refuses .* or this model: ValueError: `use_muon` must be"),
        (SCHEDULE_FREE, {"options": {"warmup": 3}}, r"options.warmup: schedulefree.* it has betas"),
        ("pytorch_optimizer.Lion", {"options": {"x": 3}}, r"options.x: pytorch_optimizer.Lion has"),
        ("torch.optim.Adam", {"options": {"lr": 3}}, r"options.lr: comes from elsewhere; remove"),
        ("torch.optim.Adam", {"options": {"betas": [2, 3]}}, r"refuses its options .* 0: 2"),
        ("torch.optim.Rprop", {"weight_decay": 0.1}, r"weight_decay 0.1: torch.optim.Rprop has no"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_in_one_line(class_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(class_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("class_path", "options", "message"),
    [
        ("torch.optim.LBFGS", {}, "a step of it fails: TypeError: .* required .* 'closure'"),
        ("torch.optim.SparseAdam", {}, "RuntimeError: SparseAdam does not support dense gradients"),
        (
            SCHEDULE_FREE,
            {"warmup_steps": "ten"},
            "a step of it fails: TypeError: .* correct option",
        ),
        ("pytorch_optimizer.AdaShift", {}, "its state holds a deque, which cannot be read from a"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line_at_the_first_step(class_path, options, message):
    model = network()
    with pytest.raises(ValueError, match=message) as caught:
        step(model, build(class_path, model, options=options))
    assert "\n" not in str(caught.value)


def test_a_sandwich_refuses_an_optimizer_that_averages_itself():
    with pytest.raises(ValueError, match="AdamWScheduleFree reads them: use form 'inverse'"):
        build(SCHEDULE_FREE, dopr={"form": "sandwich"})


def test_weight_decay_is_for_matrices_and_convolutions_and_lists_become_tuples():
    model = network()
    options = {"betas": [0.8, 0.9]}
    optimizer = build("torch.optim.AdamW", model, weight_decay=0.1, options=options)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[p] for p in model.parameters()] == [0.1, 0.0, 0.1, 0.0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


class Rebinding(torch.optim.SGD):
    """A step that gives the weights other memory, as heavyball's may, and stores a pickle."""

    def step(self, closure=None):  # pyright: ignore
        super().step()
        for p in self.param_groups[0]["params"]:
            p.data = p.data.clone()

    def state_dict(self):
        return {**super().state_dict(), "more": {"schedule": pickle.dumps(1)}}

    def load_state_dict(self, state_dict):
        assert state_dict["more"] == {}
        super().load_state_dict(state_dict)


def test_weights_keep_their_memory_and_checkpoints_hold_no_pickle(monkeypatch):
    monkeypatch.setattr(torch.optim, "Rebinding", Rebinding, raising=False)
    model = network()
    optimizer = build("torch.optim.Rebinding", model)
    places, before = [p.data_ptr() for p in model.parameters()], model[2].weight.detach().clone()
    step(model, optimizer)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert not torch.equal(model[2].weight, before)
    saved = optimizer.state_dict()
    assert saved["more"] == {}
    optimizer.load_state_dict({**saved, "more": {"schedule": pickle.dumps(1)}})


class Failing(torch.optim.SGD):
    message = ""

    def step(self, closure=None):  # pyright: ignore
        raise RuntimeError(self.message)


def test_too_little_memory_is_not_blamed_on_the_class(monkeypatch):
    monkeypatch.setattr(torch.optim, "Failing", Failing, raising=False)
    model = network()
    optimizer = build("torch.optim.Failing", model)
    monkeypatch.setattr(Failing, "message", "CUDA out of memory. Tried to allocate")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        step(model, optimizer)
    monkeypatch.setattr(Failing, "message", "unsupported memory format option Preserve")
    with pytest.raises(ValueError, match="a step of it fails: RuntimeError: unsupported memory"):
        step(model, optimizer)


def schedule_free(gradient_of, y, steps, lr, warmup, decay, betas=(0.9, 0.999), eps=1e-8):
    """x, y and z of schedule-free AdamW (arXiv 2405.15682, algorithm 1), its y beginning at x."""
    x, z, v, weights = y.clone(), y.clone(), torch.zeros_like(y), 0.0
    for t in range(1, steps + 1):
        g = gradient_of(t, y)
        rate = lr * min(1.0, t / warmup)
        v = betas[1] * v + (1 - betas[1]) * g**2
        z = z - rate * (g / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * y)
        weights += rate**2
        c = rate**2 / weights
        x = (1 - c) * x + c * z
        y = (1 - betas[0]) * z + betas[0] * x
    return x, y


@pytest.mark.parametrize("damping", [None, 0.1])
def test_schedule_free_follows_the_papers_recurrence(damping):
    torch.manual_seed(0)
    scales = torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    inputs = torch.randn(30, 12, 4, dtype=torch.float64) * scales
    targets = torch.randn(30, 12, 3, dtype=torch.float64)
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    start = layer.weight.detach().clone()

    def gradient_of(t, y):
        z = inputs[t - 1]
        g = 2 * (z @ y.T - targets[t - 1]).T @ z / 36
        if damping is None:
            return g
        sigma = z.T @ z / 12
        identity = torch.eye(4, dtype=torch.float64)
        s = sigma / (sigma.trace() / 4) + damping * identity
        return (1 + damping) * g @ torch.linalg.inv(s)

    exact = {"damping": damping, "cov_decay": 0.0, "refresh_every": 1, "max_rows": "all"}
    optimizer = build(
        SCHEDULE_FREE,
        layer,
        weight_decay=0.1,
        options={"warmup_steps": 5},
        dopr=None if damping is None else exact,
    )
    for z, target in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        (layer(z) - target).square().mean().backward()
        optimizer.step()
    x, y = schedule_free(gradient_of, start, 30, lr=0.01, warmup=5, decay=0.1)
    torch.testing.assert_close(layer.weight.detach(), y, rtol=1e-9, atol=1e-11)
    optimizer.eval()  # pyright: ignore
    torch.testing.assert_close(layer.weight.detach(), x, rtol=1e-9, atol=1e-11)
    optimizer.train()  # pyright: ignore
    torch.testing.assert_close(layer.weight.detach(), y, rtol=1e-9, atol=1e-11)
