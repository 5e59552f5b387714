"""Checkpoints that are written beside training.

At a step the state is copied to the host's memory, and a thread writes the copy while training goes
on. A checkpoint that cannot be written does not end training: the next one tries again.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from accelerate.utils import recursively_apply
from torch import Tensor

from flowdopr.disk import WriteError
from flowdopr.runs import RunFolder

log = logging.getLogger("flowdopr.train")


class Saver:
    """Writes the checkpoints of a run, one at a time; leaving its block waits for the last one."""

    def __init__(self, run: RunFolder, step: int):
        self.run = run
        self.saved = step
        """The step of the newest checkpoint that is written, 0 if there is none."""
        self.why_not = ""
        """Why a later one could not be written."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def save(self, step: int, **parts: Any) -> None:
        """Begin to write checkpoint `step`, once the one before is written.

        Args:
            parts: the arguments of `RunFolder.save_checkpoint`, whose tensors may change as soon as
                this returns.

        Raises:
            Exception: see `wait`.
        """
        self.wait()
        copies = recursively_apply(_on_host, parts)
        self._writing = self._pool.submit(self._write, step, copies)

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or could not be.

        Raises:
            Exception: whatever the thread raised that is no fault of the disk.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, parts: dict[str, Any]) -> None:
        try:
            self.run.save_checkpoint(step, **parts)
        except WriteError as error:
            self.why_not = error.what
            log.warning(
                "step %d is not saved: %s; the next checkpoint tries again", step, error.what
            )
        else:
            self.saved, self.why_not = step, ""


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
