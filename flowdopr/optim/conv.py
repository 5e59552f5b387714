"""Layer cases of the convolutions. Legend as in `layers`, with (B, C, H, W) inputs.

Full patches (Grosse and Martens, arXiv 1602.01407) are exact for any stride, padding, dilation and
number of groups. The others are cheaper: "offsets" builds the same patch Gram from products of
shifted images, "sua" shares one channel Sigma among the kernel's offsets and "sua-mean" adds what
it drops, the mean's cross terms between offsets. Convolutions of one, two and three axes alike.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flowdopr.optim.layers import Case, kept_rows, unravelled


def image_under(conv: _ConvNd, x: Tensor) -> Tensor:
    """What the kernel slides over, (B, C, *axes): `x` with a batch axis, changed by the layer's own
    method `kernel_input` where it has one."""
    x = x[None] if x.dim() == len(conv.kernel_size) + 1 else x
    kernel_input = getattr(conv, "kernel_input", None)
    return x if kernel_input is None else kernel_input(x)


def pad_input(x: Tensor, conv: _ConvNd) -> Tensor:
    """`image_under` the layer, padded as the layer pads it."""
    x = image_under(conv, x)
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


def patch_rows(x: Tensor, conv: _ConvNd, max_rows: int | None) -> tuple[Tensor, int]:
    """The kept patches the layer sees, (n, C * k * k), ordered as its weight, and how many there
    were; only kept ones are copied."""
    windows = pad_input(x, conv)
    axes = len(conv.kernel_size)
    for axis in range(axes):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        windows = windows.unfold(2 + axis, reach, conv.stride[axis])[..., :: conv.dilation[axis]]
    windows = windows.movedim(1, 1 + axes)  # (B, *positions, C, *kernel)
    grid = windows.shape[: 1 + axes]
    total = math.prod(grid)
    kept = kept_rows(total, max_rows, x.device)
    if kept is not None:
        windows = windows[unravelled(kept, grid)]
    side = math.prod(windows.shape[-1 - axes :])
    return windows.reshape(-1, side), total


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
        return (*super().key, *window, hasattr(conv, "kernel_input"))

    def rows(self, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        patches, total = patch_rows(x, self.conv, max_rows)
        return patches.reshape(-1, self.groups, self.blocks, self.side), total


class OffsetCase(PatchCase):
    """Full patches at stride 1 from shifted images: exact in the interior, and on a torus.

    Sigma at offsets (o, o') depends on o' - o alone up to borders, so (2k-1)^2 / 2 products of
    C x C stand for k^4: 13 for 81 in a 3x3 kernel. It is the patch Gram of the image in a frame of
    zeros as wide as the kernel, hence never indefinite. `max_rows` keeps whole images.
    """

    def __init__(self, conv: _ConvNd) -> None:
        super().__init__(conv, "offsets")
        if any(step != 1 for step in conv.stride):
            raise ValueError(f"mode 'offsets' needs stride 1, the layer has {conv.stride}")

    def accumulate(self, sums: Tensor, x: Tensor, max_rows: int | None) -> int:
        x = image_under(self.conv, x)
        total, pixels = x.shape[0], math.prod(x.shape[2:])
        images = None if max_rows is None else max(1, max_rows // max(1, pixels))
        kept = kept_rows(total, images, x.device)
        # Kept images stand for all: their products, of two images each, are scaled through them.
        x = (
            x.to(sums.dtype)
            if kept is None
            else x.index_select(0, kept).to(sums.dtype) * (total / len(kept)) ** 0.5
        )
        x = x.unflatten(1, (self.groups, -1)).transpose(0, 1).movedim(2, -1)  # (G, B, *axes, c)
        offsets = list(itertools.product(*(range(size) for size in self.conv.kernel_size)))
        blocks = sums.view(self.groups, -1, len(offsets), x.shape[-1], len(offsets))
        products: dict[tuple[int, ...], Tensor] = {}
        for (i, first), (j, second) in itertools.product(enumerate(offsets), repeat=2):
            lag = tuple(b - a for a, b in zip(first, second, strict=True))
            mirror = tuple(-step for step in lag)
            if mirror in products:
                blocks[:, :, i, :, j] += products[mirror].mT
                continue
            if lag not in products:
                products[lag] = self._lagged_product(x, lag)
            blocks[:, :, i, :, j] += products[lag]
        return total * pixels

    def _lagged_product(self, x: Tensor, lag: tuple[int, ...]) -> Tensor:
        """sum_p x_p x_{p + lag}^T of (G, B, *axes, c), as (G, c, c)."""
        shifted = x
        for axis, steps in enumerate(lag, start=2):
            shift, size = steps * self.conv.dilation[axis - 2], x.shape[axis]
            if self.conv.padding_mode == "circular":
                shifted = shifted.roll(-shift, axis)
                continue
            if abs(shift) >= size:
                return x.new_zeros(x.shape[0], x.shape[-1], x.shape[-1])
            x = x.narrow(axis, max(0, -shift), size - abs(shift))
            shifted = shifted.narrow(axis, max(0, shift), size - abs(shift))
        return x.flatten(1, -2).mT @ shifted.flatten(1, -2)


def channel_rows(x: Tensor, axes: int, max_rows: int | None) -> tuple[Tensor, int]:
    """The channel vectors of kept pixels of (B, C, *axes), (n, C), and how many there were; only
    kept ones are copied."""
    x = (x[None] if x.dim() == axes + 1 else x).flatten(2)
    total = x.shape[0] * x.shape[2]
    kept = kept_rows(total, max_rows, x.device)
    if kept is None:
        return x.transpose(1, 2).reshape(-1, x.shape[1]), total
    image, pixel = unravelled(kept, (x.shape[0], x.shape[2]))
    return x[image, :, pixel], total


class SharedOffsetsCase(Case):
    """SUA: z is the channel vector, one Sigma for all kernel offsets (arXiv 1602.01407).

    The kernel's offsets become rows of the gradient matrix. An image enlarged by nearest
    neighbour has the channel vectors it had.
    """

    kind = "channels"

    def __init__(self, conv: _ConvNd, mode: str = "sua", blocks: int = 1) -> None:
        self.axes, self.offsets = len(conv.kernel_size), math.prod(conv.kernel_size)
        super().__init__(mode, conv.groups, conv.in_channels // conv.groups, blocks)

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self.offsets if self.mode == "sua-mean" else 0)

    def rows(self, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        flat, total = channel_rows(x, self.axes, max_rows)
        return flat.reshape(-1, self.groups, self.blocks, self.side), total

    def matrix(self, grads: Sequence[Tensor]) -> Tensor:
        weight = grads[0].flatten(2).transpose(1, 2)  # (C_out, k*k, c)
        return weight.reshape(self.groups, -1, self.blocks, self.side).transpose(1, 2)

    def gradients(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        weight = like[0]
        offsets_first = matrix.transpose(1, 2).reshape(weight.shape[0], self.offsets, -1)
        product = offsets_first.transpose(1, 2).reshape(weight.shape)
        return [product.to(weight.dtype)]


class MeanOffsetsCase(SharedOffsetsCase):
    """SUA with the mean: Sigma = I (x) C + 1 1^T (x) mu mu^T over kernel offsets (x) channels.

    C is the centred channel covariance. The mean over offsets sees C + k^2 mu mu^T and the
    deviations from it see C, which is what Sherman and Morrison's formula comes to; any power and
    the Cholesky factor follow as well. Gathered with a homogeneous coordinate for mu. The stack
    to invert is (G, 2 B, s, s): B blocks for the mean over offsets, then B for the deviations.
    """

    def __init__(self, conv: _ConvNd, blocks: int = 1) -> None:
        super().__init__(conv, "sua-mean", blocks)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.groups, self.blocks, self.side + 1, self.side + 1)

    @property
    def transform_shape(self) -> tuple[int, int, int, int]:
        return (self.groups, 2 * self.blocks, self.side, self.side)

    def rows(self, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        rows, total = super().rows(x, max_rows)
        return nn.functional.pad(rows, (0, 1), value=1.0), total

    def stack(self, sigma: Tensor) -> Tensor:
        mu = sigma[..., -1:, :-1]
        outer = mu.mT * mu
        centred = sigma[..., :-1, :-1] - outer
        return torch.cat([centred + self.offsets * outer, centred], 1)

    def mean_eigenvalue(self, stack: Tensor) -> Tensor:
        means = stack.diagonal(dim1=-2, dim2=-1).mean(-1).unflatten(1, (2, -1)).mean(2)
        return ((means[:, 0] + (self.offsets - 1) * means[:, 1]) / self.offsets)[
            :, None, None, None
        ]

    def batch_key(self, grads: Sequence[Tensor]) -> tuple[object, ...]:
        like = grads[0]
        return (self.kind, self.mode, self.shape, like.shape, like.dtype, like.device)

    def multiply_many(
        self, many: Sequence[Sequence[Tensor]], stacks: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """One product for all K layers; channels-last weights have one copy, of K layers."""
        sides = (self.groups, -1, self.blocks, self.side, self.offsets)  # (G, r, B, s, k*k)
        matrices = [grads[0].reshape(sides).permute(0, 2, 1, 4, 3) for grads in many]
        matrix = torch.stack(matrices).to(stacks[0].dtype)  # (K, G, B, r, k*k, s)
        for_mean, for_rest = torch.stack(list(stacks)).chunk(2, dim=2)
        correction = matrix.mean(4) @ (for_mean - for_rest)
        product = (matrix.flatten(3, 4) @ for_rest).view(matrix.shape)
        product = product.add_(correction[:, :, :, :, None]).permute(0, 1, 3, 2, 5, 4)
        like = many[0][0]
        return [[weight.reshape(like.shape).to(like.dtype)] for weight in product.unbind(0)]

    def multiply(self, grads: Sequence[Tensor], stack: Tensor) -> list[Tensor]:
        return self.multiply_many([grads], [stack])[0]


class TransposedCase(SharedOffsetsCase):
    """A transposed convolution: z is the channel vector, W is (C_in, C_out * k * k). Exact."""

    kind = "transposed"

    @property
    def rows_first(self) -> bool:
        return False

    def matrix(self, grads: Sequence[Tensor]) -> Tensor:
        weight = grads[0].reshape(self.groups, self.blocks, self.side, -1)
        return weight.transpose(2, 3)

    def gradients(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        return [matrix.transpose(2, 3).reshape(like[0].shape).to(like[0].dtype)]
