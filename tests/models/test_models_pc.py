"""PC layers: the map f against a singular value decomposition, its gradient, its state."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from variants import SHAPE, make

from flowdopr.models import add_pc_layers, merge_pc_layers, pc_layers, update_spectral_norms
from flowdopr.models.layers import Conv2d, FusedLinear, Linear
from flowdopr.models.pc import BANDS, EPS, LEVELS, polynomial
from flowdopr.optim import build_optimizer, parameter_roles

LAYERS = {
    "wide": lambda: Linear(9, 5),
    "tall": lambda: Linear(4, 7),
    "square": lambda: Linear(6, 6),
    "fused": lambda: FusedLinear(6, 4, 3),
    "conv": lambda: Conv2d(3, 5, 3),
    "grouped": lambda: Conv2d(4, 6, 3, groups=2),
}
ALL_LAYERS = pytest.mark.parametrize("kind", LAYERS)
ALL_LEVELS = pytest.mark.parametrize("level", range(5))


def pc_layer(kind: str = "wide", level: int = 4, **options) -> nn.Module:
    """A PC layer in float64, whose u and v are the exact singular vectors."""
    model = nn.Sequential(LAYERS[kind]()).double()
    layer = add_pc_layers(model, level, [""], **options)[0]
    left, _, right = torch.linalg.svd(matrices(layer, layer.weight.detach()))
    layer.weight_map.u.copy_(left[:, :, 0])
    layer.weight_map.v.copy_(right[:, 0])
    return layer


def matrices(layer: nn.Module, weight: Tensor) -> Tensor:
    """The matrices (K, r, c) that are stacked in a weight."""
    return weight.reshape(layer.weight_map.blocks, -1, weight[0].numel())


def lifted(s: Tensor, level: int) -> Tensor:
    return s * sum(a * s ** (2 * power) for power, a in enumerate(LEVELS[level]))


@ALL_LAYERS
@ALL_LEVELS
@pytest.mark.parametrize("recover_norm", [True, False])
def test_the_map_is_a_polynomial_of_the_singular_values(kind, level, recover_norm):
    layer = pc_layer(kind, level, recover_norm=recover_norm)
    with torch.no_grad():
        gain = layer.weight_map.gain.copy_(1 + torch.rand(layer.weight_map.blocks))
    w = matrices(layer, layer.weight)
    left, s, right = torch.linalg.svd(w, full_matrices=False)
    sigma = s[:, :1] + EPS
    scale = gain[:, None] * (sigma if recover_norm else 1)
    expected = left @ torch.diag_embed(scale * lifted(s / sigma, level)) @ right
    found = matrices(layer, layer.effective_weight())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@ALL_LAYERS
@ALL_LEVELS
def test_the_gradient_is_that_of_the_map(kind, level):
    layer = pc_layer(kind, level, recover_norm=False)

    def mapped(weight: Tensor, gain: Tensor) -> Tensor:
        values = {"gain": gain}
        return torch.func.functional_call(layer.weight_map, values, (weight,))

    assert torch.autograd.gradcheck(mapped, (layer.weight, layer.weight_map.gain))


def test_bfloat16_would_not_do_for_the_map():
    x = torch.randn(1, 384, 1536)
    x /= torch.linalg.matrix_norm(x, 2)
    exact = polynomial(x.double(), LEVELS[4])

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert error(polynomial(x, LEVELS[4])) < 2e-6
    assert error(exact.bfloat16()) < 0.002
    assert error(polynomial(x.bfloat16(), LEVELS[4])) > 0.004


def test_no_gradient_goes_through_the_recovered_norm():
    layer, plain = pc_layer(), pc_layer(recover_norm=False)
    plain.load_state_dict(layer.state_dict())
    g = torch.randn_like(layer.weight)
    norm = torch.linalg.matrix_norm(layer.weight, 2) + EPS
    found, without = (
        torch.autograd.grad(one.effective_weight(), one.weight, g)[0] for one in (layer, plain)
    )
    torch.testing.assert_close(found, norm * without)


def test_level_0_with_recovered_norm_is_the_plain_layer_but_for_its_gradient():
    """Values are equal but for the rounding of a quotient and a product, which are not one. The
    gradient lacks what would change the spectral norm: that is a constant for it."""
    layer = pc_layer(level=0, gain=False)
    torch.testing.assert_close(layer.effective_weight(), layer.weight, rtol=1e-15, atol=0)
    g, u, v = torch.randn_like(layer.weight), layer.weight_map.u, layer.weight_map.v
    found = torch.autograd.grad(layer.effective_weight(), layer.weight, g)[0]
    sigma = torch.linalg.matrix_norm(layer.weight, 2) + EPS
    expected = g - (g * layer.weight).sum() / sigma * u.mT @ v
    torch.testing.assert_close(found, expected)


@ALL_LEVELS
def test_singular_values_lie_in_the_band_of_the_level(level):
    s = torch.linspace(0.05, 1, 10_001, dtype=torch.float64)
    low, high = BANDS[level]
    band = lifted(s, level)
    assert low <= band.min() < low + 2e-4
    assert high - 2e-4 < band.max() <= high
    layer = pc_layer("square", level, gain=False)
    left, _, right = torch.linalg.svd(layer.weight.detach())
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(torch.linspace(1, 0.05, 6).double()) @ right)
    found = torch.linalg.svdvals(layer.effective_weight())
    assert found.min() >= low - 1e-6
    assert found.max() <= high + 1e-6


def test_spectral_norms_are_found_and_follow_the_weights():
    model = add_pc_layers(make("unet"), layers=["conv", "attention.qkv"], power_iterations=2)
    for step in range(120):
        with torch.no_grad():
            for layer in pc_layers(model).values():
                layer.weight.add_(1e-3 * torch.randn_like(layer.weight))
        update_spectral_norms(model, step)
    for layer in pc_layers(model).values():
        w, known = matrices(layer, layer.weight), layer.weight_map
        found = torch.einsum("kr,krc,kc->k", known.u, w, known.v)
        norms = torch.linalg.matrix_norm(w, 2)
        assert (found <= 1.0001 * norms).all()
        assert (found >= 0.95 * norms).all()


def test_a_weight_of_zeros_leaves_zero():
    layer = add_pc_layers(nn.Sequential(Linear(4, 4)), layers=[""])[0]
    nn.init.zeros_(layer.weight)
    update_spectral_norms(layer)
    layer(torch.eye(4)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, LEVELS[4][0] * torch.ones(4, 4))
    with torch.no_grad():
        layer.weight.sub_(0.1 * torch.randn(4, 4))
    update_spectral_norms(layer, 0)
    known = layer.weight_map
    ratio = known.u[0] @ layer.weight @ known.v[0] / torch.linalg.matrix_norm(layer.weight, 2)
    assert ratio > 0.99


def test_the_norms_of_weights_that_begin_at_zero_are_known_from_the_first_step_on():
    """Beyond 1.14 times the norm that it is divided by, a singular value leaves level 4's band."""
    model = add_pc_layers(make("unet"), layers=["conv_2", "attention.proj"])
    optimizer = build_optimizer(model, "muon", lr=1e-2)
    x, t, y = torch.randn(16, *SHAPE), torch.rand(16), torch.arange(16) % 5
    for step in range(12):
        optimizer.zero_grad()
        (model(x, t, y) - x.flip(1)).square().mean().backward()
        optimizer.step()
        update_spectral_norms(model, step)
        for layer in pc_layers(model).values():
            w, known = layer.weight.flatten(1), layer.weight_map
            if w.any():
                assert torch.linalg.matrix_norm(w, 2) < 1.14 * known.u[0] @ w @ known.v[0]


