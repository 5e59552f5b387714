"""Layer cases: what DoPr must know of a layer, and nothing else.

A case answers two questions: how a forward input becomes rows of z, and how the weight gradient
is seen as a matrix whose columns are the coordinates of z (DoPr, arXiv 2606.06418: Sigma is the
uncentred second moment of z, and the gradient is multiplied by its damped inverse from the right).

Legend: n rows of z, G independent groups, B diagonal blocks of one Sigma, s the side of a block,
r rows of the gradient matrix. Sigma is a stack (G, B, s, s); a full Sigma of a plain layer is
(1, 1, d, d) and a diagonal one (1, d, 1, 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowdopr.cpu import linear


def kept_rows(total: int, max_rows: int | None, device: torch.device) -> Tensor | None:
    """The numbers of `max_rows` of `total` evenly spread rows, ascending; None where all are kept.

    One of each of `max_rows` equal stretches, at a place that moves by the golden ratio from one to
    the next, so that no image column or token position is favoured when the width of the grid
    divides a stretch. The choice depends on the two numbers alone.
    """
    if max_rows is None or total <= max_rows:
        return None
    number = torch.arange(max_rows, device=device)
    place = number * 633 % 1024  # 633 / 1024 is the golden ratio; in integers, alike everywhere
    # In stretches of fewer than two rows all places are taken but the last, so that none repeats.
    reach = total if total >= 2 * max_rows else total - max_rows
    return (number * total * 1024 + place * reach) // (max_rows * 1024)


def unravelled(numbers: Tensor, grid: Sequence[int]) -> tuple[Tensor, ...]:
    """The positions in a grid of cells with these numbers, an axis each; torch's own
    `unravel_index` copies the grid from the host and waits."""
    axes = []
    for size in reversed(grid):
        axes.append(numbers % size)
        numbers = numbers // size
    return tuple(reversed(axes))


def add_gram(sums: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """Add weight * sum_i z_i z_i^T of `rows` (n, G, B, s) to `sums` (G, B, s, s), in place.

    Of a wide matrix only the lower triangle is made, in strips, and a third of the work saved:
    nothing reads the upper one.
    """
    groups, blocks, side, _ = sums.shape
    rows = rows.to(sums.dtype)
    if side == 1:
        sums.add_(rows.square().sum(0)[..., None], alpha=weight)
    elif groups * blocks == 1:
        flat = rows.reshape(-1, side)
        strips = 4 if side >= 128 else 1
        for i in range(strips):
            first, last = side * i // strips, side * (i + 1) // strips
            strip = sums[0, 0, first:last, :last]
            strip.addmm_(flat[:, first:last].mT, flat[:, :last], alpha=weight)
    else:
        stacked = rows.reshape(-1, groups * blocks, side).transpose(0, 1)
        sums.view(-1, side, side).baddbmm_(stacked.mT, stacked, alpha=weight)


class Case:
    """A layer whose weight is (d_out, ...) with the coordinates of z in the trailing axes."""

    kind = "matrix"
    takes_bias = False

    def __init__(self, mode: str, groups: int, dim: int, blocks: int = 1) -> None:
        if dim % blocks:
            raise ValueError(f"{blocks} blocks do not divide a layer input of {dim} coordinates")
        self.mode, self.groups, self.blocks, self.side = mode, groups, blocks, dim // blocks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the gathered sums, (G, B, s, s)."""
        return (self.groups, self.blocks, self.side, self.side)

    @property
    def rows_first(self) -> bool:
        """Whether the weight's first axis is all rows of one gradient matrix."""
        return self.groups == 1

    @property
    def transform_shape(self) -> tuple[int, int, int, int]:
        """Shape of the matrices to invert, and of their inverses."""
        return (self.groups, self.blocks, self.side, self.side)

    @property
    def key(self) -> tuple[object, ...]:
        """Two modules with equal keys turn one input into the same Sigma."""
        return (self.kind, self.mode, *self.shape)

    def describe(self) -> str:
        """The mode as the role table prints it."""
        cut = self.blocks > 1 and self.mode != "diagonal"
        return f"{self.mode} {self.blocks}x{self.side}" if cut else self.mode

    def rows(self, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        """The kept rows of z of the input `x`, (n, G, B, s), and how many there were."""
        raise TypeError(f"{type(self).__name__} gathers without rows")

    def accumulate(self, sums: Tensor, x: Tensor, max_rows: int | None) -> int:
        """Add the second-moment sum of the input `x` to `sums`; returns the number of rows.

        Kept rows stand for all, so that forwards of unequal size pool by their sizes.
        """
        rows, total = self.rows(x, max_rows)
        add_gram(sums, rows, total / max(1, rows.shape[0]))
        return total

    def gather(self, sums: Tensor, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        """The sums with those of the input `x`, in place where it can be, and its rows."""
        return sums, self.accumulate(sums, x, max_rows)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """The sums of two windows, in place of the first where it can be."""
        return first.add_(second)

    def trace(self, sums: Tensor) -> Tensor:
        """sum_i |z_i|^2, which is finite if all of z is."""
        return sums.diagonal(dim1=-2, dim2=-1).sum()

    def stack(self, sigma: Tensor) -> Tensor:
        """The symmetric matrices to invert, from the averaged sums."""
        return sigma

    def mean_eigenvalue(self, stack: Tensor) -> Tensor:
        """tr(Sigma) / d of each group, (G, 1, 1, 1)."""
        return stack.diagonal(dim1=-2, dim2=-1).mean((-2, -1))[:, None, None, None]

    def matrix(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients of the layer's parameters as (G, B, r, s)."""
        return grads[0].reshape(self.groups, -1, self.blocks, self.side).transpose(1, 2)

    def gradients(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `matrix`: (G, B, r, s) back to the shapes and dtypes of `like`."""
        return [matrix.transpose(1, 2).reshape(like[0].shape).to(like[0].dtype)]

    def multiply(self, grads: Sequence[Tensor], stack: Tensor) -> list[Tensor]:
        """The gradient matrix times `stack` from the right, as gradients again."""
        matrix = self.matrix(grads).to(stack.dtype)
        if self.side == 1:
            product = matrix * stack
        elif self.groups * self.blocks == 1:
            product = linear(matrix[0, 0], stack[0, 0].mT)[None, None]
        else:
            product = matrix @ stack
        return self.gradients(product, grads)

    def batch_key(self, grads: Sequence[Tensor]) -> tuple[object, ...] | None:
        """Layers with equal keys may share one `multiply_many`; None where nothing is gained."""
        return None

    def multiply_many(
        self, many: Sequence[Sequence[Tensor]], stacks: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """`multiply` for the gradients of several layers whose cases have equal `batch_key`s."""
        return [self.multiply(grads, stack) for grads, stack in zip(many, stacks, strict=True)]


def vector_rows(x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
    """The kept vectors of (..., d), (n, d), and how many there were."""
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    kept = kept_rows(flat.shape[0], max_rows, x.device)
    return flat if kept is None else flat.index_select(0, kept), flat.shape[0]


class LinearCase(Case):
    """`nn.Linear`: all leading axes are pooled ("expand")."""

    kind = "linear"

    def rows(self, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        flat, total = vector_rows(x, max_rows)
        return flat.reshape(-1, self.groups, self.blocks, self.side), total


class LinearBiasCase(LinearCase):
    """`nn.Linear` with the homogeneous coordinate: z is (z, 1), weight and bias are one matrix.

    Without damping and unit scale the same as centring: M_W = (G_W - g_b mu^T) C^-1 and
    M_b = g_b - M_W mu.
    """

    kind = "linear+bias"
    takes_bias = True

    def describe(self) -> str:
        return f"{super().describe()}+bias"

    def rows(self, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        flat, total = vector_rows(x, max_rows)
        return nn.functional.pad(flat, (0, 1), value=1.0).reshape(-1, 1, 1, self.side), total

    def matrix(self, grads: Sequence[Tensor]) -> Tensor:
        weight, bias = grads
        return torch.cat([weight, bias[:, None]], 1)[None, None]

    def gradients(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        weight, bias = like
        flat = matrix[0, 0]
        return [flat[:, :-1].to(weight.dtype).contiguous(), flat[:, -1].to(bias.dtype)]


class EmbeddingCase(Case):
    """`nn.Embedding`: z is one-hot and Sigma = diag(p), so M_v = G_v / (V p_v + gamma).

    A row that was never looked up has no gradient and stays where it is. Every index counts:
    `max_rows` does not apply, and neither does a `padding_idx`, whose gradient is zero.
    """

    kind = "embedding"

    def __init__(self, num_embeddings: int) -> None:
        super().__init__("diagonal", 1, num_embeddings, num_embeddings)

    @property
    def rows_first(self) -> bool:
        return False

    def accumulate(self, sums: Tensor, x: Tensor, max_rows: int | None) -> int:
        index = x.reshape(-1)
        ones = torch.ones_like(index, dtype=sums.dtype)
        sums.view(-1).index_add_(0, index, ones)
        return index.numel()

    def matrix(self, grads: Sequence[Tensor]) -> Tensor:
        return grads[0][None, :, :, None]

    def gradients(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        return [matrix[0, :, :, 0].to(like[0].dtype)]


def number_of_blocks(dim: int, max_side: int) -> int:
    """The smallest number of equal blocks of `dim` coordinates with sides of at most `max_side`;
    where that leaves less than a quarter of it, as in a prime `dim`, up to four times will do."""
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    fewest = next(n for n in divisors if dim // n <= max_side)
    if dim // fewest < max_side / 4:
        return next(n for n in divisors if dim // n <= 4 * max_side)
    return fewest
