"""Run a study's runs, each in a process of its own, some at a time.

A run that fails stops nobody else. A signal is passed on: the runs save and exit, nothing is lost,
and the same command goes on later.
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

from flowdopr.compare.evaluations import wanted_cards
from flowdopr.compare.plan import RunPlan
from flowdopr.compare.progress import Display, State, last_step
from flowdopr.train import StopSignal

POLL_SECONDS = 0.3
LINES_OF_A_FAILURE = 15


@dataclass
class Outcome:
    """How the runs ended. `signum` is the signal that stopped the study, 0 if none did."""

    failed: list[str] = field(default_factory=list)
    signum: int = 0


@dataclass
class Running:
    plan: RunPlan
    process: subprocess.Popen
    slot: int


class Executor:
    """Starts the workers of one study and watches them.

    Args:
        study: the study folder; `logs/` in it receives what each worker prints.
        command: the worker's command line for a run.
        workers: runs at a time.
    """

    def __init__(
        self, study: Path, command: Callable[[RunPlan], list[str]], *, workers: int
    ) -> None:
        self.logs = study / "logs"
        self.command = command
        self.workers = workers
        self.running: list[Running] = []
        self.outcome = Outcome()

    def execute(self, plans: Sequence[RunPlan], display: Display) -> Outcome:
        """Run `plans`; returns when all have ended or a signal has stopped them."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting = deque(plans)
        try:
            with StopSignal() as stop:
                while waiting or self.running:
                    if stop.received and not self.outcome.signum:
                        self._pass_on(stop.received, display)
                        waiting.clear()
                    while waiting and len(self.running) < self.workers:
                        self._start(waiting.popleft(), display)
                    time.sleep(POLL_SECONDS)
                    self._reap(display)
                    display.update({run.plan.name: state_of(run.plan) for run in self.running})
        finally:
            for run in self.running:  # only after a second Ctrl-C or an error of our own
                run.process.kill()
                run.process.communicate()
        return self.outcome

    def _start(self, plan: RunPlan, display: Display) -> None:
        failure_path(self.logs, plan).unlink(missing_ok=True)
        slot = min(set(range(self.workers)) - {run.slot for run in self.running})
        with open(log_path(self.logs, plan), "wb") as output:
            # Its own session: a terminal's Ctrl-C reaches it once, through us.
            process = subprocess.Popen(
                self.command(plan),
                stdin=subprocess.PIPE,  # closes when we die: see worker.py
                stdout=output,
                stderr=subprocess.STDOUT,
                env=worker_environment(slot, self.workers),
                start_new_session=True,
            )
        self.running.append(Running(plan, process, slot))
        display.started(plan.name)

    def _pass_on(self, signum: int, display: Display) -> None:
        self.outcome.signum = signum
        display.say(f"{signal.Signals(signum).name}: waiting for the runs to save and exit")
        for run in self.running:
            run.process.send_signal(signum)

    def _reap(self, display: Display) -> None:
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            run.process.communicate()  # closes its pipe
            name, code = run.plan.name, run.process.returncode
            if code == 0:
                display.ended(name, "done")
            elif self.outcome.signum:
                display.ended(name, "stopped", for_good=False)
            else:
                self._failed(run.plan, code, display)

    def _failed(self, plan: RunPlan, code: int, display: Display) -> None:
        log = log_path(self.logs, plan)
        reason = last_words(log) or f"exit code {code}, without a word"
        failure_path(self.logs, plan).write_text(reason + "\n", encoding="utf-8")
        self.outcome.failed.append(plan.name)
        display.ended(plan.name, f"failed with exit code {code}; see {log}")
        display.say(reason)


def last_words(log: Path) -> str:
    """The error that a worker explained in one line, or else the last lines of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    explained = lines[-1:] if lines and lines[-1].startswith("error: ") else lines
    return "\n".join(explained[-LINES_OF_A_FAILURE:])


def log_path(logs: Path, plan: RunPlan) -> Path:
    return logs / f"{plan.name}.log"


def failure_path(logs: Path, plan: RunPlan) -> Path:
    """Where the last words of a failed run are kept until it is tried again."""
    return logs / f"{plan.name}.failed"


def state_of(plan: RunPlan) -> State:
    """How far the run is; cards are counted, not read, because this is asked all the time."""
    wanted = len(wanted_cards(plan).all())
    cards = len(list((plan.path / "evaluation").glob("*.json")))
    steps = plan.config.train.steps
    return State(last_step(plan.path), steps, cards=min(cards, wanted), wanted_cards=wanted)


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
    """The command line that runs one plan of the study in `study_file`."""
    module = "flowdopr.compare.worker"
    return lambda plan: [sys.executable, "-m", module, str(study_file), plan.name]
