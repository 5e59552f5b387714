"""What a window counts when forwards are not plain: empty batches, checkpointing, odd biases."""

import pytest
import torch
from layer_cases import CASES, IDS, LayerCase, adamw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdopr.optim import DoPr
from flowdopr.optim.dopr import LayerRule
from flowdopr.optim.kfac import KFAC


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_window_without_rows_is_no_refresh(case: LayerCase) -> None:
    """An empty batch first, in the middle, or as one of two micro-batches changes nothing."""
    weights = []
    for empty in (False, True):
        module, x = case.make()
        gp = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer = DoPr(gp, module, refresh_every=1)
        if empty:
            optimizer.zero_grad()
            module(x[:0]).sum().backward()
            optimizer.step()
        for step in range(3):
            optimizer.zero_grad()
            module(x).sin().mean().backward()
            if empty and step == 1:
                module(x[:0]).sum().backward()
            optimizer.step()
        weights.append(module.weight.detach())
    torch.testing.assert_close(*weights)


def rows_counted(run) -> int:
    """Rows that one window counts; `run(layer, x)` gives what to differentiate."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    optimizer = adamw(layer)
    run(layer, torch.randn(4, 3, requires_grad=True)).square().mean().backward()
    optimizer.statistics._note_backward()
    return optimizer.statistics.moments[0].used.rows


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_and_plain_calls_of_one_layer_all_count(reentrant: bool) -> None:
    def again(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    assert rows_counted(lambda layer, x: layer(x)) == 4
    assert rows_counted(again) == 4
    assert rows_counted(lambda layer, x: again(layer, again(layer, layer(x)))) == 12
    assert rows_counted(lambda layer, x: layer(again(layer, x)) + layer(x)) == 12


@pytest.mark.parametrize("frozen", [True, False])
def test_the_bias_coordinate_is_left_out_where_the_bias_does_not_train(frozen: bool) -> None:
    layer = nn.Linear(3, 2, bias=frozen)
    if frozen:
        layer.bias.requires_grad_(False)
    weight = [p for p in layer.parameters() if p.requires_grad]
    optimizer = DoPr(torch.optim.SGD(weight, lr=0.1), layer, bias=True)
    assert optimizer.roles()[0][2] == "full"


def test_tied_weights_with_biases_of_their_own_leave_these_to_the_gp() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    optimizer = DoPr(torch.optim.SGD(model.parameters(), lr=1.0), model, bias=True)
    x = torch.randn(8, 3)
    (0 * first(x).sum() + second(x).square().mean()).backward()
    optimizer.step()
    assert {name: mode for name, _, mode, _ in optimizer.roles()} == {
        "0.weight": "full",
        "0.bias": "none",
        "2.bias": "none",
    }
    assert torch.equal(first.bias.grad, torch.zeros(3))
    assert second.bias.grad.abs().min() > 0


def test_a_rule_for_the_second_of_two_tied_layers_decides_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    gp = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="layer rule '1' decides no layer"):
        DoPr(gp, model, rules=[LayerRule("1", "diagonal")])


@pytest.mark.parametrize("build", [adamw, KFAC], ids=["dopr", "kfac"])
def test_a_forward_while_the_layer_is_frozen_does_not_count(build) -> None:
    """As a discriminator's is, while its generator trains."""
    weights = []
    for probed in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = build(layer)
        if probed:
            layer.requires_grad_(False)
            layer(10 * torch.randn(100, 3, requires_grad=True)).square().mean().backward()
            layer.requires_grad_(True)
        torch.manual_seed(1)
        layer(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)
