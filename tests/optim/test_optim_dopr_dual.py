"""Mode "dual": the same M as a full Sigma without memory, from the rows themselves."""

import copy
import logging

import pytest
import reference
import torch
from layer_cases import CASES, IDS, LayerCase, adamw, batch, small_model
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr
from flowdopr.optim.plan import LayerRule

WITHOUT_EMBEDDING = [case for case in CASES if case.name != "embedding"]


def trained(module: nn.Module, inputs: list[Tensor], mode: str, **settings: object) -> list[Tensor]:
    """All parameters after a step of DoPr-SGD on each of the inputs."""
    gp = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    exact = {"max_rows": None, "cov_decay": 0.0, "refresh_every": 2, **settings}
    optimizer = DoPr(gp, module, rules=[LayerRule("", mode)], **exact)
    for x in inputs:
        optimizer.zero_grad()
        for part in x.chunk(2):
            module(part).sin().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("case", WITHOUT_EMBEDDING, ids=IDS[: len(WITHOUT_EMBEDDING)])
@pytest.mark.parametrize(
    "settings", [{"bias": True, "anneal": (1, 5)}, {"unit_scale": False, "damping": (1.0, 0.1, 3)}]
)
@pytest.mark.parametrize("few", [True, False])
def test_dual_is_full_without_memory(case: LayerCase, settings: dict, few: bool) -> None:
    weights = []
    for mode in ("dual", "full"):
        module, x = case.make()
        x = x[:2] if few else x
        weights.append(trained(module, [x, 2 * x, x.flip(0) + 1, x], mode, **settings))
    for dual, full in zip(*weights, strict=True):
        torch.testing.assert_close(dual, full, rtol=1e-9, atol=1e-11)


def test_one_step_is_the_reference_of_the_dual_form() -> None:
    torch.manual_seed(0)
    layer, z = nn.Linear(12, 4, bias=False).double(), torch.randn(5, 12).double()
    delta = torch.randn(5, 4).double()
    gp = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer = DoPr(gp, layer, rules=[LayerRule("", "dual")], unit_scale=False)
    before = layer.weight.detach().clone()
    layer(z).backward(delta)
    optimizer.step()
    expected = reference.precondition_dual(delta, z, 0.1)
    torch.testing.assert_close(before - layer.weight.detach(), expected)


def test_resume_is_bitwise_and_the_state_holds_the_rows_alone() -> None:
    def run(model: nn.Module, optimizer: DoPr, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()

    rules = [LayerRule("3", "dual")]
    straight, first, second = small_model(), small_model(), small_model(1)
    run(straight, adamw(straight, rules=rules), range(8))
    optimizer = adamw(first, rules=rules)
    run(first, optimizer, range(5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = adamw(second, rules=rules)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["dopr"]["averages"]["3"]["sigma"].shape == (1, 1, 6, 64)
    resumed.load_state_dict(state)
    run(second, resumed, range(5, 8))
    for ours, expected in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="treats in another mode"):
        adamw(small_model()).load_state_dict(state)


def test_float32_is_close_and_nonfinite_rows_are_skipped(caplog) -> None:
    torch.manual_seed(0)
    layer, z = nn.Linear(64, 16), torch.randn(8, 64)
    double, optimizer = copy.deepcopy(layer).double(), adamw(layer, rules=[LayerRule("", "dual")])
    layer(z).square().sum().backward()
    double(z.double()).square().sum().backward()
    optimizer.step()
    sigma = reference.second_moment(z)
    expected = reference.precondition(double.weight.grad, sigma, 0.1)
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-3, atol=1e-3)
    optimizer.refresh_every = 1
    optimizer._set_gathering()
    transform = optimizer.statistics.all[0].transform
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        layer(z + torch.inf).sum().backward()
        optimizer.step()
    assert optimizer.preconditioner.records()[""].skipped == 1
    assert torch.equal(optimizer.statistics.all[0].transform, transform)


def test_layers_fed_one_tensor_share_their_rows_and_the_role_says_dual() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x).sum() + self.right(x).sum()

    model = Pair()
    optimizer = adamw(model, rules=[LayerRule("", "dual", bias=True)])
    model(torch.randn(3, 6)).backward()
    optimizer.step()
    assert optimizer.statistics.all[1].twin is optimizer.statistics.all[0]
    assert {mode for _, _, mode, _ in optimizer.roles()} == {"dual+bias"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "sandwich"}, "mode 'dual', which needs form 'inverse'"),
        ({"power": 0.5}, "mode 'dual', which needs form 'inverse', power 1"),
        ({"damping": 0.0}, "damping of 1.2e-04 or more"),
        ({"damping": (0.1, 1e-5, 10)}, "damping of 1.2e-04 or more"),
    ],
)
def test_dual_is_refused_in_one_line_where_it_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adamw(small_model(), rules=[LayerRule("", "dual")], **settings)
    assert "\n" not in str(error.value)


def test_an_embedding_has_no_dual_form() -> None:
    with pytest.raises(ValueError, match="is not one an Embedding has"):
        adamw(nn.Embedding(4, 3), rules=[LayerRule("", "dual")])
