"""What a study would run, and how long that takes: `flowdopr compare --dry-run`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from statistics import median

from flowdopr.compare.cards import RunSnapshot, read_run
from flowdopr.compare.formats import count
from flowdopr.compare.plan import RunPlan, reported, study_settings
from flowdopr.compare.results import RunResult, read_result
from flowdopr.compare.statistics import chosen_trials
from flowdopr.compare.widen import searched
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
    study = study_settings(config)
    tuning = searched(config, lambda plans: [read_result(read_run(plan)) for plan in plans])
    workers = workers or study.workers
    lines, seconds, unknown = [], 0.0, 0
    every = [run.plan for run in tuning] + _reported(config, tuning)
    plans = {plan.name: plan for plan in every}.values()
    measured = {arm.name: _seconds_per_step(plans, arm.name) for arm in study.arms}
    known = [value for value in measured.values() if value is not None]
    for arm in study.arms:
        planned = [plan for plan in plans if plan.arm == arm.name]
        left = [run for run in map(read_run, planned) if not run.finished]
        steps = sum(map(_steps_left, left))
        per_step = measured[arm.name] or (median(known) if known else None)
        seconds += steps * (per_step or 0.0)
        unknown += steps * (per_step is None)
        tried = {run.plan.trial for run in tuning if run.plan.arm == arm.name}
        trials = count(len(tried), "trial")
        lines.append(
            f"{arm.name}: {trials}, {count(len(planned), 'run')} of {_lengths(planned)} steps; "
            f"left: {count(len(left), 'run')}, {steps:,} steps"
        )
    if study.widen and not all(run.ended for run in tuning):
        most = study.widen * len(study.arms) * len(study.tuning_seeds)
        lines.append(f"Wider grids may add up to {count(most, 'tuning run')}.")
    if unknown:
        lines.append("Training time: not known before runs of the study have logged steps.")
    else:
        time = timedelta(seconds=round(seconds / workers))
        lines.append(f"Training time left: {time}, {count(workers, 'run')} at a time.")
    return "\n".join(lines)


def _reported(config: Config, tuning: Sequence[RunResult]) -> list[RunPlan]:
    """The runs that are reported; until an arm's trial is chosen, its first one stands for it."""
    first = {run.plan.arm: run.plan for run in reversed(tuning)}
    chosen = {plan.arm: plan for plan in chosen_trials(tuning)}
    return reported(config, (first | chosen).values())


def _lengths(plans: Sequence[RunPlan]) -> str:
    lengths = [plan.config.train.steps for plan in plans]
    few, many = min(lengths), max(lengths)
    return f"{many:,}" if few == many else f"{few:,} to {many:,}"


def _seconds_per_step(plans: Iterable[RunPlan], arm: str) -> float | None:
    """The median over the logged windows of an arm's runs."""
    runs = [read_run(plan) for plan in plans if plan.arm == arm]
    lines = [line for run in runs if run.folder for line in run.folder.metrics()]
    found = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    return median(found) if found else None


def _steps_left(run: RunSnapshot) -> int:
    train = run.plan.config.train
    shared = train.steps - (train.cooldown_steps or 0) if run.plan.starts_from else 0
    return train.steps - max(run.steps, default=shared)
