"""One run of a study in its own process: train it, then make its missing evaluation cards.

    python -m flowdopr.compare.worker STUDY.yaml RUN_NAME

One process does both, because importing torch twice would cost more than a small run. Its standard
input is a pipe from the study's process. When the study's process dies, even by kill -9, the pipe
closes and the worker saves and exits. Otherwise it would go on writing into a run folder that the
next `flowdopr compare` uses.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from flowdopr.compare.cards import read_run
from flowdopr.compare.plan import expand
from flowdopr.config import load_config
from flowdopr.evaluate import evaluate
from flowdopr.exits import LESS_MEMORY, exit_code, is_out_of_memory, one_line
from flowdopr.train import Interrupted, train

PATIENCE_SECONDS = 60.0
"""How long to wait for an earlier worker of the same run, which may still be saving."""


def work(study_file: str | Path, name: str) -> None:
    """Train and evaluate the run `name` of the study, from where it was stopped."""
    plan = {plan.name: plan for plan in expand(load_config(study_file))}[name]
    train(plan.config, resume=True, patience=PATIENCE_SECONDS)
    for request in read_run(plan).missing:
        evaluate(plan.path, request.overrides, step=request.step)


def stop_when_closed(stream: int) -> None:
    """Send this process SIGTERM once the other end of the pipe `stream` is closed."""
    os.read(stream, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    threading.Thread(target=stop_when_closed, args=(0,), daemon=True).start()
    try:
        work(*sys.argv[1:])
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        if is_out_of_memory(error):
            sys.exit(f"error: out of memory; {LESS_MEMORY['compare']}")
        if exit_code(error) is None:
            raise
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
