"""How a run ends early: by a signal, after the current step, or by a failure."""

from __future__ import annotations

import signal
import threading
from types import FrameType

TRY = "lower optimizer.lr, lengthen train.warmup_steps, or set train.precision=no where it is not"
"""The remedy for numbers that are not finite."""


class Interrupted(Exception):
    """A signal stopped the work, which is saved; the same command with `--resume` continues it."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number (130 for Ctrl-C, 143 for SIGTERM, on Linux
        138 for SIGUSR1)."""
        return 128 + self.signum


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message says why and what to try."""

    exit_code = 1


class StopSignal:
    """Within its block, the first SIGINT or SIGTERM only sets `received`; the second interrupts.

    SIGUSR1 and SIGUSR2, which a cluster sends before it ends a job, never interrupt, and stand
    where SIGTERM comes with them, but not against SIGINT. All this does nothing outside the main
    thread, where Python allows no signal handlers.
    """

    URGENT = (signal.SIGINT, signal.SIGTERM)
    SIGNALS = (*URGENT, *(s for s in signal.Signals if s.name in ("SIGUSR1", "SIGUSR2")))

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received in self.URGENT and number in self.URGENT:
            raise KeyboardInterrupt
        preempted = self.received == signal.SIGTERM and number not in self.URGENT
        by_the_user = self.received not in self.URGENT and number == signal.SIGINT
        if self.received is None or preempted or by_the_user:
            self.received = number
