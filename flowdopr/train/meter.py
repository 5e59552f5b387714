"""Loss, speed and memory between two lines of the log; the host waits for the device only then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowdopr.processes import peak_memory_mib


class Meter:
    """Collects steps until `close`; the time between `pause` and `go_on` is not counted."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.start()

    def start(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.restored = torch.zeros(0, device=self.accelerator.device)
        self.losses: list[Tensor] = []
        self.go_on()

    def state(self) -> Tensor:
        """Losses `(steps,)` since the last line, averaged over processes; all must call it."""
        if not self.losses:
            return self.restored
        # Added in the order of the processes, so that a loss has the same bits in whatever window.
        gathered: Any = self.accelerator.gather(torch.stack(self.losses))
        parts = gathered.chunk(self.accelerator.num_processes)
        return torch.cat([self.restored, reduce(torch.add, parts) / len(parts)])

    def restore(self, losses: Tensor) -> None:
        """Continue with the losses of `state`; the time before them is not restored."""
        self.restored = losses.to(self.accelerator.device)

    def add(self, loss: Tensor | None) -> None:
        """Count a step and its loss; None for a step that was skipped."""
        self.losses += [] if loss is None else [loss]
        self.steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within the block as waiting for images."""
        since = time.perf_counter()
        yield
        self.waited += time.perf_counter() - since

    def pause(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def close(self, losses: Tensor, global_batch_size: int) -> dict[str, float]:
        """Means since the last call, of which `losses` is the `state`; then start again."""
        loss = float(losses.mean())
        self.pause()
        per_step, data_wait = self.seconds / self.steps, self.waited / self.seconds
        self.start()
        return {
            "loss": loss,
            "seconds_per_step": per_step,
            "images_per_second": global_batch_size / per_step,
            "data_wait": data_wait,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
        }
