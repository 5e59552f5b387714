"""U-Net of the ADM family: residual blocks with FiLM, attention at chosen resolutions.

Dhariwal and Nichol, arXiv 2105.05233, as used by torchcfm and flow_matching.

Shapes: B batch, C channels, H x W image; N = HW tokens inside attention.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flowdopr.models.layers import (
    Attention,
    Condition,
    Conv2d,
    Dropout,
    FusedLinear,
    leave_to_gp,
    modulate,
    zero_,
)
from flowdopr.models.resample import Downsample, Upsample


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in ADM; fewer in narrow layers, so that a group keeps four channels or more."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


class ResBlock(nn.Module):
    """x + conv(film(conv(x), condition)), (B, C_in, H, W) -> (B, C_out, H', W').

    Args:
        cond_dim: width of the condition.
        scale_shift: FiLM (scale and shift after the second norm); otherwise the condition is added.
        resample: None, "up" or "down": change of resolution inside the block, without weights.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        cond_dim: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_1 = group_norm(c_in)
        self.conv_1 = Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = leave_to_gp(FusedLinear(cond_dim, c_out, 2 if scale_shift else 1))
        self.norm_2 = group_norm(c_out)
        self.dropout = Dropout(dropout)
        self.conv_2 = Conv2d(c_out, c_out, 3, padding=1)
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.resample = nn.Identity()
        if resample:
            self.resample = {"up": Upsample, "down": Downsample}[resample](c_in, conv=False)
        zero_(self.conv_2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, C_in, H, W), c (B, cond_dim) the activated condition."""
        h = self.conv_1(self.resample(F.silu(self.norm_1(x))))
        film = self.modulation(c)[:, :, None, None]
        if self.scale_shift:
            scale, shift = film.chunk(2, dim=1)
            h = modulate(self.norm_2(h), shift, scale)
        else:
            h = self.norm_2(h + film)
        return self.skip(self.resample(x)) + self.conv_2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all pixels, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = Attention(channels, num_heads)
        zero_(self.attention.proj)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.ModuleList):
    """Layers applied one after the other; residual blocks also get the condition."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, c) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Velocity model `model(x, t, y)` on images.

        model = UNet((3, 32, 32), num_classes=10, channels=128, channel_multipliers=(1, 2, 2, 2))
        velocity = model(x, t, y)  # x (B, 3, 32, 32), t (B,), y (B,) or None

    Args:
        image_shape: (C, H, W); H and W must halve evenly at each level but the last.
        num_classes: 0 for an unconditional model; else label `num_classes` is the null label.
        channels: width at multiplier 1; a multiple of 4.
        channel_multipliers: one a level, finest first.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: heights of the feature maps that get attention; the middle always.
        num_heads: attention heads; unused where `head_channels` is given.
        head_channels: channels a head.
        dropout: inside residual blocks.
        scale_shift_norm: FiLM instead of an added condition.
        resample: "conv", "pool" (no weights) or "resblock" changes the resolution.

    Weights are channels-last; FSDP2 wants `model.to(memory_format=torch.contiguous_format)` first.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        num_heads: int = 4,
        head_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resample: Literal["conv", "pool", "resblock"] = "conv",
    ):
        super().__init__()
        _check(image_shape, channels, channel_multipliers, attention_resolutions)
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.cond_dim = 4 * channels
        self.block_options = {"dropout": dropout, "scale_shift": scale_shift_norm}
        self.resample = resample
        self.heads = num_heads, head_channels
        widths = [channels * multiplier for multiplier in channel_multipliers]
        attention = [
            image_shape[1] >> level in attention_resolutions for level in range(len(widths))
        ]
        self.condition = Condition(self.cond_dim, num_classes, num_features=channels)
        self.stem = Conv2d(image_shape[0], widths[0], 3, padding=1)
        down, skips = self._make_down(widths, attention, num_res_blocks)
        self.down = nn.ModuleList(down)
        self.middle = Stage(
            [
                self._block(widths[-1], widths[-1]),
                self._attention(widths[-1]),
                self._block(widths[-1], widths[-1]),
            ]
        )
        self.up = nn.ModuleList(self._make_up(widths, attention, num_res_blocks, skips))
        self.head_norm = group_norm(widths[0])
        self.head = Conv2d(widths[0], image_shape[0], 3, padding=1)
        zero_(self.head)
        # Channels-last weights, like the feature maps, save a copy of each weight and gradient.
        self.to(memory_format=torch.channels_last)

    def _block(
        self, c_in: int, c_out: int, resample: Literal["up", "down"] | None = None
    ) -> ResBlock:
        return ResBlock(c_in, c_out, self.cond_dim, resample=resample, **self.block_options)

    def _attention(self, channels: int) -> AttentionBlock:
        num_heads, head_channels = self.heads
        if head_channels and channels % head_channels:
            raise ValueError(f"model.head_channels {head_channels} does not divide {channels}")
        return AttentionBlock(channels, channels // head_channels if head_channels else num_heads)

    def _change(self, width: int, direction: Literal["up", "down"]) -> nn.Module:
        if self.resample == "resblock":
            return self._block(width, width, direction)
        step = {"up": Upsample, "down": Downsample}[direction]
        return step(width, conv=self.resample == "conv")

    def _make_down(
        self, widths: list[int], attention: list[bool], num_res_blocks: int
    ) -> tuple[list[Stage], list[int]]:
        """Stages of the way down, and the channels of the skip connections, the stem's first."""
        stages, skips = [], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                stage = Stage([self._block(skips[-1], width)])
                if attention[level]:
                    stage.append(self._attention(width))
                stages.append(stage)
                skips.append(width)
            if level < len(widths) - 1:
                stages.append(Stage([self._change(width, "down")]))
                skips.append(width)
        return stages, skips

    def _make_up(
        self, widths: list[int], attention: list[bool], num_res_blocks: int, skips: list[int]
    ) -> list[Stage]:
        """Stages of the way up; each first concatenates the newest unused skip connection."""
        stages, skips, c_in = [], list(skips), widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                stage = Stage([self._block(c_in + skips.pop(), width)])
                if attention[level]:
                    stage.append(self._attention(width))
                stages.append(stage)
                c_in = width
            if level:
                stages[-1].append(self._change(width, "up"))
        return stages

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) int64 or None -> velocity (B, C, H, W)."""
        # Every block reads the same activated condition: activate it once.
        c = F.silu(self.condition(t, y))
        # Channels-last feature maps save reordering copies in the convolutions and attention.
        h = self.stem(x).contiguous(memory_format=torch.channels_last)
        skips = [h]
        for stage in self.down:
            h = stage(h, c)
            skips.append(h)
        h = self.middle(h, c)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), c)
        return self.head(F.silu(self.head_norm(h))).contiguous()


def _check(
    image_shape: tuple[int, int, int],
    channels: int,
    multipliers: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
) -> None:
    _, height, width = image_shape
    levels = len(multipliers)
    if channels % 4:
        raise ValueError(f"model.channels {channels} must be a multiple of 4")
    if levels == 0 or height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise ValueError(
            f"model.channel_multipliers has {levels} levels, but {height} x {width} images "
            f"do not halve evenly {levels - 1} times: use another number of levels or image size"
        )
    heights = [height >> level for level in range(levels)]
    for resolution in attention_resolutions:
        if resolution not in heights:
            raise ValueError(
                f"model.attention_resolutions has {resolution}, but the levels have heights "
                f"{', '.join(map(str, heights))}: choose among these"
            )
