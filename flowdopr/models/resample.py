"""Changes of resolution in the U-Net, and what makes them cheap.

Shapes: B batch, C channels, H x W image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class EnlargedConv2d(nn.Conv2d):
    """A 3x3 convolution of its input enlarged twice by nearest neighbour, (B, C, H, W) ->
    (B, C', 2 H, 2 W).

    Each output pixel sees only 2x2 different input pixels, so the kernel's rows and columns that
    fall on one pixel are added first: a transposed convolution of stride 2 with a 4x4 kernel,
    four products an output pixel in place of nine, and no enlarged image in memory. `enlarge`
    tells an optimizer that listens to inputs what the kernel slides over.
    """

    enlarge = 2
    # Of a smaller image, rearranging the larger kernel costs more than the products saved.
    FOLD_MIN_PIXELS = 64

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2] * input.shape[-1] < self.FOLD_MIN_PIXELS:
            return super().forward(F.interpolate(input, scale_factor=self.enlarge, mode="nearest"))
        # Sums of 2x2 neighbours with a border of zeros: 3x3 -> 4x4.
        folded = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
        kernel = folded.flip(2, 3).transpose(0, 1)  # a transposed convolution mirrors its kernel
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Twice the height and width by nearest neighbour, then a 3x3 convolution if asked."""

    def __init__(self, channels: int, *, conv: bool):
        super().__init__()
        self.conv = EnlargedConv2d(channels, channels) if conv else nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Downsample(nn.Module):
    """Half the height and width: a 3x3 convolution of stride 2, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, *, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)
