"""Forms of AP: the sandwich, powers and schedules, and what each leaves unchanged."""

from collections.abc import Callable

import pytest
import reference
import torch
from layer_cases import CASES, IDS, LayerCase, adamw, batch, small_model
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr

GPS: dict[str, Callable[[Tensor], Tensor]] = {
    "msgn": reference.matrix_sign,
    "sign": torch.sign,
    "rownorm": reference.row_norm,
}


class Direction(torch.optim.Optimizer):
    """W <- W - lr f(G), with f exact in float64. f does not depend on the scale of G."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor], lr: float) -> None:
        super().__init__(list(model.parameters()), {"lr": lr, "weight_decay": 0.0})
        self.function = function

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    matrix = p.grad.flatten(1) if p.dim() > 1 else p.grad[None]
                    p.sub_(group["lr"] * self.function(matrix).view_as(p))


def maps() -> dict[str, Tensor]:
    torch.manual_seed(3)
    general = torch.randn(5, 5, dtype=torch.float64) + 2 * torch.eye(5, dtype=torch.float64)
    return {
        "any": general,
        "orthogonal": torch.linalg.qr(general).Q,
        "scalar": 3.0 * torch.eye(5, dtype=torch.float64),
    }


def trajectory(matrix: Tensor, form: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs after five steps, of a layer that sees z through `matrix`."""
    torch.manual_seed(0)
    z = torch.randn(30, 5, dtype=torch.float64)
    layer = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(layer.weight @ torch.linalg.inv(matrix))
    gp = Direction(layer, function, 0.05)
    settings = {"damping": 0.0, "cov_decay": 0.0, "refresh_every": 1}
    optimizer = DoPr(gp, layer, form=form, **settings)
    if form == "sandwich":  # its last factor, L^-1, is proportional to the root of tr(Sigma) / d
        sigma = reference.second_moment(z @ matrix.T)
        gp.param_groups[0]["lr"] /= (sigma.trace() / 5).sqrt().item()
    for _ in range(5):
        optimizer.zero_grad()
        y = layer(z @ matrix.T)
        (y.sin().sum() + y.square().mean()).backward()
        optimizer.step()
    return layer(z @ matrix.T).detach()


@pytest.mark.parametrize(
    ("form", "gp", "kept"),
    [
        ("inverse", "msgn", {"orthogonal"}),
        ("inverse", "sign", set()),
        ("sandwich", "msgn", {"any", "orthogonal", "scalar"}),
        ("sandwich", "rownorm", {"any", "orthogonal", "scalar"}),
    ],
)
def test_which_maps_of_the_input_leave_the_outputs_trajectory(
    form: str, gp: str, kept: set[str]
) -> None:
    plain = trajectory(torch.eye(5, dtype=torch.float64), form, GPS[gp])
    for name, matrix in maps().items():
        moved = (trajectory(matrix, form, GPS[gp]) - plain).abs().max().item()
        assert (moved < 1e-8) == (name in kept), (name, moved)
        assert name in kept or moved > 1e-3


@pytest.mark.parametrize("gp", ["msgn", "rownorm"])
def test_the_cholesky_sandwich_is_the_one_of_roots(gp: str) -> None:
    torch.manual_seed(0)
    z, layer = torch.randn(30, 5, dtype=torch.float64), nn.Linear(5, 3, bias=False).double()
    before = layer.weight.detach().clone()
    optimizer = DoPr(Direction(layer, GPS[gp], 1.0), layer, form="sandwich")
    layer(z).sin().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()
    sigma = reference.second_moment(z)
    root = reference.power(reference.damped(sigma / (sigma.trace() / 5), 0.1) / 1.1, -0.5)
    expected = GPS[gp](grad @ root) @ root
    torch.testing.assert_close(before - layer.weight.detach(), expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("conv_mode", ["full", "sua-mean"])
def test_the_sandwich_around_sgd_is_the_inverse(case: LayerCase, conv_mode: str) -> None:
    weights = []
    for form in ("inverse", "sandwich"):
        module, x = case.make()
        gp = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer = DoPr(gp, module, form=form, max_rows="all", conv_mode=conv_mode)
        module(x).sin().sum().backward()
        optimizer.step()
        weights.append(module.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-11)


def test_the_sandwich_decays_weights_decoupled_and_keeps_the_gp_state() -> None:
    model = small_model()
    gp = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = DoPr(gp, model, form="sandwich")
    before = model[3].weight.detach().clone()
    (0 * model(batch(0)).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(model[3].weight.detach(), before * 0.95)
    assert set(gp.state[model[3].weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_damping_schedule_is_geometric_and_survives_a_resume() -> None:
    model = small_model()
    optimizer = adamw(model, damping=(0.01, 1.0, 10), refresh_every=4)
    dampings = [optimizer._damping_at(step) for step in (0, 5, 10, 99)]
    assert dampings == pytest.approx([0.01, 0.1, 1.0, 1.0])
    for step in range(6):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    other = adamw(small_model(), damping=(0.01, 1.0, 10), refresh_every=4)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(optimizer.transforms, other.transforms, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "bread"}, "form is bread"),
        ({"power": 0.0}, "power is 0"),
        ({"form": "sandwich", "power": 0.5}, "1 with form 'sandwich'"),
        ({"damping": (0.0, 1.0, 10)}, "damping is"),
        ({"damping": (0.1, -1.0, 10)}, "damping is"),
        ({"conv_mode": "some"}, "conv_mode is some"),
    ],
)
def test_bad_forms_are_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw(small_model(), **settings)
