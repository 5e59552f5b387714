"""What every optimizer that can be built must do, one test a promise."""

import io

import pytest
import torch
from labels import LABELS, build
from layer_cases import FORMS
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.checkpoint import checkpoint

STEPS = 7
LR = {"sgd": 0.05, "kfac": 0.01}
EVERY_FORM = pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in LABELS
        for form in (FORMS if name.startswith("dopr-") else ["inverse"])
        if form != "sandwich" or "ScheduleFree" not in name  # which DoPr refuses
    ],
)


class Network(nn.Module):
    """One layer of every kind that counts, a fused one, and one that runs only when asked."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.fused = nn.Linear(6, 12)
        self.fused.fused_blocks = 2
        self.head = nn.Linear(12, 3)
        self.spare = nn.Linear(6, 6)

    def forward(self, images, labels, use_spare=False, checkpointing=None):
        features = self.conv(images).mean(dim=(2, 3)) + self.embed(labels)
        if use_spare:
            features = features + self.spare(features)
        features = self.norm(features)
        if checkpointing is None:
            return self.block(features)
        return checkpoint(self.block, features, use_reentrant=checkpointing == "reentrant")

    def block(self, features):
        return self.head(torch.tanh(self.fused(features)))


def make(name, **options):
    """Those with statistics of layer inputs refresh them every other step."""
    torch.manual_seed(0)
    network = Network()
    if name == "kfac" or name.startswith("dopr-"):
        options = {"refresh_every": 2, **options}
    return network, build(network, name, LR.get(name.removeprefix("dopr-"), 0.005), **options)


def loss_at(network, step, **how):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 4, 4, generator=generator)
    labels = torch.randint(4, (8,), generator=generator)
    target = images.mean(dim=(2, 3)) + labels[:, None] / 4
    return (network(images, labels, **how) - target).square().mean()


def train(network, optimizer, steps, **how):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_at(network, step, **how)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same(ours, theirs):
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def straight(name, form="inverse", **how):
    network, optimizer = make(name, **FORMS[form])
    train(network, optimizer, range(STEPS), **how)
    return weights(network)


@pytest.fixture(params=LABELS)
def name(request):
    return request.param


def test_trains(name):
    network, optimizer = make(name)
    losses = train(network, optimizer, range(60))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@EVERY_FORM
def test_is_deterministic(name, form):
    assert_same(straight(name, form), straight(name, form))


@EVERY_FORM
@pytest.mark.parametrize("stop", [3, 4])
def test_resumes_bitwise(name, form, stop):
    """Between two refreshes, and just before one."""
    network, optimizer = make(name, **FORMS[form])
    train(network, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    again, optimizer = make(name, **FORMS[form])
    again.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, range(stop, STEPS))
    assert_same(weights(again), straight(name, form))


def test_a_parameter_without_gradient_stays(name):
    network, optimizer = make(name, weight_decay=0.1)
    train(network, optimizer, range(2))
    before = weights(network)
    optimizer.zero_grad()
    loss_at(network, 2).backward()
    network.head.weight.grad = None
    optimizer.step()
    moved = [n for n, p in network.named_parameters() if not torch.equal(p, before[n])]
    assert "head.weight" not in moved
    assert "conv.weight" in moved


def test_a_layer_that_did_not_run_stays_and_can_join_later(name):
    network, optimizer = make(name)
    before = weights(network)
    train(network, optimizer, range(2))
    assert torch.equal(network.spare.weight, before["spare.weight"])
    train(network, optimizer, range(2, 5), use_spare=True)
    assert not torch.equal(network.spare.weight, before["spare.weight"])
    assert all(p.isfinite().all() for p in network.parameters())


def test_obeys_a_scheduler(name):
    network, optimizer = make(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
    for step in range(5):
        before = weights(network)
        train(network, optimizer, [step], use_spare=True)
        still = [n for n, p in network.named_parameters() if torch.equal(p, before[n])]
        # SOAP's first step only gathers; a schedule-free y moves towards z at any rate.
        if step > 0 and not ("ScheduleFree" in name and step >= 3):
            assert (len(still) == len(before)) == (step >= 3)
        scheduler.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name, set_to_none):
    network, optimizer = make(name)
    loss_at(network, 0, use_spare=True).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in network.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


def test_each_group_has_its_own_learning_rate(name):
    network, optimizer = make(name, weight_decay=0.1)
    assert len(optimizer.param_groups) > 1
    frozen = optimizer.param_groups[0]
    frozen["lr"] = 0.0
    held = {id(p) for p in frozen["params"]}
    before = weights(network)
    train(network, optimizer, range(3), use_spare=True)
    for key, p in network.named_parameters():
        assert torch.equal(p, before[key]) == (id(p) in held)


def test_a_step_inside_autocast_is_the_one_outside(name):
    network, optimizer = make(name)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_at(network, step).backward()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
    assert_same(weights(network), straight(name))


HOOKS = ("step", "state_dict", "load_state_dict")


def test_hooks_of_every_kind_run_once_on_it_and_on_the_one_inside(name):
    network, optimizer = make(name)
    seen, every = [], {id(o): o for o in (optimizer, getattr(optimizer, "optimizer", optimizer))}

    def noting(kind):
        return lambda which, *_: seen.append((kind, type(which).__name__))

    kinds = [f"{kind}_{when}" for kind in HOOKS for when in ("pre", "post")]
    for each in every.values():
        for kind in kinds:
            getattr(each, f"register_{kind}_hook")(noting(kind))
    everywhere = (
        register_optimizer_step_pre_hook(noting("global pre")),
        register_optimizer_step_post_hook(noting("global post")),
    )
    train(network, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in everywhere:
        handle.remove()
    names = [type(each).__name__ for each in every.values()]
    wanted = [(kind, who) for kind in (*kinds, "global pre", "global post") for who in names]
    assert sorted(seen) == sorted(wanted)


def test_hooks_may_change_the_state_that_is_saved_and_loaded(name):
    network, optimizer = make(name)
    train(network, optimizer, range(2))
    optimizer.register_state_dict_post_hook(lambda _, state: {"more": 1, **state})
    saved = optimizer.state_dict()
    assert saved["more"] == 1

    def with_another_rate(_, state):
        groups = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(with_another_rate)
    optimizer.load_state_dict(saved)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_calls_a_closure_once_and_returns_its_loss(name):
    network, optimizer = make(name)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_at(network, 0)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1


def test_evaluation_leaves_no_trace(name):
    network, optimizer = make(name)
    for step in range(STEPS):
        train(network, optimizer, [step])
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss_at(network, 100 + step)
        network.eval()
        loss_at(network, 200 + step)
        network.train()
    assert_same(weights(network), straight(name))


@EVERY_FORM
@pytest.mark.parametrize("kind", ["reentrant", "selective"])
def test_activation_checkpointing_changes_nothing(name, form, kind):
    assert_same(straight(name, form, checkpointing=kind), straight(name, form))
