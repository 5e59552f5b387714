"""The modes of a layer: blocks, diagonal, SUA, row subsampling."""

import pytest
import reference
import torch
from layer_cases import adamw, one_step, small_model
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr, LayerRule
from flowdopr.optim.dopr.conv_views import channel_rows, patch_rows
from flowdopr.optim.dopr.layers import fewest_blocks
from flowdopr.optim.dopr.views import LinearView, Sample


def tokens(width: int, scale: float = 1.0) -> Tensor:
    torch.manual_seed(2)
    return (0.4 + torch.randn(50, width, dtype=torch.float64)) * scale


@pytest.mark.parametrize(("mode", "side"), [("blocks", 3), ("diagonal", 1), ("full", 6)])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_blocks_are_the_block_diagonal_of_sigma(mode: str, side: int, power: float) -> None:
    z, layer = tokens(6), nn.Linear(6, 4).double()
    rule = LayerRule("", mode, max_side=3 if mode == "blocks" else None)
    update, of_bias = one_step(layer, z, rule=rule, power=power)
    mask = torch.block_diag(*[torch.ones(side, side)] * (6 // side)).double()
    sigma = reference.second_moment(z) * mask
    expected = reference.precondition(layer.weight.grad, sigma, 0.1, alpha=power)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(of_bias, layer.bias.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_shared_offsets_are_their_kronecker_sigma(mean: bool, groups: int, power: float) -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) + torch.arange(4.0).double()[:, None, None]
    layer = nn.Conv2d(4, 6, 3, groups=groups, stride=2).double()
    rule = LayerRule("", "sua-mean" if mean else "sua")
    update = one_step(layer, x, rule=rule, power=power)[0]
    pixels = x.movedim(1, -1).reshape(-1, 4)
    for part, grad, channels in zip(
        update.chunk(groups), layer.weight.grad.chunk(groups), pixels.chunk(groups, 1), strict=True
    ):
        sigma = reference.shared_offsets(channels, 9, mean=mean)
        expected = reference.precondition(grad.flatten(1), sigma, 0.1, alpha=power)
        torch.testing.assert_close(part.flatten(1), expected, rtol=1e-9, atol=1e-11)


def test_shared_offsets_of_a_1x1_kernel_are_its_patches() -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    updates = []
    for mode in ("full", "sua", "sua-mean"):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 6, 1).double()
        updates.append(one_step(layer, x, rule=LayerRule("", mode))[0])
    for update in updates[1:]:
        torch.testing.assert_close(update, updates[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("total", [1, 7, 64, 100, 2310, 4096, 32768, 196608])
@pytest.mark.parametrize("limit", [1, 5, 64, 1000, 2048, 4096])
@pytest.mark.parametrize("turn", [0, 3])
def test_kept_rows_are_as_many_as_asked_spread_and_favour_no_column(
    total: int, limit: int, turn: int
) -> None:
    kept = Sample(limit, turn).rows(total, torch.device("cpu"))
    if total <= limit:
        assert kept is None
        return
    assert kept is not None
    kept = kept.sort().values
    assert len(kept) == limit
    assert kept[0] >= 0
    assert kept[-1] < total
    gaps = torch.cat([kept, kept[:1] + total]).diff()  # the rows go round
    assert (gaps >= 1).all()
    assert (gaps <= 2 * total / limit + 1).all()
    if total == 32768 and limit >= 1000:  # 32 images of 32 x 32: every column about equally often
        counts = torch.bincount(kept % 32, minlength=32)
        assert counts.min() > 0.75 * limit / 32
        assert counts.max() < 1.25 * limit / 32


@pytest.mark.parametrize(
    ("positions", "batch"), [(1024, 100), (1024, 128), (784, 64), (256, 256), (4096, 32)]
)
def test_refreshes_take_turns_until_every_position_was_seen_as_often(
    positions: int, batch: int
) -> None:
    """Positions of images of 16x16 to 64x64 under the default of 2048 rows."""
    counts = torch.zeros(positions)
    for turn in range(60):
        kept = Sample(2048, turn).rows(positions * batch, torch.device("cpu"))
        counts += torch.bincount(kept % positions, minlength=positions)
        if turn == 19:
            assert counts.min() > 0
    assert counts.min() > 0.65 * counts.mean()
    assert counts.max() < 1.35 * counts.mean()


def test_a_few_refreshes_see_the_second_moment_of_every_position() -> None:
    """Images whose pixels differ by their place alone, which one choice of rows cannot show."""
    torch.manual_seed(0)
    sizes = torch.rand(32, 32, dtype=torch.float64).mul(4).exp()
    place = torch.randn(1, 8, 32, 32, dtype=torch.float64) * sizes
    layer = nn.Conv2d(8, 4, 1).double()
    gp = torch.optim.SGD(layer.parameters(), lr=0.0)
    optimizer = DoPr(gp, layer, max_rows=512, refresh_every=1)
    exact = torch.einsum("bihw,bjhw->ij", place, place) / 1024
    errors = []
    for _ in range(60):
        layer(place.expand(100, -1, -1, -1)).sum().backward()
        optimizer.step()
        moment, weight = optimizer.statistics.moments[0], optimizer.statistics.numbers.ema_weight
        sigma = torch.tril(moment.sigma[0, 0] / weight[0])
        errors.append(float((sigma - exact.tril()).norm() / exact.norm()))
    assert errors[0] > 0.1
    assert errors[-1] < 0.3 * errors[0]


def test_the_choice_of_rows_is_resumed() -> None:
    layers = [nn.Linear(3, 2) for _ in range(2)]
    optimizers = [adamw(layer, refresh_every=2, max_rows=4) for layer in layers]
    for step in range(3):
        layers[0](torch.randn(50, 3)).sum().backward()
        optimizers[0].step()
        if step == 2:
            layers[1].load_state_dict(layers[0].state_dict())
            optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert [optimizer.statistics.turn for optimizer in optimizers] == [1, 1]


def test_subsampled_rows_are_rows_of_the_whole() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    x = torch.randn(5, 2, 7, 8)
    linear, every, some = LinearView("full", 1, 8), Sample(), Sample(17, turn=2)
    for whole, part in (
        (patch_rows(x, layer, every), patch_rows(x, layer, some)),
        (channel_rows(x, 2, every), channel_rows(x, 2, some)),
        (linear.rows(x, every), linear.rows(x, some)),
    ):
        (rows, total), (kept, counted) = whole, part
        assert len(rows) == total == counted
        assert torch.equal(rows[some.rows(total, x.device)], kept)


@pytest.mark.parametrize("mode", ["full", "sua", "sua-mean"])
def test_forwards_of_unequal_size_count_by_their_size(mode: str) -> None:
    """Constant images: what is kept of each is exact, and so must be how they are weighed."""
    many, few = torch.ones(30, 2, 4, 4).double(), 10 * torch.ones(2, 2, 4, 4).double()
    updates = []
    for limit in ("all", 32):
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
        gp = torch.optim.SGD(layer.parameters(), lr=1.0)
        optimizer = DoPr(gp, layer, rules=[LayerRule("", mode)], max_rows=limit)
        before = layer.weight.detach().clone()
        for x in (many, few):
            layer(x).square().mean().backward()
        optimizer.step()
        updates.append(layer.weight.detach() - before)
    torch.testing.assert_close(*updates)


@pytest.mark.parametrize(
    ("dim", "side", "blocks"),
    [
        (128, 64, 2),
        (1280, 1280, 1),
        (1281, 1280, 3),
        (131, 64, 1),
        (134, 64, 1),
        (262, 64, 2),
        (1283, 1280, 1),
    ],
)
def test_blocks_are_few(dim: int, side: int, blocks: int) -> None:
    assert fewest_blocks(dim, side) == blocks


def test_convolutions_of_one_and_three_axes() -> None:
    torch.manual_seed(0)
    flat, x = nn.Conv2d(2, 3, (1, 3), padding=(0, 1)).double(), torch.randn(4, 2, 6).double()
    line, cube = (
        nn.Conv1d(2, 3, 3, padding=1).double(),
        nn.Conv3d(2, 3, (1, 1, 3), padding=(0, 0, 1)),
    )
    cube = cube.double()
    for other in (line, cube):
        with torch.no_grad():
            other.weight.copy_(flat.weight.view_as(other.weight))
            other.bias.copy_(flat.bias)
    expected = one_step(flat, x[:, :, None])[0]
    torch.testing.assert_close(one_step(line, x)[0].flatten(), expected.flatten())
    torch.testing.assert_close(one_step(cube, x[:, :, None, None])[0].flatten(), expected.flatten())


def test_rules_go_by_name_and_the_first_match_wins() -> None:
    model = small_model()
    rules = [LayerRule(r"^3$", "none"), LayerRule(r"^[34]$", "diagonal"), LayerRule("0", "sua")]
    optimizer = DoPr(torch.optim.SGD(model.parameters()), model, rules=rules)
    modes = {name: mode for name, _, mode, _ in optimizer.roles()}
    assert modes["0.weight"] == "sua"
    assert modes["3.weight"] == "none"
    assert modes["4.weight"] == "diagonal"


@pytest.mark.parametrize(
    ("module", "mode"),
    [
        (nn.Linear(2, 2), "sua"),
        (nn.Embedding(2, 2), "full"),
        (nn.Conv2d(2, 2, 3), "triple"),
        (nn.ConvTranspose2d(2, 2, 3), "sua"),
    ],
)
def test_a_mode_the_layer_lacks_is_one_clear_line(module: nn.Module, mode: str) -> None:
    with pytest.raises(ValueError, match="mode") as error:
        DoPr(torch.optim.SGD(module.parameters()), module, rules=[LayerRule("", mode)])
    assert "\n" not in str(error.value)


class Tied(nn.Module):
    """A layer used twice through two modules, and an embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.second.weight, self.head.weight = self.first.weight, self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.table(index)).tanh()))


def test_tied_weights_pool_or_are_left_to_the_gp() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    gp = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DoPr(gp, model, max_rows="all", cov_decay=0.0)
    roles = {name: (mode, reason) for name, _, mode, reason in optimizer.roles()}
    assert roles["table.weight"] == ("full", "input of head, with which an embedding is tied")
    index, before = torch.arange(9), model.first.weight.detach().clone()
    with torch.no_grad():
        first = model.table(index)
        second = model.first(first).tanh()
    model(index).sin().sum().backward()
    grad = model.first.weight.grad
    optimizer.step()
    sigma = reference.second_moment(torch.cat([first, second]))
    expected = reference.precondition(grad, sigma, 0.1)
    torch.testing.assert_close(before - model.first.weight.detach(), expected)


class Attention(nn.Module):
    """`nn.MultiheadAttention` on projections of the input, of one tensor or of three."""

    def __init__(self, same: bool, **sizes: int) -> None:
        super().__init__()
        self.same, self.attention = same, nn.MultiheadAttention(4, 2, batch_first=True, **sizes)
        self.sizes = (4, sizes.get("kdim", 4), sizes.get("vdim", 4))

    def inputs(self, x: Tensor) -> list[Tensor]:
        query, key, value = (x[..., :size] for size in self.sizes)
        return [query] * 3 if self.same else [query, key[:, :3].cos(), value[:, :3].sin()]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x)
        return self.attention(query, value=value, key=key, need_weights=False)[0]


@pytest.mark.parametrize(
    ("same", "sizes"), [(True, {}), (False, {}), (False, {"kdim": 5, "vdim": 3})], ids=str
)
def test_attention_is_preconditioned_by_query_key_and_value(same: bool, sizes: dict) -> None:
    torch.manual_seed(0)
    model = Attention(same, **sizes).double()
    optimizer = DoPr(
        torch.optim.SGD(model.parameters(), lr=1.0), model, max_rows="all", cov_decay=0.0
    )
    x = torch.randn(6, 5, 5, dtype=torch.float64)
    weights = [p for name, p in model.named_parameters() if "proj_weight" in name]
    before = [weight.detach().clone() for weight in weights]
    model(x).sin().sum().backward()
    grads = [grad for weight in weights for grad in weight.grad.split(4)]
    optimizer.step()
    moved = [b - w.detach() for b, w in zip(before, weights, strict=True)]
    parts = [part for whole in moved for part in whole.split(4)]
    for part, grad, read in zip(parts, grads, model.inputs(x), strict=True):
        sigma = reference.second_moment(read.reshape(-1, read.shape[-1]))
        torch.testing.assert_close(part, reference.precondition(grad, sigma, 0.1))


def test_what_a_layer_does_not_show_is_left_to_the_gp_with_one_warning(caplog) -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(3, 3)])
    nn.utils.parametrizations.weight_norm(model[1])
    optimizer = DoPr(torch.optim.SGD(model.parameters()), model)
    roles = {name: (mode, reason) for name, _, mode, reason in optimizer.roles()}
    assert roles["0.self_attn.in_proj_weight"] == ("full", "layer input")
    assert roles["0.self_attn.out_proj.weight"][0] == "none"
    assert "without calling" in roles["0.self_attn.out_proj.weight"][1]
    assert "parametrized" in roles["1.parametrizations.weight.original1"][1]
    (record,) = caplog.records
    assert "'0.self_attn.out_proj' and of 1 more to the optimizer alone" in record.getMessage()
    caplog.clear()
    rules = [LayerRule("out_proj|^1$", "none")]
    DoPr(torch.optim.SGD(model.parameters()), model, rules=rules)
    assert not caplog.records


@pytest.mark.parametrize("head_first", [False, True])
def test_an_embedding_and_its_head_have_the_ap_of_the_heads_input(head_first: bool) -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(7, 4).double(), nn.Linear(4, 7, bias=False).double()
    head.weight = table.weight
    model = nn.ModuleDict({"a": head, "b": table} if head_first else {"a": table, "b": head})
    optimizer = DoPr(
        torch.optim.SGD(model.parameters(), lr=1.0), model, max_rows="all", cov_decay=0.0
    )
    name = "a" if head_first else "b"
    assert optimizer.roles() == [
        ("a.weight", (7, 4), "full", f"input of {name}, with which an embedding is tied")
    ]
    before, z = table.weight.detach().clone(), table(torch.arange(7)).tanh()
    head(z).sin().sum().backward()
    grad = table.weight.grad
    optimizer.step()
    expected = reference.precondition(grad, reference.second_moment(z.detach()), 0.1)
    torch.testing.assert_close(before - table.weight.detach(), expected)
