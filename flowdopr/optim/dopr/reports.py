"""What DoPr logs of its layers: what each refresh found is logged at the next one.

By then the device has sent the numbers to the host, unless it is a whole interval behind.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger("flowdopr.optim")


class Diagnostics(NamedTuple):
    """The state of one layer's Sigma, as numbers on the host; `Statistics` has those of all layers
    as tensors (n,) on the device, which decides by them without the host.

    ema_weight: the sum of the weights in the moving average of Sigma; 0 before the first refresh.
    refreshes: how many refreshes are in the average.
    skipped: how many refreshes were skipped because inputs were not finite.
    damping: gamma of the newest T.
    least_damping: the least gamma of later ones; above 0 once a factorisation has failed.
    """

    ema_weight: Any
    refreshes: Any
    skipped: Any
    damping: Any
    least_damping: Any


class DeferredRead:
    """Numbers on their way from the device to the host, which waits for them only to read them."""

    def __init__(self, numbers: Tensor) -> None:
        later = numbers.device.type not in ("cpu", "mps")  # Apple's GPU has no stream to ask
        self._numbers = numbers.to("cpu", non_blocking=later)
        self._arrival = torch.Event(numbers.device) if later else None
        if self._arrival is not None:
            self._arrival.record(torch.accelerator.current_stream(numbers.device))

    def read(self) -> Any:
        """The numbers as nested lists, one number as it is."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.tolist()


class Reporter:
    """Logs skipped refreshes, raised dampings and layers without statistics.

    Args:
        weights: the weight of each layer, by layer name.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self._sent: tuple[list[str], DeferredRead] | None = None
        self._logged: dict[str, Diagnostics] = {}
        self._logged_once: set[str] = set()

    def send(self, names: Sequence[str], table: Tensor) -> None:
        """Start to send the `Diagnostics` of these layers, rows of `table` (n, 5), to the host."""
        self._sent = list(names), DeferredRead(table)

    def log_sent(self) -> None:
        """Log what was sent last, once."""
        if self._sent is None:
            return
        (names, table), self._sent = self._sent, None
        for name, row in zip(names, table.read(), strict=True):
            self._log(name, Diagnostics(*row))

    def start_from(self, diagnostics: Mapping[str, Diagnostics]) -> None:
        """Log only what comes after these numbers, by layer name: a run goes on."""
        self._sent = None
        self._logged = dict(diagnostics)

    def log_unseen(self, name: str) -> None:
        """Log once that a layer has a gradient but no statistics."""
        self._log_once(
            name,
            "has a gradient, but no refresh has seen finite inputs; GP alone until one does, or "
            "for good if its weight is used without calling the module, the model trains in eval() "
            "mode, or was compiled and run before DoPr was built",
        )

    def log_thawed(self, name: str) -> None:
        """Log once that a layer that was frozen when DoPr was built has a gradient."""
        self._log_once(
            name,
            "frozen when DoPr was built, trains now; GP alone, build DoPr anew after "
            "requires_grad_(True)",
        )

    def _log(self, name: str, now: Diagnostics) -> None:
        before = self._logged.get(name, Diagnostics(0, 0, 0, 0, 0))
        self._logged[name] = now
        if now.skipped > before.skipped:
            logger.warning("layer %s: inputs are not finite, refresh skipped", name)
        if now.least_damping > before.least_damping:
            logger.warning(
                "layer %s: damping %.1e leaves Sigma singular; damping raised to %.1e or more from "
                "the next refresh on",
                name,
                now.damping,
                now.least_damping,
            )
        weight = self._weights.get(name)
        if now.ema_weight == 0 and weight is not None and weight.grad is not None:
            self.log_unseen(name)

    def _log_once(self, name: str, what: str) -> None:
        if name not in self._logged_once:
            self._logged_once.add(name)
            logger.warning("layer %s: %s", name, what)
