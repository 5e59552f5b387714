"""Optimizers by name."""

import pytest
import torch
from torch import nn

from flowdopr.optim import DoPr, LayerRule, Muon, build_optimizer


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("muon", Muon)],
)
def test_builds_what_its_name_says(name, kind):
    assert isinstance(build_optimizer(network(), name, 0.1), kind)
    wrapped = build_optimizer(network(), name, 0.1, dopr={"refresh_every": 3})
    assert isinstance(wrapped, DoPr)
    assert isinstance(wrapped.optimizer, kind)
    assert wrapped.refresh_every == 3


def test_options_reach_the_optimizer():
    options = {"weight_decay": 0.3, "betas": (0.5, 0.6)}
    optimizer = build_optimizer(network(), "adamw", 0.1, **options)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.5, 0.6) and g["eps"] == 1e-8 for g in optimizer.param_groups)


@pytest.mark.parametrize(
    "options", [{"max_rows": "all"}, {"rules": [LayerRule("", max_rows="all")]}]
)
def test_all_rows_can_be_asked_for_by_name(options):
    model = network()
    optimizer = build_optimizer(model, "sgd", 0.1, dopr=options)
    model(torch.zeros(5000, 3)).sum().backward()
    assert [s.unused.rows for s in optimizer.statistics.moments] == [5000, 5000]


def test_rules_may_be_dicts():
    optimizer = build_optimizer(
        network(),
        "sgd",
        0.1,
        dopr={"rules": [{"pattern": "^0$", "mode": "none"}, LayerRule("2")]},
    )
    modes = {name: mode for name, _, mode, _ in optimizer.roles()}
    assert modes["0.weight"] == "none"
    assert modes["2.weight"] == "full"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "did you mean 'adamw'"),
        ("xyz", {}, "one of sgd, adamw"),
        ("adamw", {"momentum": 0.9}, "'adamw' does not use 'momentum'.*betas, eps, weight_decay"),
        ("adamw", {"damping": 0.1}, "'adamw' does not use 'damping'"),
        ("sgd", {"betas": (0.9, 0.99)}, "'sgd' does not use 'betas'"),
        ("sgd", {"dopr": {"betas": (0.9, 0.99)}}, "DoPr does not use 'betas': it uses conv_mode"),
        ("dopr-sgd", {}, "'dopr-sgd' is not known: one of sgd, adamw"),
        ("adamw", {"dopr": {"damping": -1.0}}, "damping"),
        ("kfac", {"dopr": {}}, "is a KFAC, which preconditions by layer inputs"),
        ("kfac", {"damping": (1.0, 0.1, 100)}, "one number"),
    ],
)
def test_refuses_what_it_does_not_know(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(network(), name, 0.1, **options)
