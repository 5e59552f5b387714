"""What DoPr has to say of its layers: what each refresh found, told at the next one, and warnings.

By then the device has sent the numbers, unless it is a whole interval behind the host.
"""

import logging
from collections.abc import Mapping, Sequence

from flowdopr.optim.moments import Statistic, records_of
from flowdopr.optim.record import Later, Record

logger = logging.getLogger("flowdopr.optim")


class News:
    """Tells of skipped refreshes and raised dampings, and stops where inputs are never finite.

    max_nonfinite: refreshes in a row with non-finite inputs of one layer before it gives up.
    """

    def __init__(self, max_nonfinite: int) -> None:
        self.max_nonfinite = max_nonfinite
        self._sent: tuple[list[Statistic], Later] | None = None
        self._stop: str | None = None  # layer whose inputs were not finite too often
        self._told: dict[str, tuple[float, float]] = {}  # skipped and least_damping
        self._said: set[str] = set()

    def send(self, statistics: Sequence[Statistic]) -> None:
        """Put the records as they are on their way to the host."""
        if statistics:
            self._sent = list(statistics), Later(records_of(statistics).table())

    def tell(self) -> None:
        """Log what was sent last, once."""
        if self._sent is None:
            return
        (statistics, numbers), self._sent = self._sent, None
        for statistic, row in zip(statistics, numbers.read(), strict=True):
            self._tell_of(statistic, Record(*row))

    def tell_and_stop(self) -> None:
        """`tell`. Raises FloatingPointError, once, if inputs were not finite `max_nonfinite` times
        in a row: on all ranks together, since all come here at the same steps."""
        self.tell()
        name, self._stop = self._stop, None
        if name is not None:
            raise FloatingPointError(
                f"layer {name!r}: inputs were not finite on {self.max_nonfinite} refreshes in a "
                "row; lower the learning rate or check the data"
            )

    def start_from(self, records: Mapping[str, Record]) -> None:
        """Tell only what comes after these numbers, by layer name."""
        self._sent = self._stop = None
        self._told = {name: _worth_telling(numbers) for name, numbers in records.items()}

    def report_unseen(self, name: str) -> None:
        """Say once that a layer has a gradient but no statistics."""
        self._say_once(
            name,
            "has a gradient, but no refresh has seen finite inputs; GP alone until one does, or "
            "for good if its weight is used without calling the module, the model trains in eval() "
            "mode, or was compiled and run before DoPr was built",
        )

    def report_thawed(self, name: str) -> None:
        """Say once that a layer that was frozen when DoPr was built has a gradient."""
        self._say_once(
            name,
            "frozen when DoPr was built, trains now; GP alone, build DoPr anew after "
            "requires_grad_(True)",
        )

    def _tell_of(self, statistic: Statistic, now: Record) -> None:
        name = statistic.name
        skipped, damping = self._told.get(name, (0, 0))
        self._told[name] = _worth_telling(now)
        if now.skipped > skipped:
            logger.warning("layer %s: inputs are not finite, refresh skipped", name)
            if now.in_a_row >= self.max_nonfinite:
                self._stop = name
        if now.least_damping > damping:
            logger.warning(
                "layer %s: damping %.1e leaves Sigma singular; damping raised to %.1e or more from "
                "the next refresh on",
                name,
                now.damping,
                now.least_damping,
            )
        if now.weight == 0 and statistic.parameter.grad is not None:
            self.report_unseen(name)

    def _say_once(self, name: str, what: str) -> None:
        if name not in self._said:
            self._said.add(name)
            logger.warning("layer %s: %s", name, what)


def _worth_telling(numbers: Record) -> tuple[float, float]:
    return float(numbers.skipped), float(numbers.least_damping)
