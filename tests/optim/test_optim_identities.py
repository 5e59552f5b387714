"""What holds exactly for every kind of layer: changes of coordinates, least squares, limits."""

from collections.abc import Callable

import pytest
import reference
import torch
from layer_cases import CASES, IDS, LayerCase, mean_eigenvalues
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr

MAPPED = [case for case in CASES if case.name != "embedding"]  # its input has no coordinates
# Overlapping outputs of a transposed convolution are not one least-squares problem a row.
REGRESSIONS = [case for case in CASES if not case.name.startswith("transposed")]
CONV_MODES = ("full", "sua", "sua-mean")
EXACT = {"rtol": 1e-8, "atol": 1e-9}


def name_of(case: LayerCase) -> str:
    return case.name


def groups_of(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def map_of(kind: str, size: int) -> Tensor:
    torch.manual_seed(3)
    eye = torch.eye(size, dtype=torch.float64)
    general = torch.randn(size, size, dtype=torch.float64) + 2 * eye
    maps = {"any": general, "orthogonal": torch.linalg.qr(general).Q, "scalar": 3 * eye}
    return maps.get(kind, eye)


class Direction(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr f(G) with momentum of f's input, f exact on each group's matrix.

    DoPr divides Sigma by its mean eigenvalue, which depends on the coordinates of the input. What
    that changes is a number for each group, `scale`, by which this optimizer divides again: under
    the inverse the gradients, under the sandwich, whose f ignores their size, the steps.
    """

    def __init__(
        self, module: nn.Module, function: Callable[[Tensor], Tensor], lr: float, momentum: float
    ) -> None:
        defaults = {"lr": lr, "weight_decay": 0.1}
        super().__init__([module.weight], defaults)
        self.module, self.function, self.momentum = module, function, momentum
        self.scale: Callable[[], Tensor] = lambda: torch.ones(groups_of(module))
        self.sandwich = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        weight, group = self.module.weight, self.param_groups[0]
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        of_group = weight.grad.unflatten(0, (len(self.scale()), -1))
        scales = self.scale().view(-1, *[1] * weight.dim())
        gradient = of_group if self.sandwich else of_group / scales
        average.mul_(self.momentum).add_(gradient.flatten(0, 1))
        parts = [self.function(g) for g in reference.layer_matrices(self.module, average)]
        if self.sandwich:
            parts = [part / scale**0.5 for part, scale in zip(parts, self.scale(), strict=True)]
        transposed = isinstance(self.module, nn.ConvTranspose2d | nn.Embedding)
        moved = torch.cat([part.T if transposed else part for part in parts])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(group["lr"] * moved.view_as(weight))


def trajectory(
    case: LayerCase, kind: str, function: Callable[[Tensor], Tensor], **settings: object
) -> Tensor:
    """Outputs after four steps on two inputs in turn, of a layer whose input is mapped."""
    module, x = case.make()
    axis, groups = (-1 if isinstance(module, nn.Linear) else 1), groups_of(module)
    side = x.shape[axis] // groups
    change = map_of(kind, side)
    whole = torch.block_diag(*[change] * groups)
    inputs = [(whole @ z.movedim(axis, -1)[..., None])[..., 0] for z in (x, 1.5 * x.sin())]
    inputs = [z.movedim(-1, axis) for z in inputs]
    inverse = torch.linalg.inv(change)
    with torch.no_grad():
        if isinstance(module, nn.ConvTranspose2d):
            grouped = module.weight.unflatten(0, (groups, side))
            moved = torch.einsum("gcohw,cd->gdohw", grouped, inverse)
        else:
            moved = torch.einsum("oc...,cd->od...", module.weight, inverse)
        module.weight.copy_(moved.reshape(module.weight.shape))
    gp = Direction(module, function, 0.05, 0.5)
    if module.bias is not None:
        module.bias.requires_grad_(False)
    optimizer = DoPr(gp, module, max_rows="all", refresh_every=2, **settings)
    gp.scale, gp.sandwich = lambda: mean_eigenvalues(optimizer), optimizer.form.sandwich
    for step in range(4):
        optimizer.zero_grad()
        y = module(inputs[step % 2])
        (y.sin().sum() + y.square().mean()).backward()
        optimizer.step()
    return module(inputs[0]).detach()


@pytest.mark.parametrize("case", MAPPED, ids=name_of)
@pytest.mark.parametrize("conv_mode", CONV_MODES)
def test_changes_of_coordinates_leave_the_outputs_trajectory(
    case: LayerCase, conv_mode: str
) -> None:
    """Of a linear GP: any change where nothing is damped, orthogonal and scalar ones at last."""
    settings = {"conv_mode": conv_mode}
    for damping, kept in ((0.0, {"any", "orthogonal"}), (0.2, {"orthogonal", "scalar"})):
        plain = trajectory(case, "none", Tensor.clone, damping=damping, **settings)
        for kind in kept:
            moved = trajectory(case, kind, Tensor.clone, damping=damping, **settings)
            torch.testing.assert_close(moved, plain, **EXACT)
    module, x = case.make()
    if isinstance(module, nn.Linear) or x.shape[1] > groups_of(module):  # else "any" is a scalar
        moved = trajectory(case, "any", Tensor.clone, damping=0.2, **settings)
        assert (moved - plain).abs().max() > 1e-3


@pytest.mark.parametrize("case", MAPPED, ids=name_of)
@pytest.mark.parametrize("function", [reference.matrix_sign, reference.row_norm])
@pytest.mark.parametrize("conv_mode", ["full", "sua-mean"])
def test_the_sandwich_does_not_depend_on_coordinates(
    case: LayerCase, function: Callable[[Tensor], Tensor], conv_mode: str
) -> None:
    settings = {"conv_mode": conv_mode, "form": "sandwich", "damping": 0.0}
    plain = trajectory(case, "none", function, **settings)
    torch.testing.assert_close(trajectory(case, "any", function, **settings), plain, **EXACT)


@pytest.mark.parametrize("case", REGRESSIONS, ids=name_of)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_step_of_regression_leaves_the_damped_share_of_the_error(
    case: LayerCase, damping: float
) -> None:
    """E <- E lambda (Sigma + lambda I)^-1 about the least-squares solution: undamped, nothing."""
    module, x = case.make()
    bias = getattr(module, "bias", None)
    y = module(x)
    target = torch.randn(y.shape, dtype=y.dtype)
    gp = torch.optim.SGD([module.weight], lr=1.0)
    if bias is not None:
        bias.requires_grad_(False)
    optimizer = DoPr(gp, module, damping=damping, max_rows="all")
    axis = 1 if isinstance(module, nn.Conv2d) else -1
    wanted = target.movedim(axis, -1) - (0 if bias is None else bias.detach())
    (0.5 * (module(x) - target).square().sum() / wanted[..., 0].numel()).backward()
    before = reference.layer_matrices(module, module.weight.detach().clone())
    optimizer.step()
    rows = reference.layer_rows(module, x)
    parts = wanted.flatten(0, -2).chunk(len(rows), 1)
    after = reference.layer_matrices(module, module.weight.detach())
    for z, part, old, moved in zip(rows, parts, before, after, strict=True):
        sigma = reference.second_moment(z)
        # The step of the learning rate d / tr(Sigma) / (1 + gamma).
        new = old + (moved - old) * len(sigma) / sigma.trace() / (1 + damping)
        solution = (torch.linalg.pinv(z) @ part).T
        ridge = damping * sigma.trace() / len(sigma)
        share = ridge * torch.linalg.pinv(reference.damped(sigma, damping))
        expected = solution + (old - solution) @ share
        seen = sigma.diagonal() > 0  # an embedding has a row that is not
        torch.testing.assert_close(new[:, seen], expected[:, seen], **EXACT)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("conv_mode", CONV_MODES)
def test_an_infinite_damping_is_the_bare_optimizer(
    case: LayerCase, conv_mode: str, power: float
) -> None:
    module, x = case.make()
    gp = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = DoPr(gp, module, damping=1e12, power=power, conv_mode=conv_mode)
    module(x).square().sum().backward()
    grad = module.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(module.weight.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"power": 0.5}, {"form": "sandwich"}])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_inputs_that_are_always_zero_leave_the_gradient_as_it_is(damping, settings) -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    optimizer = DoPr(
        torch.optim.SGD(layer.parameters(), lr=1.0), layer, damping=damping, **settings
    )
    layer(torch.zeros(5, 4).double()).sum().backward()
    before, grad = layer.weight.detach().clone(), torch.randn(3, 4, dtype=torch.float64)
    layer.weight.grad = grad.clone()  # another loss may reach the weight by another way
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - grad)


WHITE = {
    "linear": (lambda: nn.Linear(4, 3), 2 * torch.eye(4)),
    "patch": (lambda: nn.Conv2d(2, 3, 2), torch.eye(8).view(8, 2, 2, 2)),
    "patch-groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), torch.eye(16).view(16, 4, 2, 2)),
    "torus": (
        lambda: nn.Conv2d(1, 3, 2, padding="same", padding_mode="circular"),
        4 * torch.eye(4).view(4, 1, 2, 2),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3), torch.eye(4).view(4, 4, 1, 1)),
}


@pytest.mark.parametrize("name", WHITE)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_an_identity_sigma_is_the_bare_optimizer_bitwise(name: str, power: float) -> None:
    weights = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        build, x = WHITE[name]
        module = build()
        gp = torch.optim.AdamW(module.parameters(), lr=0.1)
        optimizer = DoPr(gp, module, damping=0.0, power=power, refresh_every=2) if wrapped else gp
        for _ in range(5):
            optimizer.zero_grad()
            module(x).sin().sum().backward()
            optimizer.step()
        weights.append(module.weight.detach())
    assert torch.equal(weights[0], weights[1])
