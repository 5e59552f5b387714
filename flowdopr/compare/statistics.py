"""The statistics of a study: spreads over seeds, tuned learning rates, paired differences.

Every number is a mean over seeds with its sample standard deviation, never a minimum. `fd` stands
for the study's rollout metric, the Frechet distance in whichever feature space (FD or FID); lower
is better, as for the one-step loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Metric, RunResult

FEWEST_SEEDS_FOR_A_CLAIM = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; `sd` is None when n is 1."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class RateSummary:
    """One arm at one learning rate: its finished runs, one for each seed."""

    arm: str
    lr: float
    runs: tuple[RunResult, ...]
    failed: int = 0
    """Runs that failed, and so are in no mean."""

    def spread(self, metric: Metric) -> Spread | None:
        """The spread of a metric over the seeds; None if no seed has it."""
        return spread(run.value(metric) for run in self.runs)


@dataclass(frozen=True)
class ArmSummary:
    """One arm: its results by learning rate, and the rate chosen by the rollout metric."""

    plan: RunPlan
    """The arm's first run, for the settings that all its runs share."""
    rates: tuple[RateSummary, ...]
    """By learning rate, ascending."""
    tuned: RateSummary | None
    """The rate of the lowest mean FD among those with the most finished seeds; None if no run is
    finished."""
    tuned_by_loss: RateSummary | None
    """The rate that the mean one-step loss would have chosen instead."""

    @property
    def name(self) -> str:
        return self.plan.arm

    @property
    def reported(self) -> RateSummary:
        """The tuned rate; the first rate if no run is finished, where all rates are empty."""
        return self.tuned or self.rates[0]


@dataclass(frozen=True)
class PairedDifference:
    """`first` minus `second` on the seeds that both finished, each at its tuned learning rate."""

    metric: str
    first: str
    second: str
    by_seed: dict[int, float]
    mean: float
    sd: float | None
    low: float | None
    """Lower end of the 95 % t-interval of the mean difference; None for a single seed."""
    high: float | None

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def enough_seeds(self) -> bool:
        return self.n >= FEWEST_SEEDS_FOR_A_CLAIM

    @property
    def shown(self) -> bool:
        """Whether there are enough seeds and the interval excludes zero."""
        if self.low is None or self.high is None:
            return False
        return self.enough_seeds and (self.low > 0 or self.high < 0)


PairDifferences = tuple[PairedDifference, PairedDifference | None]
"""The differences of two arms in FD and, where both have one, in one-step loss."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are not None; None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Spread(float(np.mean(known)), sd, len(known))


def summarise(runs: Sequence[RunResult]) -> list[ArmSummary]:
    """One summary for each arm, in the order in which the arms first occur in `runs`."""
    arms = dict.fromkeys(run.plan.arm for run in runs)
    return [_summarise_arm([run for run in runs if run.plan.arm == arm]) for arm in arms]


def _summarise_arm(runs: list[RunResult]) -> ArmSummary:
    first = runs[0].plan
    rates = []
    for lr in sorted({run.plan.lr for run in runs}):
        own = [run for run in runs if run.plan.lr == lr]
        failed = sum(run.status == "failed" for run in own)
        rates.append(RateSummary(first.arm, lr, tuple(run for run in own if run.done), failed))
    # A learning rate at which seeds failed must not win by the seeds that survived.
    most = max(len(rate.runs) for rate in rates)
    eligible = [rate for rate in rates if rate.runs and len(rate.runs) == most]
    return ArmSummary(
        plan=first,
        rates=tuple(rates),
        tuned=_lowest(eligible, "fd"),
        tuned_by_loss=_lowest(eligible, "one_step_loss"),
    )


def _lowest(rates: Iterable[RateSummary], metric: Metric) -> RateSummary | None:
    """The rate of the lowest mean; None if no rate has the metric."""
    return next((rate for _, rate in _by_mean(rates, metric)), None)


def ranked(arms: Sequence[ArmSummary]) -> list[tuple[Spread, RateSummary]]:
    """The FD and the tuned rate of each arm that has one, the lowest mean first."""
    return _by_mean((arm.tuned for arm in arms if arm.tuned), "fd")


def _by_mean(rates: Iterable[RateSummary], metric: Metric) -> list[tuple[Spread, RateSummary]]:
    pairs = [(values, rate) for rate in rates if (values := rate.spread(metric)) is not None]
    return sorted(pairs, key=lambda pair: pair[0].mean)


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


def pair_differences(metric: str, arms: Sequence[ArmSummary]) -> list[PairDifferences]:
    """The differences of each matched pair that shares a finished seed; `metric` names `fd`."""
    differences = []
    for first, second in matched_pairs(arms):
        if first.tuned is None or second.tuned is None:
            continue
        fd = paired_difference(metric, first.tuned, second.tuned, "fd")
        loss = paired_difference("one-step loss", first.tuned, second.tuned, "one_step_loss")
        if fd is not None:
            differences.append((fd, loss))
    return differences


def paired_difference(
    name: str, first: RateSummary, second: RateSummary, metric: Metric
) -> PairedDifference | None:
    """`metric` of `first` minus `second` by seed; None if no seed has both. `name` is its title."""
    subtracted = {run.plan.seed: run.value(metric) for run in second.runs}
    by_seed = {}
    for run in sorted(first.runs, key=lambda run: run.plan.seed):
        one, other = run.value(metric), subtracted.get(run.plan.seed)
        if one is not None and other is not None:
            by_seed[run.plan.seed] = one - other
    values = spread(by_seed.values())
    if values is None:
        return None
    low, high = t_interval(values)
    return PairedDifference(name, first.arm, second.arm, by_seed, values.mean, values.sd, low, high)


def t_interval(values: Spread) -> tuple[float | None, float | None]:
    """Student's t-interval of the mean at `CONFIDENCE`; (None, None) for a single value."""
    if values.sd is None:
        return None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, values.n - 1) * values.sd / math.sqrt(values.n)
    return values.mean - float(half), values.mean + float(half)
