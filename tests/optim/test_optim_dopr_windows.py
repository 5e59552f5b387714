"""What a window counts when forwards are not plain: empty batches, checkpointing, frozen layers."""

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
