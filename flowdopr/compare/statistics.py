"""The statistics of a study: spreads over seeds, tuned learning rates, claims about pairs of arms.

Every number is a mean over seeds with its sample standard deviation, never a minimum. `fd` stands
for the study's rollout metric, the Frechet distance in whichever feature space (FD or FID); lower
is better, as for the one-step loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import stats

from flowdopr.compare.claims import Claim, LogRatios, claim, holm, log_ratios
from flowdopr.compare.matched import at_equal_loss, at_equal_time
from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Metric, RunResult, with_shorter

AT_EQUAL_STEPS, AT_EQUAL_LOSS, AT_EQUAL_TIME = "at equal steps", "at equal loss", "at equal time"
ONE_STEP_LOSS = "one-step loss"
FEWEST_TO_CORRELATE = 4  # runs
DRAWS = 10_000
COVERED = 0.99  # of these draws, so that the four or so arms of a study are covered together


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; `sd` is None when n is 1."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class TrialSummary:
    """One trial of an arm: its finished runs, one for each seed."""

    plan: RunPlan
    """Of one of its runs, finished or not."""
    runs: tuple[RunResult, ...]
    failed: int = 0
    """Runs that failed, and so are in no mean."""

    @property
    def arm(self) -> str:
        return self.plan.arm

    @property
    def trial(self) -> str:
        return self.plan.trial

    @property
    def lr(self) -> float:
        return self.plan.lr

    def by_seed(self, metric: Metric) -> dict[int, list[float | None]]:
        """The metric at the last checkpoint, for each evaluation seed, by seed."""
        return {
            run.plan.seed: [getattr(one, metric) for one in (run.final, *run.by_noise) if one]
            for run in self.runs
        }

    def spread(self, metric: Metric) -> Spread | None:
        """The spread of a metric over the seeds; None if no seed has it."""
        return spread(run.value(metric) for run in self.runs)


@dataclass(frozen=True)
class ArmSummary:
    """One arm: its results by trial, and the trial chosen by the rollout metric."""

    plan: RunPlan
    """The arm's first run, for the settings that all its runs share."""
    trials: tuple[TrialSummary, ...]
    """Those among which one is chosen, by learning rate: of the tuning seeds if there are any."""
    chosen: TrialSummary | None
    """The one of the lowest mean FD among those with the most finished seeds; None if no run is
    finished."""
    reported: TrialSummary
    """The runs to report, those of the chosen trial; of the first one if none is chosen."""
    tuned_by_loss: TrialSummary | None
    """The trial that the mean one-step loss would have chosen instead."""

    @property
    def name(self) -> str:
        return self.plan.arm

    @property
    def tuned(self) -> TrialSummary | None:
        """`reported`; None if none of its runs is finished."""
        return self.reported if self.reported.runs else None

    def regret(self, noise: float) -> float:
        """How much lower log FD might be with another trial, as far as the tuning seeds can tell;
        0 where the reported seeds choose the trial.

        The mean log FD of each trial gets the noise of its seeds, many times; the regret is the
        distance of the chosen trial from the lowest, below which it is in 99 % of these draws.

        Args:
            noise: standard deviation of a run's log FD.
        """
        if self.chosen is None or not self.chosen.plan.tuning:
            return 0.0
        seeds = len(self.chosen.runs)
        logs = {one.trial: logs for one in self.trials if len(logs := _log_fd(one)) == seeds}
        if self.chosen.trial not in logs:
            return 0.0
        draws = np.random.default_rng(0).normal(size=(DRAWS, len(logs)))
        drawn = np.mean(list(logs.values()), 1) + noise / math.sqrt(seeds) * draws
        lost = drawn[:, list(logs).index(self.chosen.trial)] - drawn.min(1)
        return float(np.quantile(lost, COVERED))

    @property
    def every_trial(self) -> tuple[TrialSummary, ...]:
        """`trials`, and `tuned` where other seeds chose it."""
        apart = self.tuned is not None and self.tuned not in self.trials
        return (*self.trials, self.tuned) if apart and self.tuned else self.trials


