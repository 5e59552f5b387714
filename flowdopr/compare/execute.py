"""Run the runs of a study, each in its own process, several at the same time.

A run that fails does not stop the others. A signal is passed on to the running processes: they save
and exit, so that the same command can continue the study.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.progress import Display
from flowdopr.compare.worker import Work, process_context, run_in_process
from flowdopr.terminal import print_line
from flowdopr.train import StopSignal

POLL_SECONDS = 0.3
MAX_REASON_LINES = 15
NOTHING_PRINTED = (
    "the run printed nothing; a script that calls compare must do so under "
    "if __name__ == '__main__':"
)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Within the block no signal that stops a study is delivered.

    The process that forks inherits this, and only a run lets the signals in again. Ctrl-C reaches
    all processes of a terminal; without the one that forks, no run would be known to have ended.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started within the block, it would let the signals in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker(Protocol):
    """A run at work."""

    plan: RunPlan

    @property
    def exitcode(self) -> int | None:
        """None while it is at work."""
        ...

    def stop(self, signum: int) -> None:
        """Let it save and end."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    def close(self) -> None:
        """Free what belongs to it, after its end."""
        ...


class LocalWorker:
    """A worker that is a process of this machine."""

    def __init__(self, plan: RunPlan, process: Any, alive: Connection) -> None:
        self.plan = plan
        self.process = process
        self.alive = alive
        """Closes when this process dies, which stops the worker."""

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode

    def stop(self, signum: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, signum)

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        self.process.join()
        self.alive.close()


class Executor:
    """Starts one process for each run of a study and watches them.

    Args:
        work: what the process of a run does, a function that can be imported.
        workers: the number of processes that run at the same time.
    """

    def __init__(self, work: Work, *, workers: int) -> None:
        self.work = work
        self.max_workers = workers
        self.processes = process_context()
        self.workers: dict[int, Worker] = {}
        """The running processes by slot, a number below `max_workers` that decides the GPU."""
        self.failed: list[str] = []
        """Names of the runs that failed."""
        self.signum = 0
        """The signal that stopped the study, 0 if none did."""

    def execute(self, plans: Sequence[RunPlan], display: Display) -> None:
        """Run `plans`; returns when all have ended or a signal has stopped them."""
        waiting = list(plans)
        try:
            with StopSignal() as stop:
                while waiting or self.workers:
                    if stop.received and not self.signum:
                        self._pass_on(stop.received)
                        waiting.clear()
                    for slot in range(self.max_workers):
                        if slot not in self.workers and (plan := self._next(waiting)):
                            waiting.remove(plan)
                            self._start(plan, slot, display)
                    time.sleep(POLL_SECONDS)
                    self._remove_ended(display)
                    display.update([worker.plan for worker in self.workers.values()])
        finally:  # some are still running after a second Ctrl-C or an error in this process
            for worker in self.workers.values():
                worker.kill()

    def _next(self, waiting: Sequence[RunPlan]) -> RunPlan | None:
        """The first of the runs that waits for no longer one of which it takes over steps."""
        before = {plan.name for plan in waiting} | {one.plan.name for one in self.workers.values()}
        return next((plan for plan in waiting if plan.starts_from not in before), None)

    def _start(self, plan: RunPlan, slot: int, display: Display) -> None:
        plan.failure.unlink(missing_ok=True)
        plan.log.parent.mkdir(parents=True, exist_ok=True)
        self.workers[slot] = self._worker(plan, slot)
        display.started(plan.name)

    def _worker(self, plan: RunPlan, slot: int) -> Worker:
        watched, alive = self.processes.Pipe(duplex=False)
        threads, environment = max(1, usable_cores() // self.max_workers), os.environ | gpu_of(slot)
        plan.log.write_bytes(b"")  # of an earlier process; this one may die before it prints
        process = self.processes.Process(
            target=run_in_process,
            args=(self.work, plan, threads, dict(environment), watched),
            name=plan.name,
        )
        with _signals_held_back():
            process.start()
        watched.close()
        return LocalWorker(plan, process, alive)

    def _pass_on(self, signum: int) -> None:
        self.signum = signum
        print_line(f"{signal.Signals(signum).name}: waiting for the runs to save and exit")
        for worker in self.workers.values():
            worker.stop(signum)

    def _remove_ended(self, display: Display) -> None:
        for slot, worker in list(self.workers.items()):
            code, plan = worker.exitcode, worker.plan
            if code is None:
                continue
            del self.workers[slot]
            worker.close()
            if code == 0:
                display.ended(plan.name, "done")
            elif self.signum:
                display.ended(plan.name, "stopped", stopped=True)
            else:
                reason = failure_reason(plan.log) or f"exit code {code}: {NOTHING_PRINTED}"
                plan.failure.write_text(reason + "\n", encoding="utf-8")
                self.failed.append(plan.name)
                display.ended(plan.name, f"failed with exit code {code}; see {plan.log}\n{reason}")


def failure_reason(log: Path) -> str:
    """The last line of a worker's log if it starts with `error: `, otherwise the last 15 lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    explained = lines[-1:] if lines and lines[-1].startswith("error: ") else lines
    return "\n".join(explained[-MAX_REASON_LINES:])


def gpu_of(slot: int) -> dict[str, str]:
    """The variable that gives a process one GPU, chosen by `slot`; none without a choice."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {}


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
