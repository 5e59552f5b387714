"""What goes wrong and how DoPr says so."""

import logging
from collections.abc import Callable

import pytest
import torch
from layer_cases import adamw, small_model
from torch import nn

from flowdopr.optim.dopr import DoPr
from flowdopr.optim.plan import LayerRule

BAD: list[tuple[str, Callable[[nn.Module], DoPr]]] = [
    ("damping is -1", lambda m: adamw(m, damping=-1)),
    ("cov_decay is 1", lambda m: adamw(m, cov_decay=1.0)),
    ("refresh_every is 0", lambda m: adamw(m, refresh_every=0)),
    ("max_rows is 0", lambda m: adamw(m, max_rows=0)),
    ("max_rows is many, it must be 1 or more, or 'all'", lambda m: adamw(m, max_rows="many")),
    ("max_rows is -1", lambda m: adamw(m, rules=[LayerRule("3", max_rows=-1)])),
    ("decides no layer", lambda m: adamw(m, rules=[LayerRule("attention")])),
    ("not in the optimizer", lambda m: DoPr(torch.optim.SGD(m[0].parameters()), m)),
    ("no trainable layer", lambda m: adamw(m, rules=[LayerRule("", mode="none")])),
]


@pytest.mark.parametrize(("message", "build"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_one_clear_line(message: str, build: Callable[[nn.Module], DoPr]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(small_model())
    assert "\n" not in str(error.value)


def test_nonfinite_activations_are_skipped_counted_and_end_in_a_stop(caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, refresh_every=1, max_nonfinite=3)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for poison in (0.0, float("nan"), float("inf")):
            layer(torch.randn(4, 3) + poison).square().sum().backward()
            layer.zero_grad()
            optimizer.step()
        assert optimizer.preconditioner.skipped_refreshes == {"": 2}
        assert "not finite" in caplog.text
        assert torch.isfinite(optimizer.statistics.all[0].transform).all()
        layer(torch.full((4, 3), float("nan"))).sum().backward()
        with pytest.raises(FloatingPointError, match="3 refreshes in a row"):
            optimizer.step()


def test_a_failing_factorisation_raises_the_damping_and_says_so(caplog) -> None:
    layer = nn.Linear(40, 2)
    optimizer = adamw(layer, damping=0.0)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        layer(torch.randn(3, 40)).square().sum().backward()
        optimizer.step()
    assert optimizer.preconditioner.raised_damping[""] > 0
    assert "damping raised" in caplog.text
    assert torch.isfinite(layer.weight).all()


def test_a_weight_used_without_its_module_is_reported_once(caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for _ in range(3):
            nn.functional.linear(torch.ones(4, 3), layer.weight).sum().backward()
            optimizer.step()
    assert caplog.text.count("no refresh has seen finite inputs") == 1


def test_rules_may_be_mappings() -> None:
    model = small_model()
    optimizer = adamw(model, rules=[{"pattern": "^4$", "mode": "diagonal"}])
    assert optimizer.roles()[4][2] == "diagonal"


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_programs_matmul_precision_is_given_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert after == precision
