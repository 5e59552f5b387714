"""How DoPr sees a layer: its input as rows of z, its weight gradient as a matrix over the same
coordinates.

For a layer y = W z with output gradients delta the weight gradient is G = sum_i delta_i z_i^T.
DoPr (arXiv 2606.06418) multiplies G from the right by a function of Sigma = (1/n) sum_i z_i z_i^T.
A view gives both in one layout:

    rows(x)        the input of a forward       -> z, (n, g, b, s)
    matrix(grad)   the gradient of the weight   -> G, (g, b, r, s)

    >>> linear, x = nn.Linear(6, 2), torch.randn(4, 5, 6)     # a batch of 4 with 5 tokens each
    >>> view = LinearView("blocks", 1, dim=6, blocks=3)       # Sigma in 3 blocks of 2 coordinates
    >>> z, n = view.rows(x, Sample())
    >>> tuple(z.shape), n
    ((20, 1, 3, 2), 20)
    >>> view.shape                                            # of Sigma
    (1, 3, 2, 2)
    >>> linear(x).sum().backward()
    >>> tuple(view.matrix(linear.weight.grad).shape)
    (1, 3, 2, 2)

Letters: n rows of z; g independent groups, each with a Sigma of its own (a convolution's); b
diagonal blocks that a Sigma is cut into; s coordinates in a block; r rows of the gradient matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdopr.cpu import add_product, product

UNIT = 2**20
WIDE, STRIPS = 128, 4  # side from which a sum of z z^T is made in strips, and their number
GOLDEN = 648055  # of UNIT, the golden ratio; in integers, alike everywhere


@dataclass(frozen=True)
class Sample:
    """Which rows of z a forward contributes: the same on every process and after a resume.

    limit: at most so many of them; None: every one.
    turn: number of the refresh.
    """

    limit: int | None = None
    turn: int = 0

    def rows(self, total: int, device: torch.device) -> Tensor | None:
        """Indices of `limit` of `total` rows, (limit,); None where all are kept.

        One row is taken from each of `limit` equal stretches, at a place that moves by the golden
        ratio from one stretch to the next, so that no image column or token position is favoured
        when the width of the grid divides a stretch. All move on by the golden ratio of `total`
        from one refresh to the next, so that the average sees every row equally often.
        """
        if self.limit is None or total <= self.limit:
            return None
        numbers = torch.arange(self.limit + 1, device=device)
        edges = numbers * total // self.limit
        places = numbers[:-1] * GOLDEN % UNIT
        shift = self.turn * GOLDEN % UNIT * total // UNIT
        return (edges[:-1] + edges.diff() * places // UNIT + shift) % total


def unravelled(numbers: Tensor, grid: Sequence[int]) -> tuple[Tensor, ...]:
    """`torch.unravel_index`, which would copy `grid` from the host and wait for it."""
    axes = []
    for size in reversed(grid):
        axes.append(numbers % size)
        numbers = numbers // size
    return tuple(reversed(axes))


def add_second_moment(sums: Tensor, rows: Tensor, weight: float) -> None:
    """Add weight * sum_i z_i z_i^T of `rows` (n, g, b, s) to `sums` (g, b, s, s), in place.

    Wide matrices get their lower triangles only, in strips, which saves a third of the work;
    nothing reads the upper triangles.
    """
    side = sums.shape[-1]
    rows = rows.to(sums.dtype)
    if side == 1:
        sums.add_(rows.square().sum(0)[..., None], alpha=weight)
        return
    stacked = rows.flatten(1, 2).transpose(0, 1)
    if side < WIDE:
        sums.view(-1, side, side).baddbmm_(stacked.mT, stacked, alpha=weight)
        return
    for of_block, block in zip(sums.view(-1, side, side), stacked, strict=True):
        columns = block.contiguous().mT.contiguous()  # two copies: one would stride through memory
        for i in range(STRIPS):
            first, last = side * i // STRIPS, side * (i + 1) // STRIPS
            strip = of_block[first:last, :last]
            add_product(strip, columns[first:last], columns[:last].mT, weight)


class LayerView:
    """The base of all views: a weight (d_out, ...) with the coordinates of z in its trailing axes.

    mode: as the table of roles names it. groups, blocks, side: g, b, s above.
    free_axis: the axis of the weight along which a process that holds a part of it can precondition
        that part alone, as no coordinates of z lie there; None without one.
    """

    free_axis: int | None = 0
    argument: tuple[int, str] = (0, "input")
    """Place and name of the argument of the module's forward that has z."""

    def __init__(self, mode: str, groups: int, dim: int, blocks: int = 1) -> None:
        self.mode, self.groups, self.blocks, self.side = mode, groups, blocks, dim // blocks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the sums of z z^T."""
        return (self.groups, self.blocks, self.side, self.side)

    @property
    def transform_shape(self) -> tuple[int, int, int, int]:
        """Shape of the matrices that are inverted, and of T."""
        return self.shape

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers with equal kinds have a Sigma over the same coordinates."""
        return (type(self).__name__, self.mode, *self.shape)

    @property
    def key(self) -> tuple[object, ...]:
        """Two layers with equal keys make the same Sigma of one input."""
        return self.kind

    def parts(self) -> "Sequence[LayerView]":
        """The views through which hooks show the module's arguments, each one to Sigma."""
        return [self]

    def describe(self) -> str:
        """The mode as the table of roles prints it."""
        cut = self.blocks > 1 and self.mode != "diagonal"
        return f"{self.mode} {self.blocks}x{self.side}" if cut else self.mode

    def rows(self, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
        """The kept rows of z of the input `x`, (n, g, b, s), and how many rows `x` has in all."""
        raise TypeError(f"{type(self).__name__} adds to sums without rows")

    def accumulate(self, sums: Tensor, x: Tensor, sample: Sample) -> int:
        """Add sum_i z_i z_i^T of the input `x` to `sums`; returns the number of its rows.

        Kept rows are weighted to stand for all rows, so that forwards of unequal size count by
        their size.
        """
        rows, total = self.rows(x, sample)
        add_second_moment(sums, rows, total / max(1, rows.shape[0]))
        return total

    def stack(self, sigma: Tensor) -> Tensor:
        """The symmetric matrices to invert, from Sigma."""
        return sigma

    def mean_eigenvalue(self, stack: Tensor) -> Tensor:
        """tr(Sigma) / d of each group, (g, 1, 1, 1)."""
        return stack.diagonal(dim1=-2, dim2=-1).mean((-2, -1))[:, None, None, None]

    def matrix(self, grad: Tensor) -> Tensor:
        """The gradient of the weight as one matrix for each block, (g, b, r, s)."""
        return grad.reshape(self.groups, -1, self.blocks, self.side).transpose(1, 2)

    def gradient(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix`: (g, b, r, s) as a tensor of the shape of the weight."""
        return matrix.transpose(1, 2).reshape(shape)

    def multiply(self, grad: Tensor, transform: Tensor) -> Tensor:
        """The gradient matrix times T from the right, as a gradient again."""
        matrix = self.matrix(grad).to(transform.dtype)
        found = matrix * transform if self.side == 1 else product(matrix, transform)
        return self.gradient(found, grad.shape).to(grad.dtype)

    def batch_key(self, grad: Tensor) -> tuple[object, ...] | None:
        """Layers with equal keys may share one `multiply_many`; None where that gains nothing."""
        return None

    def multiply_many(self, grads: Sequence[Tensor], transforms: Sequence[Tensor]) -> list[Tensor]:
        """`multiply` for the gradients of several layers with equal `batch_key`s."""
        return [self.multiply(grad, t) for grad, t in zip(grads, transforms, strict=True)]


class LinearView(LayerView):
    """`nn.Linear`: z is the input vector, all leading axes pooled."""

    def rows(self, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        kept = sample.rows(flat.shape[0], x.device)
        rows = flat if kept is None else flat.index_select(0, kept)
        return rows.reshape(-1, self.groups, self.blocks, self.side), flat.shape[0]


class AttentionView(LinearView):
    """A projection of `nn.MultiheadAttention`: of the query, the key or the value; or the joint
    one, whose rows are those three matrices, one under the other, as three groups."""

    ARGUMENTS = ((0, "query"), (1, "key"), (2, "value"))

    def __init__(self, mode: str, dim: int, blocks: int, of: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__(mode, len(of), dim, blocks)
        self.of = of

    def parts(self) -> Sequence[LayerView]:
        return [_PartView(self, group, self.ARGUMENTS[n]) for group, n in enumerate(self.of)]


class _PartView(LinearView):
    """One argument of `nn.MultiheadAttention`, which has one group of the projection's Sigma."""

    def __init__(self, whole: AttentionView, group: int, argument: tuple[int, str]) -> None:
        super().__init__(whole.mode, 1, whole.blocks * whole.side, whole.blocks)
        self.group, self.of_groups, self.argument = group, whole.groups, argument

    @property
    def key(self) -> tuple[object, ...]:
        return (*self.kind, self.group, self.of_groups)

    def accumulate(self, sums: Tensor, x: Tensor, sample: Sample) -> int:
        # Rows are counted over all groups. Where the arguments have unequal numbers of rows, this
        # leaves a factor in each group's Sigma, on which T does not depend.
        rows, total = self.rows(x, sample)
        weight = self.of_groups * total / max(1, rows.shape[0])
        add_second_moment(sums[self.group : self.group + 1], rows, weight)
        return total


class EmbeddingView(LayerView):
    """`nn.Embedding`: z is one-hot and Sigma = diag(p), so that M_v = (1 + gamma) G_v /
    (V p_v + gamma).

    A row of the table that was never looked up has no gradient and does not move. Every index
    counts, whatever the sample; so does `padding_idx`, whose gradient is zero.
    """

    free_axis = 1

    def __init__(self, num_embeddings: int) -> None:
        super().__init__("diagonal", 1, num_embeddings, num_embeddings)

    def accumulate(self, sums: Tensor, x: Tensor, sample: Sample) -> int:
        index = x.reshape(-1)
        ones = torch.ones_like(index, dtype=sums.dtype)
        sums.view(-1).index_add_(0, index, ones)
        return index.numel()

    def matrix(self, grad: Tensor) -> Tensor:
        return grad[None, :, :, None]

    def gradient(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix[0, :, :, 0]
