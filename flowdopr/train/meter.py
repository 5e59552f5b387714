"""Loss, speed and memory between two lines of the log; the host waits for the device only then."""

from __future__ import annotations

import resource
import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Collects steps until `close`; the time between `pause` and `go_on` is not counted."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.start()

    def start(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self.losses: list[Tensor] = []
        self.go_on()

    def state(self) -> Tensor:
        """Losses `(steps,)` since the last line, averaged over processes; all must call it."""
        if not self.losses:
            return torch.zeros(0)
        return self.accelerator.reduce(torch.stack(self.losses), reduction="mean")  # pyright: ignore

    def restore(self, losses: Tensor) -> None:
        """Continue with the losses of `state`; the time before them is not restored."""
        self.losses = list(losses.to(self.accelerator.device))

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss)
        self.steps += 1

    def pause(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def close(self, global_batch_size: int) -> dict[str, float]:
        """Means since the last call, then start again; the loss is averaged over processes."""
        mean = torch.stack(self.losses).mean()
        loss = float(self.accelerator.reduce(mean, reduction="mean"))  # pyright: ignore
        self.pause()
        per_step = self.seconds / self.steps
        self.start()
        return {
            "loss": loss,
            "seconds_per_step": per_step,
            "images_per_second": global_batch_size / per_step,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
        }


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