def _log_fd(trial: TrialSummary) -> list[float]:
    return [math.log(fd) for run in trial.runs if (fd := run.value("fd")) is not None and fd > 0]


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are not None; None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    with np.errstate(over="ignore"):  # of samples that are nothing like images
        sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Spread(float(np.mean(known)), sd, len(known))


def summarise(runs: Sequence[RunResult]) -> list[ArmSummary]:
    """One summary for each arm, in the order in which the arms first occur in `runs`."""
    runs = with_shorter(runs)
    arms = dict.fromkeys(run.plan.arm for run in runs)
    return [_summarise_arm([run for run in runs if run.plan.arm == arm]) for arm in arms]


def chosen_trials(runs: Sequence[RunResult]) -> list[RunPlan]:
    """A run of the trial that each arm's runs choose, for arms with finished runs."""
    return [arm.chosen.plan for arm in summarise(runs) if arm.chosen is not None]


def _summarise_arm(runs: list[RunResult]) -> ArmSummary:
    trials = _by_trial([run for run in runs if run.plan.tuning] or runs)
    # A trial of which seeds failed must not win by the seeds that survived.
    most = max(len(trial.runs) for trial in trials)
    eligible = [trial for trial in trials if trial.runs and len(trial.runs) == most]
    best = _lowest(eligible, "fd")
    of_best = best or trials[0]
    own = _by_trial([run for run in runs if not run.plan.tuning])
    unfinished = replace(of_best, runs=(), failed=0)
    return ArmSummary(
        plan=runs[0].plan,
        trials=trials,
        chosen=best,
        reported=next((one for one in own if one.trial == of_best.trial), unfinished),
        tuned_by_loss=_lowest(eligible, "one_step_loss"),
    )


def _by_trial(runs: Sequence[RunResult]) -> tuple[TrialSummary, ...]:
    """The finished runs of each trial, by learning rate, ascending."""
    trials: dict[str, list[RunResult]] = {}
    for run in sorted(runs, key=lambda run: run.plan.lr):
        trials.setdefault(run.plan.trial, []).append(run)
    return tuple(
        TrialSummary(
            own[0].plan,
            tuple(run for run in own if run.done),
            sum(run.status == "failed" for run in own),
        )
        for own in trials.values()
    )


def _lowest(trials: Iterable[TrialSummary], metric: Metric) -> TrialSummary | None:
    """The trial of the lowest mean; None if none has the metric."""
    return next((trial for _, trial in _by_mean(trials, metric)), None)


def ranked(arms: Sequence[ArmSummary]) -> list[tuple[Spread, TrialSummary]]:
    """The FD and the tuned trial of each arm that has one, the lowest mean first."""
    return _by_mean((arm.tuned for arm in arms if arm.tuned), "fd")


def _by_mean(trials: Iterable[TrialSummary], metric: Metric) -> list[tuple[Spread, TrialSummary]]:
    pairs = [(values, one) for one in trials if (values := one.spread(metric)) is not None]
    return sorted(pairs, key=lambda pair: pair[0].mean)


def rank_correlations(arms: Sequence[ArmSummary]) -> dict[str, float]:
    """Spearman's correlation of the one-step loss with FD at the ends of runs: does the loss
    predict the samples? Over the runs of all arms under "", and within each arm under its name;
    without those of fewer than four runs."""
    points = {arm.name: _ends(arm) for arm in arms}
    sets = {"": [point for own in points.values() for point in own], **points}
    found = {}
    for name, own in sets.items():
        loss, fd = np.array(own).reshape(-1, 2).T
        if len(own) >= FEWEST_TO_CORRELATE and np.ptp(loss) > 0 and np.ptp(fd) > 0:
            found[name] = stats.spearmanr(loss, fd).statistic.item()  # pyright: ignore
    return found


def _ends(arm: ArmSummary) -> list[tuple[float, float]]:
    runs = [run for trial in arm.every_trial for run in trial.runs]
    pairs = [(run.value("one_step_loss"), run.value("fd")) for run in runs]
    return [(loss, fd) for loss, fd in pairs if loss is not None and fd is not None]


