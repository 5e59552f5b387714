"""Layer cases of the convolutions. Legend as in `layers`, with (B, C, H, W) inputs.

Full patches (Grosse and Martens, arXiv 1602.01407) are exact for any stride, padding, dilation and
number of groups. The others are cheaper: "offsets" builds the same patch Gram from products of
shifted images, "sua" shares one channel Sigma among the kernel's offsets and "sua-mean" adds what
it drops, the mean's cross terms between offsets. Convolutions of one, two and three axes alike.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flowdopr.optim.layers import Case, strided_rows


def pad_input(x: Tensor, conv: _ConvNd) -> Tensor:
    """`x` (B, C, *axes) padded as the layer pads it, batch axis added where it lacks one."""
    if x.dim() == len(conv.kernel_size) + 1:
        x = x[None]
    pads: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            pads += [0, 0]
        else:
            pads += [int(conv.padding[axis])] * 2
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, pads, mode=mode) if any(pads) else x


def patch_rows(x: Tensor, conv: _ConvNd, max_rows: int | None) -> Tensor:
    """The patches the layer sees, (n, C * k * k), ordered as its weight; only kept ones copied."""
    windows = pad_input(x, conv)
    axes = len(conv.kernel_size)
    for axis in range(axes):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        windows = windows.unfold(2 + axis, reach, conv.stride[axis])[..., :: conv.dilation[axis]]
    windows = windows.movedim(1, 1 + axes)  # (B, *positions, C, *kernel)
    grid = windows.shape[: 1 + axes]
    total = math.prod(grid)
    step = strided_rows(total, max_rows)
    if step > 1:
        kept = torch.arange(0, total, step, device=x.device)
        windows = windows[torch.unravel_index(kept, grid)]
    return windows.reshape(-1, math.prod(windows.shape[-1 - axes :]))


class PatchCase(Case):
    """A convolution's full patches: z is the unfolded patch, one Sigma for each group."""

    kind = "patch"

    def __init__(self, conv: _ConvNd, mode: str = "full", blocks: int = 1) -> None:
        self.conv = conv
        dim = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
        super().__init__(mode, conv.groups, dim, blocks)

    @property
    def key(self) -> tuple[object, ...]:
        conv = self.conv
        window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        return (*super().key, *window)

    def rows(self, x: Tensor, max_rows: int | None) -> Tensor:
        patches = patch_rows(x, self.conv, max_rows)
        return patches.reshape(-1, self.groups, self.blocks, self.side)
