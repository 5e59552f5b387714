"""One second moment Sigma of a layer's inputs: what a window gathers, and the running average."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowdopr.optim.dual import DualCase
from flowdopr.optim.layers import Case
from flowdopr.optim.record import Record


def precision(weight: Tensor) -> torch.dtype:
    """Of the statistics of a layer: float64 for a weight of float64, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Pile:
    """A sum of z z^T (G, B, s, s) with its number of rows; empty until something is added.

    Of the dual form it holds the rows themselves. Where rows were left out, those kept are scaled
    to stand for all, and all are counted.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.sums: Tensor | None = None
        self.count = 0

    def pour_into(self, other: "Pile") -> None:
        """Move everything into `other`."""
        if self.sums is not None:
            both = None if other.sums is None else self.case.join(other.sums, self.sums)
            other.sums = self.sums if both is None else both
            other.count += self.count
        self.sums, self.count = None, 0


class Statistic:
    """One Sigma: the layer case that feeds it, its piles, and its running average.

    `sigma` is the exponential average of the batch second moments, and over the weight that is in
    `record` (see `record`) a weighted mean from the first refresh on. `transform` is T, made from
    it.
    A statistic with a `twin` keeps nothing of its own: the twin's modules see the same tensors.
    """

    def __init__(self, name: str, case: Case, weight: Tensor, max_rows: int | None) -> None:
        self.name, self.case, self.max_rows = name, case, max_rows
        self.dtype = precision(weight)
        self.parameter = weight
        self.fresh, self.used = Pile(case), Pile(case)
        self.sigma: Tensor | None = None
        self.transform: Tensor | None = None
        self.twin: Statistic | None = None
        self.sources: list[Statistic | None] = []  # whose input each call had, until paired
        self.record: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self.parameter.device

    @property
    def is_dual(self) -> bool:
        """Whether this keeps rows, Z / sqrt(n) (G, 1, n, d) in `sigma`, not second moments."""
        return isinstance(self.case, DualCase)

    @property
    def key(self) -> tuple[object, ...]:
        """Statistics of equal keys make the same Sigma of the same input."""
        return (*self.case.key, self.dtype, self.max_rows)

    def identity(self) -> Tensor:
        """A T that changes nothing; not of the dual form."""
        *stack, side, _ = self.case.transform_shape
        eye = torch.eye(side, dtype=self.dtype, device=self.device)
        return eye.expand(*stack, side, side)

    def gather(self, x: Tensor, case: Case) -> None:
        """Add one forward input."""
        pile = self.fresh
        if pile.sums is None:
            pile.sums = torch.zeros(self.case.shape, dtype=self.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            pile.sums, count = case.gather(pile.sums, x, self.max_rows)
        pile.count += count

    def close(self) -> Pile:
        """End the window; returns all it gathered."""
        self.fresh.pour_into(self.used)
        whole, self.used = self.used, Pile(self.case)
        return whole if whole.count else Pile(self.case)  # forwards of empty batches count as none

    def take(self, batch: Tensor, good: Tensor, keep: Tensor, share: Tensor, count: Tensor) -> None:
        """Sigma <- keep Sigma + share batch / count, in place; of the dual form the batch alone, or
        what it was, if that had as many rows.

        All of shape () but the batch, whose values need not be finite where `good` is false.
        """
        batch.nan_to_num_(0, 0, 0)
        if not self.is_dual:
            batch.mul_(share / count)
            self.sigma = batch if self.sigma is None else self.sigma.mul_(keep).add_(batch)
            return
        rows, old = batch.mul_(share / count.sqrt()), self.sigma
        self.sigma = (
            rows if old is None or not self.can_keep(rows) else torch.where(good, rows, old)
        )

    def can_keep(self, batch: Tensor) -> bool:
        """Whether a batch that is not good leaves the average as it is; else there is none."""
        return self.sigma is not None and self.sigma.shape == batch.shape


def records_of(statistics: Sequence[Statistic]) -> Record:
    """Their numbers, zeros for those that have none yet, on the device of the first."""
    device = statistics[0].device
    return Record.of(
        [
            torch.zeros(len(Record._fields), dtype=s.dtype, device=device)
            if s.record is None
            else s.record.to(device)
            for s in statistics
        ]
    )


def store_records(statistics: Sequence[Statistic], record: Record) -> None:
    """The inverse of `records_of`."""
    for statistic, row in zip(statistics, record.table(), strict=True):
        statistic.record = row.to(statistic.device, statistic.dtype)
