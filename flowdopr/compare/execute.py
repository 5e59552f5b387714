"""Run a study's runs, each in a process of its own, some at a time.

A run that fails does not stop the others. A signal is passed on to the running processes: they save
and exit, so the same command can go on with the study.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.progress import Display, progress_of
from flowdopr.train import StopSignal

POLL_SECONDS = 0.3
MAX_REASON_LINES = 15


@dataclass
class Outcome:
    """How the runs ended."""

    failed: list[str] = field(default_factory=list)
    signum: int = 0
    """The signal that stopped the study, 0 if none did."""


@dataclass
class Worker:
    """A process and the run that it works on."""

    plan: RunPlan
    process: subprocess.Popen
    slot: int
    """Which of the `workers` places it has; decides its GPU."""


class Executor:
    """Starts the worker processes of one study and watches them.

    Args:
        command: the command line of the process for a run.
        workers: runs at a time.
    """

    def __init__(self, command: Callable[[RunPlan], list[str]], *, workers: int) -> None:
        self.command = command
        self.max_workers = workers
        self.workers: list[Worker] = []
        self.outcome = Outcome()

    def execute(self, plans: Sequence[RunPlan], display: Display) -> Outcome:
        """Run `plans`; returns when all have ended or a signal has stopped them."""
        waiting = deque(plans)
        try:
            with StopSignal() as stop:
                while waiting or self.workers:
                    if stop.received and not self.outcome.signum:
                        self._pass_on(stop.received, display)
                        waiting.clear()
                    while waiting and len(self.workers) < self.max_workers:
                        self._start(waiting.popleft(), display)
                    time.sleep(POLL_SECONDS)
                    self._remove_ended(display)
                    plans_running = [worker.plan for worker in self.workers]
                    display.update({plan.name: progress_of(plan) for plan in plans_running})
        finally:
            for worker in self.workers:  # left only by a second Ctrl-C or an error in this process
                worker.process.kill()
                worker.process.communicate()
        return self.outcome

    def _start(self, plan: RunPlan, display: Display) -> None:
        plan.failure.unlink(missing_ok=True)
        plan.log.parent.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.max_workers)) - {worker.slot for worker in self.workers})
        with open(plan.log, "wb") as output:
            process = subprocess.Popen(
                self.command(plan),
                stdin=subprocess.PIPE,  # closes when this process dies, which stops the worker
                stdout=output,
                stderr=subprocess.STDOUT,
                env=worker_environment(slot, self.max_workers),
                start_new_session=True,  # Ctrl-C reaches it only through `_pass_on`, not twice
            )
        self.workers.append(Worker(plan, process, slot))
        display.started(plan.name)

    def _pass_on(self, signum: int, display: Display) -> None:
        self.outcome.signum = signum
        display.say(f"{signal.Signals(signum).name}: waiting for the runs to save and exit")
        for worker in self.workers:
            worker.process.send_signal(signum)

    def _remove_ended(self, display: Display) -> None:
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self.workers.remove(worker)
            worker.process.communicate()  # closes its standard input
            code = worker.process.returncode
            if code == 0:
                display.ended(worker.plan.name, "done")
            elif self.outcome.signum:
                display.ended(worker.plan.name, "stopped", stopped=True)
            else:
                self._failed(worker.plan, code, display)

    def _failed(self, plan: RunPlan, code: int, display: Display) -> None:
        reason = failure_reason(plan.log) or f"exit code {code}, and nothing was printed"
        plan.failure.write_text(reason + "\n", encoding="utf-8")
        self.outcome.failed.append(plan.name)
        display.ended(plan.name, f"failed with exit code {code}; see {plan.log}")
        display.say(reason)


def failure_reason(log: Path) -> str:
    """The error that a worker explained in its last line, or else the last lines of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    explained = lines[-1:] if lines and lines[-1].startswith("error: ") else lines
    return "\n".join(explained[-MAX_REASON_LINES:])


def worker_environment(slot: int, workers: int) -> dict[str, str]:
    """This process's environment with an equal share of the cores and, in turn, one of the GPUs."""
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


def worker_command(study_file: Path) -> Callable[[RunPlan], list[str]]:
    """For each run of the study in `study_file`, the command line of its process."""
    module = "flowdopr.compare.worker"
    return lambda plan: [sys.executable, "-m", module, str(study_file), plan.name]
