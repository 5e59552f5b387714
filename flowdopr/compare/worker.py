"""One run of a study in a process of its own: train it, then make the cards that are missing.

    python -m flowdopr.compare.worker STUDY.yaml RUN_NAME

One process does both, because importing torch twice a run would cost more than a small run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flowdopr.compare.evaluations import missing_cards
from flowdopr.compare.plan import expand
from flowdopr.config import load_config
from flowdopr.evaluate import evaluate
from flowdopr.train import Interrupted, TrainingFailed, train


def work(study_file: str | Path, name: str) -> None:
    """Train and evaluate the run `name` of the study, going on where it was cut."""
    plan = {plan.name: plan for plan in expand(load_config(study_file))}[name]
    train(plan.config, resume=True)
    for request in missing_cards(plan):
        evaluate(plan.path, request.overrides, step=request.step)


def main() -> None:
    try:
        work(*sys.argv[1:])
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (TrainingFailed, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
