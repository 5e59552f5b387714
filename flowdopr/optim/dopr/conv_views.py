"""Views of convolutions, of one, two or three axes. See `views` for the layout and the letters.

    PatchView          z is the patch that the kernel covers: exact (Grosse and Martens,
                       arXiv 1602.01407), for any stride, padding, dilation and number of groups
    ChannelView        z is the channel vector of a pixel, one Sigma for all offsets of the kernel
                       ("SUA", from the same paper)
    MeanChannelView    the same with the cross terms of the mean between offsets, which SUA drops
    TransposedView     a transposed convolution: z is the channel vector, and this is exact

Inputs are (B, C, *axes), or (C, *axes) without a batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flowdopr.cpu import product
from flowdopr.optim.dopr.views import LayerView, Sample, unravelled


def padded_input(x: Tensor, conv: _ConvNd) -> Tensor:
    """What the kernel slides over, (B, C, *axes): `x` padded as the layer pads it.

    A layer that changes its input before the kernel slides over it, as the U-Net's upsampling
    convolution does, says how by a method `kernel_input`.
    """
    x = x[None] if x.dim() == len(conv.kernel_size) + 1 else x
    kernel_input = getattr(conv, "kernel_input", None)
    x = x if kernel_input is None else kernel_input(x)
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


def patch_rows(x: Tensor, conv: _ConvNd, sample: Sample) -> tuple[Tensor, int]:
    """The kept patches that the layer sees, (n, C * k * k) in the order of its weight, and how many
    there are in all; only kept ones are copied."""
    windows = padded_input(x, conv)
    axes = len(conv.kernel_size)
    for axis in range(axes):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        windows = windows.unfold(2 + axis, reach, conv.stride[axis])[..., :: conv.dilation[axis]]
    windows = windows.movedim(1, 1 + axes)  # (B, *positions, C, *kernel)
    grid = windows.shape[: 1 + axes]
    total = math.prod(grid)
    kept = sample.rows(total, x.device)
    if kept is not None:
        windows = windows[unravelled(kept, grid)]
    side = math.prod(windows.shape[-1 - axes :])
    return windows.reshape(-1, side), total


def channel_rows(x: Tensor, axes: int, sample: Sample) -> tuple[Tensor, int]:
    """The channel vectors of kept pixels of (B, C, *axes), (n, C), and how many there are in all;
    only kept ones are copied."""
    x = (x[None] if x.dim() == axes + 1 else x).flatten(2)
    total = x.shape[0] * x.shape[2]
    kept = sample.rows(total, x.device)
    if kept is None:
        return x.transpose(1, 2).reshape(-1, x.shape[1]), total
    image, pixel = unravelled(kept, (x.shape[0], x.shape[2]))
    return x[image, :, pixel], total


class PatchView(LayerView):
    """A convolution's patches, one Sigma (C / g * k * k square) for each group."""

    def __init__(self, conv: _ConvNd, mode: str = "full", blocks: int = 1) -> None:
        self.conv = conv
        dim = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
        super().__init__(mode, conv.groups, dim, blocks)

    @property
    def key(self) -> tuple[object, ...]:
        conv = self.conv
        window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        return (*super().key, *window, type(conv) if hasattr(conv, "kernel_input") else None)

    def rows(self, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
        patches, total = patch_rows(x, self.conv, sample)
        return patches.reshape(-1, self.groups, self.blocks, self.side), total


class ChannelView(LayerView):
    """SUA: the offsets of the kernel become rows of G.

    The channel vectors are those of the module's own input: a layer's `kernel_input` may repeat
    pixels, which leaves their distribution unchanged, but not alter them.
    """

    def __init__(self, conv: _ConvNd, mode: str = "sua", blocks: int = 1) -> None:
        self.axes, self.offsets = len(conv.kernel_size), math.prod(conv.kernel_size)
        super().__init__(mode, conv.groups, conv.in_channels // conv.groups, blocks)

    def rows(self, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
        flat, total = channel_rows(x, self.axes, sample)
        return flat.reshape(-1, self.groups, self.blocks, self.side), total

    def matrix(self, grad: Tensor) -> Tensor:
        return super().matrix(grad.flatten(2).transpose(1, 2))  # (C_out, k * k, C / g)

    def gradient(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        offsets_first = super().gradient(matrix, (shape[0], self.offsets, -1))
        return offsets_first.transpose(1, 2).reshape(shape)


class MeanChannelView(ChannelView):
    """SUA with the mean: Sigma = I (x) C + 1 1^T (x) mu mu^T over kernel offsets (x) channels.

    C is the centred covariance of the channels. The mean of G over the offsets is multiplied by a
    function of C + k^2 mu mu^T, the deviations from that mean by the same function of C; for the
    inverse this is Sherman and Morrison's formula. The sums have one more coordinate of ones, for
    mu. The matrices to invert are (g, 2 b, s, s): b for the mean over the offsets, then b for the
    deviations.
    """

    def __init__(self, conv: _ConvNd, blocks: int = 1) -> None:
        super().__init__(conv, "sua-mean", blocks)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.groups, self.blocks, self.side + 1, self.side + 1)

    @property
    def transform_shape(self) -> tuple[int, int, int, int]:
        return (self.groups, 2 * self.blocks, self.side, self.side)

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self.offsets)

    def rows(self, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
        rows, total = super().rows(x, sample)
        return nn.functional.pad(rows, (0, 1), value=1.0), total

    def stack(self, sigma: Tensor) -> Tensor:
        mu = sigma[..., -1:, :-1]
        outer = mu.mT * mu
        centred = sigma[..., :-1, :-1] - outer
        return torch.cat([centred + self.offsets * outer, centred], 1)

    def mean_eigenvalue(self, stack: Tensor) -> Tensor:
        means = stack.diagonal(dim1=-2, dim2=-1).mean(-1).unflatten(1, (2, -1)).mean(2)
        mean = (means[:, 0] + (self.offsets - 1) * means[:, 1]) / self.offsets
        return mean[:, None, None, None]

    def multiply(self, grad: Tensor, transform: Tensor) -> Tensor:
        return self.multiply_many([grad], [transform])[0]

    def batch_key(self, grad: Tensor) -> tuple[object, ...]:
        return (*self.key, grad.shape, grad.dtype, grad.device)

    def multiply_many(self, grads: Sequence[Tensor], transforms: Sequence[Tensor]) -> list[Tensor]:
        sides = (self.groups, -1, self.blocks, self.side, self.offsets)  # (g, r, b, s, k * k)
        # The offsets stand before the coordinates, which channels-last weights have already:
        # stacking the K layers is their only copy.
        matrices = [grad.reshape(sides).permute(0, 2, 1, 4, 3) for grad in grads]
        matrix = torch.stack(matrices).to(transforms[0].dtype)  # (K, g, b, r, k * k, s)
        for_mean, for_rest = torch.stack(list(transforms)).chunk(2, dim=2)
        correction = matrix.mean(4) @ (for_mean - for_rest)
        found = product(matrix.flatten(3, 4), for_rest).view(matrix.shape)
        found = found.add_(correction[:, :, :, :, None]).permute(0, 1, 3, 2, 5, 4)
        like = grads[0]
        return [weight.reshape(like.shape).to(like.dtype) for weight in found.unbind(0)]


class TransposedView(ChannelView):
    """A transposed convolution, whose weight is (C_in, C_out / g, k, k)."""

    free_axis = None

    def matrix(self, grad: Tensor) -> Tensor:
        return grad.reshape(self.groups, self.blocks, self.side, -1).transpose(2, 3)

    def gradient(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.transpose(2, 3).reshape(shape)