def matched_pairs(arms: Sequence[ArmSummary]) -> list[tuple[ArmSummary, ArmSummary]]:
    """Each arm with DoPr and the arm of the same optimizer without it.

    Two arms are a pair only if they share every setting outside the section `optimizer`.
    """
    return [
        (first, second)
        for first in arms
        for second in arms
        if first.plan.dopr
        and not second.plan.dopr
        and first.plan.optimizer == second.plan.optimizer
        and first.plan.other_settings == second.plan.other_settings
    ]


@dataclass(frozen=True)
class Comparisons:
    """All claims of a study, corrected by Holm together."""

    pairs: list[list[Claim]]
    """Of each matched pair that shares a finished seed: FD at equal steps, equal loss and equal
    time, where the pair has them; and, uncorrected because nothing is claimed of it, the loss."""
    others: list[Claim]
    """FD at equal steps of every other two arms."""

    def all(self) -> list[Claim]:
        return [one for pair in self.pairs for one in pair] + self.others

    def worse_than(self, arm: str) -> set[str]:
        """The arms whose FD at equal steps is shown to be higher than that of `arm`."""
        shown = [one for one in self.all() if one.shown and one.measure.endswith(AT_EQUAL_STEPS)]
        return {one.second for one in shown if one.first == arm and one.ratio < 1} | {
            one.first for one in shown if one.second == arm and one.ratio > 1
        }


def compare_arms(metric: str, arms: Sequence[ArmSummary]) -> Comparisons:
    """Compare every two arms that share a finished seed; `metric` names `fd`."""
    matched = {(first.name, second.name): (first, second) for first, second in matched_pairs(arms)}
    found = [one for pair in matched.values() for one in _claims_of(metric, *pair, matched=True)]
    for first, second in combinations(arms, 2):
        if not {(first.name, second.name), (second.name, first.name)} & matched.keys():
            found += _claims_of(metric, first, second, matched=False)
    corrected = holm([one for one in found if one.measure != ONE_STEP_LOSS])
    corrected += [one for one in found if one.measure == ONE_STEP_LOSS]
    pairs = [[one for one in corrected if (one.first, one.second) == pair] for pair in matched]
    others = [one for one in corrected if (one.first, one.second) not in matched]
    with_fd = [pair for pair in pairs if any(one.measure != ONE_STEP_LOSS for one in pair)]
    return Comparisons(with_fd, others)


def _claims_of(metric: str, first: ArmSummary, second: ArmSummary, *, matched: bool) -> list[Claim]:
    """The claims of two arms before Holm's correction, those of `Comparisons` in their order."""
    one, other = first.tuned, second.tuned
    if one is None or other is None:
        return []
    steps, time = f"{metric} {AT_EQUAL_STEPS}", f"{metric} {AT_EQUAL_TIME}"
    logs = {steps: paired_logs(one, other, "fd")}
    if matched:
        logs |= {
            f"{metric} {AT_EQUAL_LOSS}": _by_seed(one, other, at_equal_loss),
            time: _by_seed(one, other, at_equal_time),
            ONE_STEP_LOSS: paired_logs(one, other, "one_step_loss"),
        }
    noise = _run_noise([values[0] for values in logs[steps].values()])
    regrets = {name: (first.regret(noise), second.regret(noise)) for name in (steps, time)}
    claims = [
        claim(name, first.name, second.name, values, regrets.get(name, (0.0, 0.0)))
        for name, values in logs.items()
    ]
    return [one for one in claims if one is not None]


def _run_noise(logs: Sequence[float]) -> float:
    """Standard deviation of a run's log FD, from log ratios of two runs each."""
    return float(np.std(logs, ddof=1)) / math.sqrt(2) if len(logs) > 1 else 0.0


def paired_logs(first: TrialSummary, second: TrialSummary, metric: Metric) -> LogRatios:
    """log of `metric` of `first` over that of `second`, by seed and evaluation seed."""
    return log_ratios(first.by_seed(metric), second.by_seed(metric))


def _by_seed(
    first: TrialSummary,
    second: TrialSummary,
    matched: Callable[[RunResult, RunResult], float | None],
) -> LogRatios:
    others = {run.plan.seed: run for run in second.runs}
    pairs = [(run, others[run.plan.seed]) for run in first.runs if run.plan.seed in others]
    found = {one.plan.seed: matched(one, other) for one, other in pairs}
    return {seed: [value] for seed, value in sorted(found.items()) if value is not None}
