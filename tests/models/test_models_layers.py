"""Shared layers against explicit formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowdopr import cpu
from flowdopr.models import layers
from flowdopr.models.layers import Attention, Condition, Dropout, FusedLinear, Linear, SwiGLU


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 12), (4, 4, 3, 12), (1, 16, 12), (16, 12), (5, 12)])
def test_linear_equals_torchs(onednn, shape, monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_IS_FAST", onednn)
    monkeypatch.setattr(cpu, "ONEDNN_MIN_ROWS", 16)
    ours = Linear(12, 20)
    theirs = nn.Linear(12, 20)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(x_ours), theirs(x_theirs)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_linear_takes_inputs_that_are_not_contiguous():
    linear, x = Linear(12, 20), torch.randn(12, 32, 16).transpose(0, 2)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))


def test_attention_is_softmax_of_scaled_products():
    dim, heads = 16, 4
    attention = Attention(dim, heads).double()
    x = torch.randn(2, 5, dim, dtype=torch.float64)
    q, k, v = (
        part.reshape(2, 5, heads, dim // heads).transpose(1, 2)
        for part in attention.qkv(x).split(dim, dim=-1)
    )
    weights = torch.softmax(q @ k.mT / math.sqrt(dim // heads), dim=-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, dim))
    torch.testing.assert_close(attention(x), expected)


def test_attention_does_not_know_the_order_of_tokens():
    attention, x = Attention(16, 2).double(), torch.randn(2, 6, 16, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    attention = Attention(16, 2, qk_norm=True).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    expected = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 100
        attention.qkv.bias[:32] *= 100
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


def test_rotation_keeps_lengths_and_products_depend_on_differences_of_position():
    height, width, dim = 5, 6, 8
    angles = layers.rotary_angles(height, width, dim).double()
    q, k = torch.randn(2, dim, dtype=torch.float64)
    rotated_q = layers.rotate(q.expand(height * width, dim), angles)
    rotated_k = layers.rotate(k.expand(height * width, dim), angles)
    torch.testing.assert_close(rotated_q.norm(dim=1), q.norm().expand(height * width))
    products = (rotated_q @ rotated_k.T).reshape(height, width, height, width)
    torch.testing.assert_close(products[0, 1, 2, 0], products[2, 3, 4, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products[1, 4, 0, 5], products[4, 3, 3, 4], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(products[0, 1, 2, 0], products[0, 1, 0, 2])


def test_time_features_are_cosines_then_sines():
    t = torch.tensor([0.0, 0.3, 1.0])
    features = layers.time_features(t, 6)
    frequencies = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    angles = t[:, None] * frequencies
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], dim=1))


def test_positions_of_a_grid():
    table = layers.sincos_positions(3, 2, 8)
    omega = torch.tensor([1.0, 0.01])
    row, column = 2, 1
    expected = torch.cat(
        [f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)]
    )
    torch.testing.assert_close(table[row * 2 + column], expected)
    assert torch.unique(table, dim=0).shape[0] == 6


def test_swiglu_formula_and_size():
    layer = SwiGLU(12, 48).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    gate, value = layer.up(x).split(32, dim=-1)
    torch.testing.assert_close(layer(x), layer.down(gate * torch.sigmoid(gate) * value))
    assert layer.up.weight.numel() + layer.down.weight.numel() == 2 * 12 * 48


def test_fused_linear_is_its_blocks_side_by_side():
    fused, x = FusedLinear(4, 6, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    blocks = zip(fused.weight.chunk(3), fused.bias.chunk(3), strict=True)
    expected = torch.cat([F.linear(x, weight, bias) for weight, bias in blocks], dim=1)
    assert fused.fused_blocks == 3
    torch.testing.assert_close(fused(x), expected)


def test_condition_adds_time_and_label():
    condition = Condition(8, 3, num_features=4)
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    assert condition.label.weight.shape == (4, 8)
    difference = condition(t, y) - condition(t, None)
    expected = condition.label.weight[y] - condition.label.weight[3]
    torch.testing.assert_close(difference, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(16, 3), "num_heads 3"),
        (lambda: Condition(8, 0, num_features=5), "time features 5"),
        (lambda: layers.sincos_positions(2, 2, 6), "hidden_size 6"),
        (lambda: layers.rotary_angles(2, 2, 6), "head width 6"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(p):
    torch.manual_seed(0)
    dropout, n = Dropout(p), 2**20
    out = dropout(torch.ones(n))
    exact = round(p * 2**16) / 2**16
    deviation = (exact * (1 - exact) / n) ** 0.5
    assert abs((out == 0).double().mean() - exact) < 4 * deviation
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([1 / (1 - exact)]))


def test_dropout_draws_each_element_alone():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(4, 2**16)) != 0).double() - 0.5
    # Neighbours share a word of 64 bits: products of any two of the four must vanish as well.
    for lag in (1, 2, 3, 4):
        assert abs((kept[:, lag:] * kept[:, :-lag]).mean()) < 4 * 0.25 / 2**9


def test_dropout_follows_the_seed_and_the_layout():
    x = torch.randn(3, 5, 7, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    outs = []
    for _ in range(2):
        torch.manual_seed(1)
        outs.append(Dropout(0.25)(x))
    assert torch.equal(*outs)
    assert outs[0].stride() == x.stride()
    outs[0].sum().backward()
    torch.testing.assert_close(x.grad * x, outs[0])


def test_dropout_at_its_ends_and_in_evaluation():
    x = torch.randn(3, 5)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(3, 5))
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert Dropout(0.5)(x[:0]).shape == (0, 5)
    assert Dropout(0.5)(x.bfloat16()).dtype == torch.bfloat16


def test_dropout_compiles_in_one_graph():
    torch.manual_seed(0)
    dropout, x = Dropout(0.25), torch.ones(2**14)
    out = torch.compile(dropout, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))
    assert abs((out == 0).double().mean() - 0.25) < 4 * (0.25 * 0.75 / 2**14) ** 0.5
