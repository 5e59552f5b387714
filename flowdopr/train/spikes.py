"""Losses that stand out from those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

BEFORE, FEWEST = 256, 32  # losses that others are compared with: so many of the newest, at least
DEVIATIONS = 10.0  # median absolute deviations; 6.7 standard deviations of normal losses
LEAST_DEVIATION = 0.01  # of the median, for losses that hardly differ


class Spikes:
    """Finds losses above the bound

        median + DEVIATIONS * max(median absolute deviation, LEAST_DEVIATION * |median|)

    of the losses before them."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=BEFORE)

    def among(self, losses: Sequence[float]) -> str:
        """What to log of the newest `losses`; "" if none of them is above the bound."""
        before = list(self._before)
        self._before.extend(losses)
        if len(before) < FEWEST:
            return ""
        middle = median(before)
        deviation = median(abs(loss - middle) for loss in before)
        bound = middle + DEVIATIONS * max(deviation, LEAST_DEVIATION * abs(middle))
        above = [loss for loss in losses if loss > bound]
        if not above:
            return ""
        return (
            f"{len(above)} of the last {len(losses)} losses above {bound:.4g}, up to "
            f"{max(above):.4g}; the {len(before)} before have median {middle:.4g}"
        )
