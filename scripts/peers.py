"""Models of other projects for benchmarks and tests, and functions that copy their weights to ours.

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
from einops import rearrange
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from flowdopr.models import DiT, UNet
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
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.ada(c).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attn(shift_scale(self.norm1(x), shift_1, scale_1))
        return x + gate_2[:, None] * self.mlp(shift_scale(self.norm2(x), shift_2, scale_2))


class SiT(nn.Module):
    """SiT for square inputs, including the sin-cos positions and the null label's embedding."""

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
        self.patches = PatchEmbed(side, patch_size, channels, hidden_size)
        table = sincos_positions(self.grid, self.grid, hidden_size)
        self.positions = nn.Parameter(table, requires_grad=False)
        self.time = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.label = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, patch_size**2 * 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x) + self.positions
        c = self.time(time_features(t, 256).to(x.dtype)) + self.label(y)
        for block in self.blocks:
            h = block(h, c)
        h = self.linear(shift_scale(self.norm(h), *self.ada(c).chunk(2, dim=1)))
        p, side = self.patch, self.grid * self.patch
        h = h.reshape(len(x), self.grid, self.grid, p, p, 2 * self.channels)
        images = torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, side, side)
        return images[:, : self.channels]


@torch.no_grad()
def copy_layer(ours: Any, theirs: Any, rows: Tensor | None = None) -> None:
    """Copy weight and bias, reshaped to ours; `rows` (optional) reorders or selects outputs."""
    for name in ("weight", "bias"):
        value = getattr(theirs, name)
        value = value if rows is None else value[rows]
        getattr(ours, name).copy_(value.reshape(getattr(ours, name).shape))


def load_sit(dit: DiT, sit: SiT) -> None:
    """Give `dit` the weights of `sit`, without the half of the head that SiT does not use."""
    copy_layer(dit.embed, sit.patches.proj)
    copy_layer(dit.condition.time_1, sit.time[0])
    copy_layer(dit.condition.time_2, sit.time[2])
    dit.condition.label.load_state_dict(sit.label.state_dict())
    for ours, theirs in zip(dit.blocks, sit.blocks, strict=True):
        copy_layer(ours.attention.qkv, theirs.attn.qkv)
        copy_layer(ours.attention.proj, theirs.attn.proj)
        copy_layer(ours.mlp.up, theirs.mlp.fc1)
        copy_layer(ours.mlp.down, theirs.mlp.fc2)
        copy_layer(ours.modulation, theirs.ada[1])
    copy_layer(dit.final_modulation, sit.ada[1])
    rows = torch.arange(sit.patch**2 * 2 * sit.channels).reshape(-1, 2 * sit.channels)
    # Channels are the last axis of the outputs of SiT's head, and the first of ours.
    copy_layer(dit.final, sit.linear, rows[:, : sit.channels].T.flatten())


TORCHCFM_CIFAR10: dict[str, Any] = {
    "channels": 128,
    "channel_multipliers": (1, 2, 2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (16,),
    "head_channels": 64,
    "dropout": 0.1,
    "scale_shift_norm": False,
}


def torchcfm_unet() -> nn.Module:
    """torchcfm's U-Net with the settings of its CIFAR-10 example; called with (t, x).

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
    return wrapper(
        dim=(3, 32, 32),
        num_res_blocks=2,
        num_channels=128,
        channel_mult=[1, 2, 2, 2],
        num_heads=4,
        num_head_channels=64,
        attention_resolutions="16",
        dropout=0.1,
    )


def load_torchcfm(unet: UNet, peer: Any) -> None:
    """Give `unet` (TORCHCFM_CIFAR10) the weights of torchcfm's U-Net."""
    copy_layer(unet.condition.time_1, peer.time_embed[0])
    copy_layer(unet.condition.time_2, peer.time_embed[2])
    copy_layer(unet.stem, peer.input_blocks[0][0])
    stages = [*unet.down, unet.middle, *unet.up]
    their_stages = [*peer.input_blocks[1:], peer.middle_block, *peer.output_blocks]
    for stage, their_stage in zip(stages, their_stages, strict=True):
        for ours, theirs in zip(stage, their_stage, strict=True):
            copy_block(ours, theirs)
    copy_layer(unet.head_norm, peer.out[0])
    copy_layer(unet.head, peer.out[2])


def copy_block(ours: Any, theirs: Any) -> None:
    """Copy the weights of one residual, attention or resampling block of torchcfm."""
    if hasattr(theirs, "in_layers"):
        copy_layer(ours.norm_1, theirs.in_layers[0])
        copy_layer(ours.conv_1, theirs.in_layers[2])
        copy_layer(ours.modulation, theirs.emb_layers[1])
        copy_layer(ours.norm_2, theirs.out_layers[0])
        copy_layer(ours.conv_2, theirs.out_layers[3])
        if isinstance(ours.skip, nn.Conv2d):
            copy_layer(ours.skip, theirs.skip_connection)
    elif hasattr(theirs, "qkv"):
        heads = ours.attention.num_heads
        rows = torch.arange(theirs.qkv.weight.shape[0])
        # torchcfm splits the output into heads before queries, keys and values; we do so after.
        rows = rearrange(rows, "(h s e) -> (s h e)", h=heads, s=3)
        copy_layer(ours.norm, theirs.norm)
        copy_layer(ours.attention.qkv, theirs.qkv, rows)
        copy_layer(ours.attention.proj, theirs.proj_out)
    else:
        copy_layer(
            getattr(ours, "conv", None) or ours.op, getattr(theirs, "conv", None) or theirs.op
        )
