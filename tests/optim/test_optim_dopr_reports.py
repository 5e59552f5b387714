"""What a refresh finds, told at the next one: skips, and dampings that were too small."""

import logging

import pytest
import reference
import torch
from layer_cases import adamw
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr


def test_nonfinite_activations_are_skipped_and_counted(caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, refresh_every=1)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for poison in (0.0, float("nan"), float("inf"), float("nan")):
            layer(torch.randn(4, 3) + poison).square().sum().backward()
            layer.zero_grad()
            optimizer.step()
        numbers = optimizer.diagnostics()[""]
        assert (numbers.skipped, numbers.refreshes) == (3, 1)
        assert caplog.text.count("not finite, refresh skipped") == 2  # the third is told next
        assert torch.isfinite(optimizer.transforms[0]).all()
        layer(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        assert caplog.text.count("not finite, refresh skipped") == 3


@pytest.mark.parametrize("last_words", [DoPr.close, DoPr.state_dict])
def test_what_the_last_refresh_has_to_report_is_not_lost(last_words, caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    layer(torch.full((4, 3), torch.nan)).sum().backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        last_words(optimizer)
        last_words(optimizer)
    assert caplog.text.count("not finite, refresh skipped") == 1


@pytest.mark.parametrize("poison", ["first", "later"])
def test_a_layer_that_saw_no_finite_inputs_takes_the_bare_step(poison: str) -> None:
    """Before the first good refresh AP is the identity; after it T stays what it was."""
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, refresh_every=1)
    if poison == "later":
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    kept = optimizer.transforms[0] if optimizer.transforms else None
    optimizer.zero_grad()
    layer(torch.full((4, 3), torch.inf)).sum().backward()
    grad = torch.randn(2, 3)
    layer.weight.grad, layer.bias.grad = grad.clone(), torch.zeros(2)
    optimizer.step()
    expected = grad if kept is None else grad @ kept[0, 0]
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("form", ["inverse", "sandwich"])
def test_a_failing_factorisation_takes_the_diagonal_then_a_raised_damping(form, caplog) -> None:
    """Three rows in 40 coordinates, and no damping: Sigma is singular."""
    torch.manual_seed(0)
    layer, z = nn.Linear(40, 2, bias=False), torch.randn(3, 40)
    optimizer = adamw(layer, damping=0.0, form=form, cov_decay=0.0, refresh_every=1)
    sigma = reference.second_moment(z)
    mean = sigma.diagonal().mean()
    seen = []
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for _ in range(8):
            optimizer.zero_grad()
            layer(z).square().sum().backward()
            optimizer.step()
            seen.append((optimizer.diagnostics()[""].damping, transform_of(optimizer)))
    (first, diagonal), (last, full) = seen[0], seen[-1]
    root = 0.5 if form == "sandwich" else 1.0
    torch.testing.assert_close(diagonal, (sigma.diagonal() / mean).pow(-root).diag().float())
    assert first == 0 < last < 1e-3
    damped = (sigma / mean + last * torch.eye(40)).double()
    inverse = (full @ full.mT if form == "sandwich" else full).double()
    torch.testing.assert_close(inverse @ damped, torch.eye(40).double(), rtol=0, atol=0.2)
    assert "damping raised to 1.2e-06" in caplog.text
    assert torch.isfinite(layer.weight).all()


def transform_of(optimizer: DoPr) -> Tensor:
    """T of the first layer, (s, s)."""
    return optimizer.transforms[0][0, 0].clone()
