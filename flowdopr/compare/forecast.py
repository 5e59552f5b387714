"""What a study would run, and how long that takes: `flowdopr compare --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from statistics import median

from flowdopr.compare.cards import RunSnapshot, read_run
from flowdopr.compare.formats import count
from flowdopr.compare.plan import RunPlan, expand, reported, study_settings
from flowdopr.compare.results import read_result
from flowdopr.compare.statistics import chosen_trials
from flowdopr.config import Config


def forecast(config: Config, *, workers: int | None = None) -> str:
    """The runs of each arm and those that are left, and the training time that they need.

    Times come from the steps that runs of the study have logged so far, of the same arm if it has
    any; evaluation is not counted.

    Args:
        workers: runs at the same time, in place of `compare.workers`.

    Raises:
        ConfigError: as `expand` and `read_run`.
    """
    study, plans = study_settings(config), expand(config)
    workers = workers or study.workers
    lines, seconds, unknown = [], 0.0, 0
    tuned = chosen_trials([read_result(read_run(plan)) for plan in plans if plan.tuning])
    measured = {arm.name: _seconds_per_step(plans, arm.name) for arm in study.arms}
    known = [value for value in measured.values() if value is not None]
    for arm in study.arms:
        own = [plan for plan in plans if plan.arm == arm.name]
        planned = _planned(own, tuned.get(arm.name))
        left = [run for run in map(read_run, planned) if not run.finished]
        steps = sum(map(_steps_left, left))
        per_step = measured[arm.name] or (median(known) if known else None)
        seconds += steps * (per_step or 0.0)
        unknown += steps * (per_step is None)
        trials = count(arm.trials, "trial")
        lines.append(
            f"{arm.name}: {trials}, {count(len(planned), 'run')} of "
            f"{planned[0].config.train.steps:,} steps; left: {count(len(left), 'run')}, "
            f"{steps:,} steps"
        )
    if unknown:
        lines.append("Training time: not known before runs of the study have logged steps.")
    else:
        time = timedelta(seconds=round(seconds / workers))
        lines.append(f"Training time left: {time}, {count(workers, 'run')} at a time.")
    return "\n".join(lines)


def _planned(own: Sequence[RunPlan], tuned: str | None) -> list[RunPlan]:
    """The runs of one arm; until tuning has chosen a trial, the first stands for it."""
    tuning = [plan for plan in own if plan.tuning]
    stand_in = next(plan.trial for plan in own)
    return [*tuning, *reported(own, {own[0].arm: tuned or stand_in})]


def _seconds_per_step(plans: Sequence[RunPlan], arm: str) -> float | None:
    """The median over the logged windows of an arm's runs."""
    runs = [read_run(plan) for plan in plans if plan.arm == arm]
    lines = [line for run in runs if run.folder for line in run.folder.metrics()]
    found = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    return median(found) if found else None


def _steps_left(run: RunSnapshot) -> int:
    return run.plan.config.train.steps - max(run.steps, default=0)
