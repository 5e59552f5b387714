"""Run the runs of a study, each in its own process, several at the same time.

A run that fails does not stop the others. A signal is passed on to the running processes: they save
and exit, so that the same command can continue the study.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.progress import Display
from flowdopr.terminal import print_line
from flowdopr.train import StopSignal

POLL_SECONDS = 0.3
MAX_REASON_LINES = 15


class Executor:
    """Starts one process for each run of a study and watches them.

    Args:
        command: the command line of the process for a run.
        workers: the number of processes that run at the same time.
    """

    def __init__(self, command: Callable[[RunPlan], list[str]], *, workers: int) -> None:
        self.command = command
        self.max_workers = workers
        self.workers: dict[int, tuple[RunPlan, subprocess.Popen]] = {}
        """The running processes by slot, a number below `max_workers` that decides the GPU."""
        self.failed: list[str] = []
        """Names of the runs that failed."""
        self.signum = 0
        """The signal that stopped the study, 0 if none did."""

    def execute(self, plans: Sequence[RunPlan], display: Display) -> None:
        """Run `plans`; returns when all have ended or a signal has stopped them."""
        waiting = deque(plans)
        try:
            with StopSignal() as stop:
                while waiting or self.workers:
                    if stop.received and not self.signum:
                        self._pass_on(stop.received)
                        waiting.clear()
                    for slot in range(self.max_workers):
                        if waiting and slot not in self.workers:
                            self._start(waiting.popleft(), slot, display)
                    time.sleep(POLL_SECONDS)
                    self._remove_ended(display)
                    display.update([plan for plan, _ in self.workers.values()])
        finally:  # some are still running after a second Ctrl-C or an error in this process
            for _, process in self.workers.values():
                process.kill()
                process.communicate()

    def _start(self, plan: RunPlan, slot: int, display: Display) -> None:
        plan.failure.unlink(missing_ok=True)
        plan.log.parent.mkdir(parents=True, exist_ok=True)
        with open(plan.log, "wb") as output:
            process = subprocess.Popen(
                self.command(plan),
                stdin=subprocess.PIPE,  # closes when this process dies, which stops the worker
                stdout=output,
                stderr=subprocess.STDOUT,
                env=worker_environment(slot, self.max_workers),
                start_new_session=True,  # Ctrl-C reaches it only through `_pass_on`, not twice
            )
        self.workers[slot] = plan, process
        display.started(plan.name)

    def _pass_on(self, signum: int) -> None:
        self.signum = signum
        print_line(f"{signal.Signals(signum).name}: waiting for the runs to save and exit")
        for _, process in self.workers.values():
            process.send_signal(signum)

    def _remove_ended(self, display: Display) -> None:
        for slot, (plan, process) in list(self.workers.items()):
            code = process.poll()
            if code is None:
                continue
            del self.workers[slot]
            process.communicate()  # closes its standard input
            if code == 0:
                display.ended(plan.name, "done")
            elif self.signum:
                display.ended(plan.name, "stopped", stopped=True)
            else:
                reason = failure_reason(plan.log) or f"exit code {code}, and nothing was printed"
                plan.failure.write_text(reason + "\n", encoding="utf-8")
                self.failed.append(plan.name)
                display.ended(plan.name, f"failed with exit code {code}; see {plan.log}\n{reason}")


def failure_reason(log: Path) -> str:
    """The last line of a worker's log if it starts with `error: `, otherwise the last 15 lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    explained = lines[-1:] if lines and lines[-1].startswith("error: ") else lines
    return "\n".join(explained[-MAX_REASON_LINES:])


def worker_environment(slot: int, workers: int) -> dict[str, str]:
    """This process's environment with an equal share of the cores, and one GPU chosen by `slot`."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, usable_cores() // workers)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
