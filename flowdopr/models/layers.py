"""Layers shared by the DiT and the U-Net.

Shapes: B batch, N tokens, D width, H heads, E = D / H head width, h x w token grid.

Every weight matrix belongs to a `Linear`, `Conv2d` or `nn.Embedding`, so that DoPr can read each
layer's input through forward hooks. A Linear with an attribute `fused_blocks` holds that many
matrices of equal size, stacked along the rows; optimizers treat them as separate matrices. A layer
with `left_to_gp` has no AP unless a rule of DoPr matches it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flowdopr.cpu import attention, dropout, linear


class EffectiveWeight:
    """A layer that computes with `effective_weight()`, a function of the trained `weight`.

    Every Linear and convolution of both models is one, so a change of `effective_weight` here
    reaches them all. Optimizers see and update `weight`. A submodule named `weight_map`, such as
    that of a PC layer, is the function; without one it is the identity.
    """

    weight: nn.Parameter
    _modules: dict[str, nn.Module | None]

    def effective_weight(self) -> Tensor:
        """The weight that `forward` uses, of the shape of `weight`."""
        weight_map = self._modules.get("weight_map")
        return self.weight if weight_map is None else weight_map(self.weight)


class Linear(EffectiveWeight, nn.Linear):
    """`nn.Linear` (..., d_in) -> (..., d_out) by `cpu.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.effective_weight(), self.bias)


class Conv2d(EffectiveWeight, nn.Conv2d):
    """`nn.Conv2d` (B, C, H, W) -> (B, C', H', W')."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


class FusedLinear(Linear):
    """`fused_blocks` linear maps of the same input, d_in -> d_out each, in one Linear."""

    def __init__(self, d_in: int, d_out: int, fused_blocks: int):
        super().__init__(d_in, d_out * fused_blocks)
        self.fused_blocks = fused_blocks


class Dropout(nn.Dropout):
    """`nn.Dropout` by `cpu.dropout`, which draws fewer random numbers on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Set weight and bias to zero, so that the layer outputs zero at the start of training."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift in one pass over x; shift and scale broadcast against x."""
    return torch.addcmul(shift, x, 1 + scale)


def gated_sum(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch in one pass; gate broadcasts against x."""
    return torch.addcmul(x, gate, branch)


def time_features(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines of t at dim/2 frequencies from 1 down to 1/max_period.

    Args:
        t: (B,) times; not rescaled, as in SiT, torchcfm and flow_matching.
        dim: even number of features.

    Returns:
        (B, dim): cosines, then sines.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


LayerT = TypeVar("LayerT", bound=nn.Module)


def leave_to_gp(layer: LayerT) -> LayerT:
    """`layer`, which then gets no AP unless a rule of DoPr decides about it. For layers that read
    one row per image: AP of these made Muon's images worse (docs/results/cifar16.md)."""
    layer.left_to_gp = True  # pyright: ignore[reportArgumentType]
    return layer


class Condition(nn.Module):
    """Embeds time and, when there are classes, the label: (B,), (B,) -> (B, dim).

    The label table has one row more than there are classes: row `num_classes` is the null label,
    for dropped labels and for the unconditional branch. y=None means the null label for all.
    """

    def __init__(self, dim: int, num_classes: int, num_features: int = 256):
        super().__init__()
        if num_features % 2:
            raise ValueError(f"the number of time features {num_features} must be even")
        self.num_features = num_features
        self.num_classes = num_classes
        self.time_1 = leave_to_gp(Linear(num_features, dim))
        self.time_2 = leave_to_gp(Linear(dim, dim))
        self.label = leave_to_gp(nn.Embedding(num_classes + 1, dim)) if num_classes else None

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        features = time_features(t, self.num_features).to(self.time_1.weight.dtype)
        embedding = self.time_2(F.silu(self.time_1(features)))
        if self.label is None:
            return embedding
        if y is None:
            y = torch.full(t.shape, self.num_classes, device=t.device)
        return embedding + self.label(y)


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D positions of a height x width grid, row by row: (height * width, dim).

    A quarter of the features each: sine and cosine of the column, sine and cosine of the row, at
    frequencies 10000^(-4k / dim) (the table of MAE, used by DiT and SiT).
    """
    if dim % 4:
        raise ValueError(f"hidden_size {dim} must be a multiple of 4 for 2-D sin-cos positions")
    quarter = dim // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def rotary_angles(height: int, width: int, dim: int) -> Tensor:
    """Angles of 2-D rotary positions: (height * width, dim / 2), rows first, then columns.

    Half of a head's feature pairs turn with the row, half with the column (axial RoPE, RoFormer
    arXiv 2104.09864 in two dimensions), so q k^T depends on differences of position alone.
    """
    if dim % 4:
        raise ValueError(f"head width {dim} must be a multiple of 4 for rope: change num_heads")
    quarter = dim // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    column = torch.arange(width, dtype=torch.float64).repeat(height)
    return torch.cat([row[:, None] * omega, column[:, None] * omega], dim=1).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each feature pair (i, i + E/2) of x (..., N, E) by angles (N, E/2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the dtype of its input, so that autocast uses the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D) -> (B, N, D).

    Args:
        dim: D.
        num_heads: H; divides D.
        qk_norm: RMS-normalise queries and keys per head (keeps logits bounded in long runs).
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.qkv = FusedLinear(dim, dim, 3)
        self.q_norm = RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """angles: (N, E/2) rotary angles, or None for no rotary positions."""
        q, k, v = rearrange(self.qkv(x), "b n (s h e) -> s b h n e", s=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = attention(q, k, v)
        return self.proj(rearrange(out, "b h n e -> b n (h e)"))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear on (..., D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """down(silu(gate) * value) on (..., D) (arXiv 2002.05202).

    `hidden` is the width of a plain MLP. This one uses two thirds of it, rounded up to a multiple
    of 8, which gives about the same number of parameters.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = 8 * math.ceil(hidden * 2 / 3 / 8)
        self.up = FusedLinear(dim, hidden, 2)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)
