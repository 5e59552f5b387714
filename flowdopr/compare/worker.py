"""One run of a study in its own process: train it, then make its missing evaluation cards.

One process does both, because importing torch twice would cost more than a small run. It holds one
end of a pipe from the study's process. When the study's process dies, even by kill -9, the pipe
closes and the worker saves and exits. Otherwise it would go on writing into a run folder that the
next `flowdopr compare` uses.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from flowdopr.compare.cards import read_run
from flowdopr.compare.plan import RunPlan
from flowdopr.disk import locked
from flowdopr.evaluate import Evaluator
from flowdopr.exits import LESS_MEMORY, exit_code, is_out_of_memory, one_line
from flowdopr.runs import RunFolder, start_from
from flowdopr.train import Interrupted, StopSignal, train

PATIENCE_SECONDS = 60.0
"""How long to wait for an earlier worker of the same run, which may still be saving."""

Work = Callable[[RunPlan], None]


def process_context() -> Any:
    """How the processes of runs are started.

    Where a process can be forked, all are copies of one that has imported torch and this module
    once: this takes four seconds, a tenth of a small run.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def train_and_evaluate(plan: RunPlan) -> None:
    """Train and evaluate a run of a study, from where it was stopped.

    A run that shares its first steps with a longer one takes them over, if that is there.
    """
    longer = plan.path.parent / (plan.starts_from or "")
    if plan.starts_from and (longer / "config.yaml").exists():
        with locked(plan.path, "wait for it", patience=PATIENCE_SECONDS):
            if not read_run(plan).steps:
                start_from(RunFolder.open(longer), plan.config)
    train(plan.config, resume=True, patience=PATIENCE_SECONDS)
    evaluator = Evaluator(plan.path)
    for request in read_run(plan).missing:
        evaluator.card(request.overrides, step=request.step)


def run_in_process(
    work: Work, plan: RunPlan, threads: int, environment: Mapping[str, str], study: Connection
) -> None:
    """The life of a worker: do `work`, print into the run's log, and end with an exit code.

    Args:
        threads: of this process, for all libraries.
        environment: variables of the study's process, which this one may have been forked
            without, and those that give it a GPU.
        study: a pipe whose other end the study's process holds.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches this process only through the study's, not twice
    os.environ |= environment
    print_into(plan.log)
    if hasattr(signal, "pthread_sigmask"):  # the study's process has held these back
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignal.SIGNALS)
    threading.Thread(target=stop_when_closed, args=(study,), daemon=True).start()
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        sys.exit(outcome(work, plan))


def print_into(log: Path) -> None:
    """Let everything that this process prints from here on replace the content of `log`."""
    with open(log, "wb") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())


def stop_when_closed(study: Connection) -> None:
    """Send this process SIGTERM once the other end of the pipe is closed."""
    try:
        study.recv_bytes()
    except EOFError:
        os.kill(os.getpid(), signal.SIGTERM)


def outcome(work: Work, plan: RunPlan) -> int | str:
    """What `sys.exit` takes: 0, the exit code of a signal, or why the run failed."""
    try:
        work(plan)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if is_out_of_memory(error):
            return f"error: out of memory; {LESS_MEMORY['compare']}"
        if exit_code(error) is None:
            raise
        return f"error: {one_line(error)}"
    return 0
