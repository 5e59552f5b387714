"""What the numbers of a study say: spreads over seeds, the tuned learning rate, paired differences.

Every number is a mean over seeds with its sample standard deviation, never a minimum. `fd` stands
for the study's rollout metric, the Frechet distance in whichever feature space (FD or FID); lower
is better, as for the one-step loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import RunResult

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

    @property
    def fd(self) -> Spread | None:
        return spread(run.fd for run in self.runs)

    @property
    def one_step_loss(self) -> Spread | None:
        return spread(run.one_step_loss for run in self.runs)

    @property
    def label_accuracy(self) -> Spread | None:
        return spread(run.label_accuracy for run in self.runs)


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
        """The tuned rate; without one no rate has a finished run, and the first stands for all."""
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
        """Whether there are seeds enough and the interval leaves out zero."""
        if not self.enough_seeds or self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0


PairDifferences = tuple[PairedDifference, PairedDifference | None]
"""Of two arms: the difference in FD, and in one-step loss where both have one."""


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
        done = tuple(run for run in runs if run.plan.lr == lr and run.done)
        rates.append(RateSummary(first.arm, lr, done))
    # A learning rate at which seeds failed must not win by the seeds that survived.
    most = max(len(rate.runs) for rate in rates)
    eligible = [rate for rate in rates if rate.runs and len(rate.runs) == most]
    return ArmSummary(
        plan=first,
        rates=tuple(rates),
        tuned=_lowest(eligible, lambda rate: rate.fd),
        tuned_by_loss=_lowest(eligible, lambda rate: rate.one_step_loss),
    )


def _lowest(
    rates: list[RateSummary], metric: Callable[[RateSummary], Spread | None]
) -> RateSummary | None:
    known = [(value.mean, rate) for rate in rates if (value := metric(rate)) is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def ranked(arms: Sequence[ArmSummary]) -> list[tuple[Spread, RateSummary]]:
    """The tuned rate of each arm that has one, and its FD; the lowest mean first."""
    known = [(fd, arm.tuned) for arm in arms if arm.tuned and (fd := arm.tuned.fd)]
    return sorted(known, key=lambda pair: pair[0].mean)


def matched_pairs(arms: Sequence[ArmSummary]) -> list[tuple[ArmSummary, ArmSummary]]:
    """Each arm with DoPr beside the arm of the same optimizer without it.

    Two arms pair up when they also share every setting outside the section `optimizer`.
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
    found = []
    for first, second in matched_pairs(arms):
        if first.tuned is None or second.tuned is None:
            continue
        fd = paired_difference(metric, first.tuned, second.tuned, lambda run: run.fd)
        loss = paired_difference(
            "one-step loss", first.tuned, second.tuned, lambda run: run.one_step_loss
        )
        if fd is not None:
            found.append((fd, loss))
    return found


def paired_difference(
    metric: str,
    first: RateSummary,
    second: RateSummary,
    value: Callable[[RunResult], float | None],
) -> PairedDifference | None:
    """`value` of `first` minus `second` by seed; None when they share no finished seed."""
    of_first = {run.plan.seed: value(run) for run in first.runs}
    of_second = {run.plan.seed: value(run) for run in second.runs}
    by_seed = {}
    for seed in sorted(of_first.keys() & of_second.keys()):
        one, other = of_first[seed], of_second[seed]
        if one is not None and other is not None:
            by_seed[seed] = one - other
    found = spread(by_seed.values())
    if found is None:
        return None
    low, high = t_interval(found)
    return PairedDifference(metric, first.arm, second.arm, by_seed, found.mean, found.sd, low, high)


def t_interval(found: Spread) -> tuple[float | None, float | None]:
    """Student's t-interval of the mean at `CONFIDENCE`; (None, None) for a single value."""
    if found.sd is None:
        return None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1) * found.sd / math.sqrt(found.n)
    return found.mean - float(half), found.mean + float(half)
