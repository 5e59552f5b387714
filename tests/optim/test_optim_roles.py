"""Roles, groups and the table of parameters."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from flowdopr.models import add_pc_layers, pc_layers
from flowdopr.optim import DoPr
from flowdopr.optim.roles import (
    check_claimed,
    format_roles,
    parameter_groups,
    parameter_roles,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(4, 6))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.embed = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.norm = nn.GroupNorm(2, 6)
        self.modulation = nn.Linear(6, 12)
        self.modulation.fused_blocks = 2
        self.conv = nn.Conv2d(6, 9, 3, groups=3, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2)


EXPECTED = {
    "positions": ("table", 1),
    "temperature": ("vector", 1),
    "embed.weight": ("embedding", 1),
    "attention.in_proj_weight": ("matrix", 3),
    "attention.in_proj_bias": ("bias", 1),
    "attention.out_proj.weight": ("matrix", 1),
    "attention.out_proj.bias": ("bias", 1),
    "norm.weight": ("norm", 1),
    "norm.bias": ("norm", 1),
    "modulation.weight": ("matrix", 2),
    "modulation.bias": ("bias", 1),
    "conv.weight": ("conv", 3),
    "up.weight": ("conv", 1),
    "up.bias": ("bias", 1),
}


def test_roles_and_blocks():
    model = Model()
    roles = parameter_roles(model)
    assert {r.name: (r.kind, r.blocks) for r in roles} == EXPECTED
    assert all(r.parameter is model.get_parameter(r.name) for r in roles)


def test_a_weight_tied_to_an_embedding_is_an_embedding():
    model = nn.ModuleDict({"head": nn.Linear(6, 5, bias=False), "embed": nn.Embedding(5, 6)})
    model["embed"].weight = model["head"].weight
    assert [(r.name, r.kind) for r in parameter_roles(model)] == [("head.weight", "embedding")]


def test_blocks_must_divide_the_rows():
    layer = nn.Linear(3, 10)
    layer.fused_blocks = 3
    with pytest.raises(ValueError, match=r"'0\.weight' has 10 rows"):
        parameter_roles(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"adamw_for: pattern '\(': not a regular expression \(unclosed group\); corr"),
        ("(?!x)", "look-around, including look-ahead and look-behind, is not supported\\); cor"),
        ("((a{1000}){1000}){1000}", "Compiled regex exceeds size limit of "),
        ("nowhere", "adamw_for: pattern 'nowhere' matches no parameter"),
        ("(.*)*!", "matches no parameter"),  # Python's `re` would try for years
    ],
)
def test_a_pattern_is_found_in_linear_time_or_refused(pattern, message):
    model = nn.Module()
    model.add_module("a" * 200, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, "muon", weight_decay=0.0, adamw_for=[pattern])
    rule = {"pattern": pattern, "mode": "none"}
    with pytest.raises(ValueError, match="layer rule"):
        DoPr(torch.optim.SGD(model.parameters()), model, rules=[rule])


def test_one_pattern_is_not_the_list_of_its_letters():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    one, listed = (
        parameter_groups(model, "muon", weight_decay=0.0, adamw_for=given)
        for given in ("head", ["head"])
    )
    assert [group["gp"] for group in one] == [group["gp"] for group in listed] == ["adamw", "muon"]
    assert all(map(torch.equal, one[0]["params"], listed[0]["params"]))
    assert [*pc_layers(add_pc_layers(model, layers="head"))] == ["head"]


def test_groups_claim_each_parameter_once_and_decay_matrices_only():
    model = Model()
    groups = parameter_groups(model, "muon", weight_decay=0.1, adamw_for=["attention.out_proj"])
    found = {id(p): g for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(EXPECTED)
    for role in parameter_roles(model):
        group = found[id(role.parameter)]
        by_muon = role.kind in ("matrix", "conv") and "out_proj" not in role.name
        assert group["gp"] == ("muon" if by_muon else "adamw")
        assert group["weight_decay"] == (0.1 if role.kind in ("matrix", "conv") else 0.0)
        assert group["fused_blocks"] == (role.blocks if by_muon else 1)


def test_unclaimed_and_doubly_claimed_parameters_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    with pytest.raises(ValueError, match=r"'1\.weight' is in no group"):
        check_claimed(model, optimizer)
    model[1].requires_grad_(False)
    check_claimed(model, optimizer)
    optimizer.param_groups.append(dict(optimizer.param_groups[0]))
    with pytest.raises(ValueError, match=r"'0\.weight' is in 2 groups"):
        check_claimed(model, optimizer)


def test_table_lists_every_parameter():
    model = Model()
    model.norm.requires_grad_(False)
    groups = parameter_groups(model, "muon", weight_decay=0.1, adamw_for=())
    lines = format_roles(model, torch.optim.SGD(groups, 0.1)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(EXPECTED)
    cells = {line.split()[0]: [c for c in line.split("  ") if c] for line in lines}
    assert [c.strip() for c in cells["attention.in_proj_weight"][1:]] == [
        "18 x 6",
        "matrix",
        "none",
        "muon in 3 blocks",
        "0.1",
    ]
    assert cells["norm.weight"][-2:] == ["frozen", "-"]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.ReLU(), "sgd", weight_decay=0.0)


PARAMETRIZED = {
    "spectral_norm": (parametrizations.spectral_norm, "original"),
    "orthogonal": (parametrizations.orthogonal, "original"),
    "weight_norm": (parametrizations.weight_norm, "original1"),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.parametrize("kind", ["matrix", "conv"])
def test_a_parametrized_weight_has_the_role_of_its_layer(name, kind):
    layer = nn.Linear(6, 6) if kind == "matrix" else nn.Conv2d(4, 6, 3, groups=2)
    layer.fused_blocks = 3
    parametrize_layer, leaf = PARAMETRIZED[name]
    model = nn.Sequential(parametrize_layer(layer), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn((4, 6) if kind == "matrix" else (4, 4, 5, 5)))
    roles = {role.name: role for role in parameter_roles(model)}
    inner = roles[f"0.parametrizations.weight.{leaf}"]
    assert (inner.kind, inner.blocks) == (kind, 3 if kind == "matrix" else 6)
    others = [r for n, r in roles.items() if n.startswith("0.param") and r is not inner]
    assert all(role.kind in ("vector", "table") for role in others)
    groups = parameter_groups(model, "muon", weight_decay=0.1, adamw_for=[])
    by_muon = [p for group in groups if group["gp"] == "muon" for p in group["params"]]
    assert any(p is inner.parameter for p in by_muon)


def test_dopr_lists_a_parametrized_weight_with_the_reason_why_it_is_left_alone():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    optimizer = DoPr(torch.optim.SGD(model.parameters(), lr=0.1), model)
    reasons = {name: (mode, reason) for name, _, mode, reason in optimizer.roles()}
    mode, reason = reasons["0.parametrizations.weight.original1"]
    assert mode == "none"
    assert "parametrized" in reason
    assert reasons["1.weight"][0] == "full"


def test_naming_roles_leaves_the_buffers_and_modes_of_parametrizations_alone():
    model = parametrizations.spectral_norm(nn.Linear(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameter_roles(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
