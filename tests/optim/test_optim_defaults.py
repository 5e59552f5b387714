"""What layers get that no rule decides, by their widths; and what a few settings make of Sigma."""

from functools import partial

import pytest
import reference
import torch
from layer_cases import one_step
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr, LayerRule
from flowdopr.optim.dopr.views import Sample

EXACT = {"rtol": 1e-9, "atol": 1e-11}
linear, conv, transposed = (  # without numbers: only their shapes are asked for
    partial(kind, bias=False, device="meta") for kind in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
)


def modes(module: nn.Module, **settings: object) -> dict[str, str]:
    """The AP mode of every parameter."""
    optimizer = DoPr(torch.optim.SGD(module.parameters()), module, **settings)
    return {name: mode for name, _, mode, _ in optimizer.roles()}


def tokens(width: int, count: int = 50) -> Tensor:
    torch.manual_seed(2)
    return 0.4 + torch.randn(count, width, dtype=torch.float64)


def images(*shape: int) -> Tensor:
    """Images whose channels differ in mean and scale, and which differ in scale themselves."""
    torch.manual_seed(2)
    channels = torch.arange(1.0, shape[1] + 1).double()[:, None, None] / 2
    each = torch.arange(1.0, shape[0] + 1).double()[:, None, None, None]
    return each * (channels + channels.sqrt() * torch.randn(shape, dtype=torch.float64))


def mask(dim: int, side: int) -> Tensor:
    """Ones in the diagonal blocks of this side."""
    return torch.block_diag(*[torch.ones(side, side).double()] * (dim // side))


@pytest.mark.parametrize(
    ("module", "mode"),
    [
        (linear(1280, 1280), "full"),
        (linear(1281, 1280), "blocks 3x427"),
        (linear(2560, 1300), "blocks 2x1280"),
        (transposed(2560, 1300, 1), "blocks 2x1280"),
        (transposed(2560, 1300, 1, groups=2), "full"),
        (linear(256, 129), "full"),
        (linear(256, 128), "blocks 2x128"),
        (linear(256, 64), "blocks 4x64"),
        (linear(256, 63), "full"),
        (linear(5120, 1280), "blocks 4x1280"),
        (linear(6144, 1536), "blocks 6x1024"),
        (transposed(256, 64, 1), "blocks 4x64"),
        (conv(14, 14, 3), "full"),
        (conv(128, 14, 1), "full"),
        (conv(15, 15, 3), "sua-mean"),
        (conv(28, 14, 3, groups=2), "full"),
    ],
    ids=str,
)
def test_a_layer_alone_gets_its_mode_by_its_widths(module: nn.Module, mode: str) -> None:
    assert modes(module) == {"weight": mode}


def test_arguments_and_rules_move_the_bounds() -> None:
    wide = linear(12, 12)
    assert modes(wide, max_side=12) == {"weight": "full"}
    assert modes(wide, max_side=11) == {"weight": "blocks 2x6"}
    assert modes(wide, max_side=11, rules=[LayerRule("", max_side=4)]) == {"weight": "blocks 3x4"}
    assert modes(wide, max_side=4, rules=[LayerRule("", max_side=12)]) == {"weight": "full"}
    assert modes(wide, max_side=4, rules=[LayerRule("", "full")]) == {"weight": "full"}
    narrowing = linear(256, 64)
    for rule in (LayerRule("", "full"), LayerRule("", "blocks"), LayerRule("", max_side=256)):
        assert modes(narrowing, rules=[rule]) == {"weight": "full"}
    assert modes(narrowing, max_side=32) == {"weight": "blocks 8x32"}
    patch = conv(3, 4, 3)
    assert modes(patch, conv_mode="sua-mean") == {"weight": "sua-mean"}
    assert modes(conv(15, 15, 3), conv_mode="full") == {"weight": "full"}
    assert modes(patch, max_side=9) == {"weight": "blocks 3x9"}


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize(
    ("d_in", "d_out", "side", "settings"),
    [(12, 7, 4, {"max_side": 5}), (128, 64, 64, {}), (10, 7, 10, {})],
)
def test_blocks_by_default_are_the_block_diagonal_of_sigma(
    d_in: int, d_out: int, side: int, settings: dict[str, int], power: float
) -> None:
    z, layer = tokens(d_in, 3 * d_in), nn.Linear(d_in, d_out, bias=False).double()
    (update,) = one_step(layer, z, power=power, **settings)
    sigma = reference.second_moment(z) * mask(d_in, side)
    expected = reference.precondition(layer.weight.grad, sigma, 0.1, alpha=power)
    torch.testing.assert_close(update, expected, **EXACT)


@pytest.mark.parametrize("sides", [{"side": 16}, {"side": 4, "max_side": 7}])
def test_a_wide_patch_is_taken_for_shared_offsets_with_the_mean(sides: dict[str, int]) -> None:
    settings = dict(sides)
    side = settings.pop("side")
    x, layer = images(3, 16, 5, 5), nn.Conv2d(16, 6, 3, stride=2, bias=False).double()
    (update,) = one_step(layer, x, **settings)
    sigma = reference.shared_offsets(x.movedim(1, -1).reshape(-1, 16), 9, mean=True)
    sigma = sigma * torch.kron(mask(16, side), torch.ones(9, 9).double())
    expected = reference.precondition(layer.weight.grad.flatten(1), sigma, 0.1)
    torch.testing.assert_close(update.flatten(1), expected, **EXACT)


class Fork(nn.Module):
    """Three layers fed one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) * self.c(x)


def test_layers_that_keep_different_rows_share_no_statistic() -> None:
    model, z = Fork().double(), tokens(4) * torch.linspace(0.2, 3, 50).double()[:, None]
    gp = torch.optim.SGD(model.parameters(), lr=1.0)
    rules = [LayerRule("b", max_rows=9)]
    optimizer = DoPr(gp, model, max_rows="all", cov_decay=0.0, rules=rules)
    before = [p.detach().clone() for p in model.parameters()]
    model(z).sin().sum().backward()
    grads = [p.grad for p in model.parameters()]
    optimizer.step()
    shared = {
        s.name: s.shared_with.name if s.shared_with else None for s in optimizer.statistics.moments
    }
    assert shared == {"a": None, "b": None, "c": "a"}
    few = z[Sample(9).rows(50, z.device)]
    for weight, old, grad, rows in zip(model.parameters(), before, grads, (z, few, z), strict=True):
        expected = reference.precondition(grad, reference.second_moment(rows), 0.1)
        torch.testing.assert_close(old - weight.detach(), expected, **EXACT)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_an_embedding_has_the_frequencies_of_its_rows(
    padding_idx: int | None, power: float
) -> None:
    """M_v = (1 + gamma) G_v / (V p_v + gamma); a padding index counts, and has no gradient."""
    table = nn.Embedding(5, 3, padding_idx=padding_idx).double()
    index = torch.tensor([[0, 0, 0, 1], [2, 2, 4, 0]])
    settings = {"power": power, "damping": 0.2, "max_rows": 2}
    (update,) = one_step(table, index, **settings)
    frequencies = torch.tensor([4, 1, 2, 0, 1]).double() / 8
    expected = table.weight.grad * (1.2 / (5 * frequencies + 0.2))[:, None] ** power
    torch.testing.assert_close(update, expected, **EXACT)
    assert not update[3].any()
    assert update[2].any() == (padding_idx is None)
