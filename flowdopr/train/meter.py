"""Loss, speed, memory and shares of time between two lines of the log.

The host waits for the device only there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowdopr.processes import peak_memory_mib

DATA, FORWARD, BACKWARD, OPTIMIZER = "data_wait", "forward", "backward", "optimizer"
PARTS: tuple[str, ...] = (DATA, FORWARD, BACKWARD, OPTIMIZER)
"""The parts of a step whose shares of the time are measured, as metrics.jsonl calls them."""


class Meter:
    """Collects steps until `close`; the time between `pause` and `go_on` is not counted."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.on_cuda = accelerator.device.type == "cuda"
        self.start()

    def start(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self.parts = dict.fromkeys(PARTS, 0.0)  # seconds
        self.spans: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
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
        self._read_passed()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within the block as part `name` of a step.

        On a CUDA device that is the device's time, between events that are read when it has passed
        them; but waiting for images is the host's, in which the device may still compute.
        """
        if self.on_cuda and name != DATA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.spans.append((name, begin, end))
        else:
            since = time.perf_counter()
            yield
            self.parts[name] += time.perf_counter() - since

    def _read_passed(self) -> None:
        while self.spans and self.spans[0][2].query():
            name, begin, end = self.spans.popleft()
            self.parts[name] += begin.elapsed_time(end) / 1000

    def pause(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def close(self, losses: Tensor, global_batch_size: int) -> dict[str, float]:
        """Means since the last call, of which `losses` is the `state`; then start again."""
        loss = float(losses.mean())
        self.pause()
        self._read_passed()
        per_step = self.seconds / self.steps
        shares = {part: seconds / self.seconds for part, seconds in self.parts.items()}
        self.start()
        return {
            "loss": loss,
            "seconds_per_step": per_step,
            "images_per_second": global_batch_size / per_step,
            **shares,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
        }
