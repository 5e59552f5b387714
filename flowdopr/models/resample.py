"""Changes of resolution in the U-Net.

Shapes: B batch, C channels, H x W image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flowdopr.cpu import upsampled_conv2d
from flowdopr.models.layers import Conv2d


class UpsampledConv2d(Conv2d):
    """A 3x3 convolution of its input enlarged twice by nearest neighbour, (B, C, H, W) ->
    (B, C', 2 H, 2 W)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=1)

    def kernel_input(self, input: Tensor) -> Tensor:
        """The image that the kernel is applied to, from which DoPr extracts the patches."""
        return F.interpolate(input, scale_factor=2, mode="nearest")

    def forward(self, input: Tensor) -> Tensor:
        return upsampled_conv2d(input, self.effective_weight(), self.bias)


class Upsample(nn.Module):
    """Twice the height and width by nearest neighbour, then a 3x3 convolution if asked."""

    def __init__(self, channels: int, *, conv: bool):
        super().__init__()
        self.conv = UpsampledConv2d(channels, channels) if conv else nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Downsample(nn.Module):
    """Half the height and width: a 3x3 convolution of stride 2, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, *, conv: bool):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)
