"""Models of other projects for benchmarks and tests; `flowdopr.models.foreign` maps their weights.

`SiT` is the network of SiT (arXiv 2401.08740) rebuilt from timm's parts; its head has twice the
channels and drops half of its outputs. `torchcfm_unet` builds torchcfm's own class.

Shapes: x (B, C, H, W), t (B,), y (B,) int64, c (B, D) condition.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from flowdopr.models.layers import sincos_positions, time_features


def shift_scale(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(
            6, dim=1
        )
        x = x + gate_1[:, None] * self.attn(shift_scale(self.norm1(x), shift_1, scale_1))
        return x + gate_2[:, None] * self.mlp(shift_scale(self.norm2(x), shift_2, scale_2))


class TimeEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_features(t, 256).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(shift_scale(self.norm_final(h), shift, scale))


class SiT(nn.Module):
    """SiT for square inputs, including the sin-cos positions and the null label's embedding; its
    weights have the names of the published ones, which are DiT's too."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int = 2,
    ):
        super().__init__()
        channels, side, _ = image_shape
        self.channels, self.grid, self.patch = channels, side // patch_size, patch_size
        self.x_embedder = PatchEmbed(side, patch_size, channels, hidden_size)
        table = sincos_positions(self.grid, self.grid, hidden_size)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c)
        p, side = self.patch, self.grid * self.patch
        h = h.reshape(len(x), self.grid, self.grid, p, p, 2 * self.channels)
        images = torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, side, side)
        return images[:, : self.channels]


TORCHCFM_CIFAR10: dict[str, Any] = {
    "channels": 128,
    "channel_multipliers": (1, 2, 2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (16,),
    "head_channels": 64,
    "dropout": 0.1,
    "scale_shift_norm": False,
}


def torchcfm_unet(**changes: Any) -> nn.Module:
    """torchcfm's U-Net, called with (t, x), with the settings of its CIFAR-10 example or `changes`.

    Only the folder of the U-Net is imported, because the package's `__init__` needs a dozen other
    packages.

    Raises:
        ValueError: if the package torchcfm is not installed.
    """
    spec = PathFinder.find_spec("torchcfm")
    if spec is None or spec.origin is None:
        raise ValueError("torchcfm is not installed: pip install --no-deps torchcfm")
    folder = Path(spec.origin).parent / "models"
    package = types.ModuleType("torchcfm_models")
    package.__path__ = [str(folder)]
    sys.modules["torchcfm_models"] = package
    wrapper = importlib.import_module("torchcfm_models.unet.unet").UNetModelWrapper
    settings: dict[str, Any] = {
        "dim": (3, 32, 32),
        "num_res_blocks": 2,
        "num_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_heads": 4,
        "num_head_channels": 64,
        "attention_resolutions": "16",
        "dropout": 0.1,
    }
    return wrapper(**settings | changes)
