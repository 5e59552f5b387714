"""Parameters and groups of Muon and its relatives: taken as torch takes them, or refused."""

import copy
import logging

import pytest
import torch
from labels import LABELS, build
from torch import nn

from flowdopr.optim import AdaMuon, Muon, RowNorm, Signum

KINDS = pytest.mark.parametrize("kind", [Muon, AdaMuon, RowNorm])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.Linear(8, 3))


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def by_method(optimizer, model):
    """Names of the parameters of each group, by the group's "gp"."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(g["gp"], [names[id(p)] for p in g["params"]]) for g in optimizer.param_groups]


@KINDS
def test_groups_that_say_use_muon_are_as_those_that_say_gp(kind):
    runs = []
    for says in (
        lambda muon: {"use_muon": muon},
        lambda muon: {"gp": kind.gp if muon else "adamw"},
    ):
        model = network()
        rest = [model[0].weight, model[2].weight, model[1].bias, model[2].bias]
        groups = [{"params": [model[1].weight], "lr": 0.02, **says(True)}]
        groups += [{"params": rest, "lr": 3e-4, **says(False)}]
        optimizer = kind(groups)
        assert [gp for gp, _ in by_method(optimizer, model)] == [kind.gp, "adamw"]
        runs.append(train(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@KINDS
def test_named_parameters_are_those_without_names(kind):
    plain, named = network(), network()
    optimizer = kind(named.named_parameters(), 0.01)
    assert [(g["gp"], g["param_names"]) for g in optimizer.param_groups] == by_method(
        optimizer, named
    )
    ours, theirs = train(named, optimizer), train(plain, kind(plain.parameters(), 0.01))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@KINDS
@pytest.mark.parametrize(
    "params",
    [
        lambda m: m[1].weight,
        lambda m: [{"params": set(m.parameters())}],
        lambda m: [m[1].weight, 3.0],
        lambda m: [("a", m[1].weight), m[2].weight],
        lambda m: [{"params": [m[1].weight]}, {"params": [m[1].weight]}],
        lambda m: [],
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(kind, params):
    model = network()
    with pytest.raises((TypeError, ValueError)) as theirs:
        torch.optim.AdamW(params(model))
    with pytest.raises(theirs.type) as ours:
        kind(params(model))
    assert str(ours.value) == str(theirs.value)


@KINDS
def test_a_group_that_is_added_is_parted_as_the_first_one_was(kind):
    model = network()
    optimizer = kind(model[1].parameters(), 0.02, adamw_lr=0.003)
    model, optimizer = copy.deepcopy((model, optimizer))  # what a group needs is carried along
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.add_param_group({"params": model[0].parameters(), "gp": "adamw", "lr": 0.5})
    assert by_method(optimizer, model)[2:] == [
        (kind.gp, ["2.weight"]),
        ("adamw", ["2.bias"]),
        ("adamw", ["0.weight"]),
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.003, 0.02, 0.003, 0.5]
    before = model[2].bias.detach().clone()
    model[2](torch.ones(1, 8)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(before - model[2].bias, torch.full((3,), 0.003))


@KINDS
@pytest.mark.parametrize(
    "group",
    [
        lambda m, kind: {"params": m[2].parameters(), "gp": kind.gp},
        lambda m, kind: {"params": m[2].parameters(), "use_muon": True},
        lambda m, kind: {"params": m[2].parameters(), "gp": "sgd"},
        lambda m, kind: {"params": [m[2].weight, m[1].weight]},
        lambda m, kind: {"params": set(m[2].parameters())},
        lambda m, kind: {"params": m[2].weight, "fused_blocks": 2},
    ],
)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(kind, group):
    model = network()
    optimizer = kind(model[1].parameters())
    before = copy.deepcopy([{**g, "params": len(g["params"])} for g in optimizer.param_groups])
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(group(model, kind))
    assert [{**g, "params": len(g["params"])} for g in optimizer.param_groups] == before


@KINDS
@pytest.mark.parametrize(
    ("params", "warns"),
    [
        (lambda m, gp: m.parameters(), True),
        (lambda m, gp: [{"params": layer.parameters()} for layer in m], True),
        (lambda m, gp: m, False),
        (lambda m, gp: [m[1].weight], False),
        (lambda m, gp: [{"params": m[1:].parameters(), "gp": "adamw"}], False),
    ],
)
def test_routing_by_dimension_alone_is_warned_of_once(kind, params, warns, caplog):
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        kind(params(network(), kind.gp))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    assert all("cannot tell embeddings and output heads" in line for line in said)


@pytest.mark.parametrize("label", LABELS)
def test_sparse_embeddings_are_refused_by_name_where_the_method_cannot_use_them(label):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    if label.endswith("sgd"):
        before = model[0].weight.detach().clone()
        optimizer = build(model, label, 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
        moved = (model[0].weight != before).any(1)
        assert moved.tolist() == [row in (1, 2) for row in range(10)]
    else:
        with pytest.raises(ValueError, match=r"embedding '0' has sparse gradients, which .* sgd"):
            build(model, label, 0.1)
    model[0].requires_grad_(False)
    build(model, label, 0.1)


@pytest.mark.parametrize("kind", [Muon, AdaMuon, RowNorm, Signum])
def test_sparse_gradients_of_bare_parameters_are_refused_in_one_line(kind):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = kind([table.weight], 0.1)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False") as error:
        optimizer.step()
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("label", LABELS)
def test_empty_parameters_stay_and_do_no_harm(label):
    model = nn.ModuleList([nn.Linear(3, 0), nn.Linear(0, 3), nn.Linear(4, 3)])
    optimizer = build(model, label, 0.1)
    before = model[2].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (
            model[2](torch.ones(5, 4)) + model[1](model[0](torch.ones(5, 3)))
        ).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model[2].weight, before)
    assert all(p.isfinite().all() for p in model.parameters())
