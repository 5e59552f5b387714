"""The dual form, for layers that see fewer rows than they have coordinates (adaLN, a time MLP).

With Z the n rows of the newest refresh, m = tr(Sigma) / d, Y = Z / sqrt(n m), so that
Sigma / m = Y^T Y, Woodbury's identity gives the damped inverse from an n x n matrix:

    G (Y^T Y + gamma I)^-1 = (G - G Y^T (Y Y^T + gamma I)^-1 Y) / gamma
                           = (G - (G V^T) V) / gamma,    V = L^-1 Y,  L L^T = Y Y^T + gamma I.

It keeps n d numbers for Sigma instead of d^2, and costs 4 n d instead of 2 d^2 a row of G.
Legend as in `layers`; n rows in all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowdopr.optim.inverse import Form, factor
from flowdopr.optim.layers import Case


class DualCase(Case):
    """A full case by the dual form: gathers rows (G, 1, n, d) instead of their second moment.

    T is (G, 1, 1 + n, d): the diagonal D, then the rows V of M = G D - (G V^T) V.
    """

    def __init__(self, full: Case) -> None:
        super().__init__("dual", full.groups, full.side)
        self.full, self.kind, self.takes_bias = full, f"dual {full.kind}", full.takes_bias

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of rows before the first is gathered."""
        return (self.groups, 1, 0, self.side)

    @property
    def rows_first(self) -> bool:
        return self.full.rows_first

    @property
    def key(self) -> tuple[object, ...]:
        return ("dual", *self.full.key)

    def describe(self) -> str:
        return "dual+bias" if self.takes_bias else "dual"

    def gather(self, sums: Tensor, x: Tensor, max_rows: int | None) -> tuple[Tensor, int]:
        kept, total = self.full.rows(x, max_rows)
        rows = kept.movedim(0, 2).to(sums.dtype) * (total / max(1, len(kept))) ** 0.5
        return self.join(sums, rows), total

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], 2)

    def trace(self, sums: Tensor) -> Tensor:
        return sums.square().sum()

    def mean_eigenvalue(self, stack: Tensor) -> Tensor:
        return stack.square().sum((1, 2, 3), keepdim=True) / self.side

    def matrix(self, grads: Sequence[Tensor]) -> Tensor:
        return self.full.matrix(grads)

    def gradients(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        return self.full.gradients(matrix, like)

    def multiply(self, grads: Sequence[Tensor], stack: Tensor) -> list[Tensor]:
        matrix = self.matrix(grads).to(stack.dtype)
        diagonal, rows = stack[:, :, :1], stack[:, :, 1:]
        return self.gradients((matrix * diagonal).sub_(matrix @ rows.mT @ rows), grads)


def dual_transform(
    case: DualCase, rows: Tensor, gamma: Tensor, form: Form, strength: float
) -> tuple[Tensor, Tensor]:
    """T from rows Z / sqrt(n) (G, 1, n, d), and whether `gamma`, of shape (), was too small;
    Sigma / m is then taken for the identity. See `inverse.invert`."""
    mean = case.mean_eigenvalue(rows)
    mean = torch.where(mean > 0, mean, 1.0)
    unit = (rows / mean.sqrt()).flatten(0, 1)
    factors, failed = factor(unit @ unit.mT, gamma.expand(len(unit)))
    low_rank = torch.linalg.solve_triangular(factors, unit, upper=False)[:, None]
    lost = failed[:, None, None, None]
    scale = strength / torch.where(lost, gamma + 1, gamma)
    if not form.unit_scale:
        scale = scale / mean
    low_rank = low_rank.masked_fill(lost, 0) * scale.sqrt()
    diagonal = (scale + (1 - strength)).expand(-1, -1, -1, case.side)
    return torch.cat([diagonal, low_rank], 2), failed.any()
