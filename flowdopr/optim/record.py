"""What refreshes decide about each statistic, kept on its device so that nothing waits for it.

Whether a layer's inputs were finite, and whether its matrix had a Cholesky factor, is known on the
device alone. What follows is computed there; the host is told a refresh later.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Record(NamedTuple):
    """The numbers of one statistic, each of shape (), or of n, each (n,); floats on the host.

    weight: that of the average of Sigma, the same average of ones; 0 before the first.
    refreshes: how many are in it.
    skipped: how many were skipped, ever, for inputs that were not finite.
    in_a_row: how many of these since the last good one.
    damping: gamma of T, once there is an average.
    least_damping: of T from the next refresh on, for good; above 0 once a factorisation failed.
    """

    weight: Tensor
    refreshes: Tensor
    skipped: Tensor
    in_a_row: Tensor
    damping: Tensor
    least_damping: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> "Record":
        """The record of n statistics from their `rows`."""
        return cls(*torch.stack(list(rows), 1))

    def table(self) -> Tensor:
        """All numbers, one row for each statistic, (n, 6)."""
        return torch.stack(list(self), -1)


def vector(
    numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(n,) of numbers that the host knows. One copied from there would wait for the device."""
    return torch.stack([torch.full((), float(n), device=device, dtype=dtype) for n in numbers])


class Later:
    """Numbers on their way from the device to the host, which waits for them only to read them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrival = None if numbers.device.type == "cpu" else torch.Event(numbers.device)
        if self._arrival is not None:
            self._arrival.record(torch.accelerator.current_stream(numbers.device))

    def read(self) -> list:
        """The numbers as (nested) lists."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.tolist()