def test_any_module_becomes_one_and_is_plain_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
    x, names = torch.randn(5, 3, 4, 4), list(model.state_dict())
    raw = copy.deepcopy(model.state_dict())
    add_pc_layers(model, layers=["^[02]$"])
    assert list(pc_layers(model)) == ["0", "2"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in raw.items())
    expected = model(x)
    merge_pc_layers(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert list(model.state_dict()) == names
    assert not pc_layers(model)
    assert not torch.equal(model[0].weight, raw["0.weight"])
    assert torch.equal(model[3].weight, raw["3.weight"])


def test_optimizers_see_the_raw_weights_as_the_matrices_they_are():
    model = add_pc_layers(make("unet"), layers=["attention", "conv_1"])
    roles = {role.name: role for role in parameter_roles(model)}
    for name, layer in pc_layers(model).items():
        role = roles[f"{name}.weight"]
        assert (role.kind, role.blocks) == (
            "conv" if isinstance(layer, nn.Conv2d) else "matrix",
            layer.weight_map.blocks,
        )
        assert roles[f"{name}.weight_map.gain"].kind == "vector"
    optimizer = build_optimizer(model, "muon", lr=0.1)
    torch.manual_seed(0)
    weights = [layer.weight for layer in pc_layers(model).values()]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    for layer, old in zip(pc_layers(model).values(), before, strict=True):
        step = torch.linalg.svdvals(matrices(layer, layer.weight.detach() - old))
        assert (step.quantile(0.1, dim=1) > 0.5 * step.amax(1)).all()


@pytest.mark.parametrize("way", ["checkpointed", "compiled", "under DDP's broadcast", "bfloat16"])
def test_training_sees_one_map(way):
    """The same gradients whatever surrounds the forward."""
    model = add_pc_layers(nn.Sequential(Linear(6, 12), nn.Tanh(), Linear(12, 3)), layers=[""])
    x, run = torch.randn(8, 6), model
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if way == "checkpointed":
        run = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    elif way == "compiled":
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
        out = run(x)
        weight = model[0].effective_weight()
    assert weight.dtype == torch.float32
    if way == "under DDP's broadcast":
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())
    out.square().sum().backward()
    loose = {"rtol": 0.05, "atol": 0.05} if way == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    for found, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, found, **loose)


class Other(nn.Linear):
    """A layer whose forward may be of its own."""


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (
            lambda: nn.Sequential(Linear(2, 2)),
            {"layers": ["^conv$"]},
            "'\\^conv\\$' finds no Linear",
        ),
        (lambda: nn.Sequential(Other(2, 2)), {}, "'0' is a Other, which may use its weight"),
        (lambda: add_pc_layers(nn.Sequential(Linear(2, 2)), layers=[""]), {}, "is one already"),
        (lambda: tied(), {}, "'0' shares its weight with another layer: let no pattern"),
        (lambda: zero(), {"recover_norm": False}, "'0' starts at zero"),
        (lambda: zero(), {"level": 5}, "model.pc.level is 5, it must be 0 to 4"),
    ],
)
def test_what_cannot_be_a_pc_layer_is_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        add_pc_layers(model(), **{"layers": [""], **options})


def tied() -> nn.Module:
    model = nn.Sequential(Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def zero() -> nn.Module:
    model = nn.Sequential(Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    return model
