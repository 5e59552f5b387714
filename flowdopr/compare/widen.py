"""One more learning rate for every arm, while the best one of any lies at the edge of its grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flowdopr.compare.plan import RunPlan, expand, study_settings, variant
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import ArmSummary, summarise
from flowdopr.config import Config

DIGITS = 3  # significant ones of a new learning rate


def searched(
    config: Config, results: Callable[[Sequence[RunPlan]], list[RunResult]]
) -> list[RunResult]:
    """The runs that choose each arm's trial, those of wider grids included.

    Args:
        results: of some plans, which it may run first. If some have not ended, no grid is widened
            yet, since the best rates are not known.
    """
    runs = results(expand(config))
    for _ in range(study_settings(config).widen):
        if all(run.ended for run in runs):
            runs += results(widened(config, summarise(runs)))
    return runs


def widened(config: Config, arms: Sequence[ArmSummary]) -> list[RunPlan]:
    """The runs of one more trial for each arm; none if no chosen rate lies at an edge.

    All arms get one, so that their budgets stay equal.
    """
    study = study_settings(config)
    if not any(at_an_edge(arm) for arm in arms):
        return []
    seeds = study.tuning_seeds or study.seeds
    return [
        variant(arm.chosen.plan, lr=next_rate(arm), seed=seed, study=config.name)
        for seed in seeds
        for arm in arms
        if arm.chosen is not None
    ]


def at_an_edge(arm: ArmSummary) -> bool:
    """Whether the chosen learning rate is the smallest or the largest of several tried."""
    if arm.chosen is None:
        return False
    rates = sorted(_distances(arm))
    return len(rates) > 1 and arm.chosen.lr in (rates[0], rates[-1])


def next_rate(arm: ArmSummary) -> float:
    """Beyond the edge by as much as the last two rates differ, or between the chosen rate and the
    better of its two neighbours, on a logarithmic scale."""
    assert arm.chosen is not None
    distances, best = _distances(arm), arm.chosen.lr
    rates = sorted(distances)
    place = rates.index(best)
    neighbours = [rates[i] for i in (place - 1, place + 1) if 0 <= i < len(rates)]
    nearest = min(neighbours, key=distances.__getitem__)
    rate = best**2 / nearest if len(neighbours) == 1 else math.sqrt(best * nearest)
    return float(f"{rate:.{DIGITS}g}")


def _distances(arm: ArmSummary) -> dict[float, float]:
    """The mean FD by learning rate, of the trials that share the chosen one's other settings;
    infinite where no run is finished."""
    assert arm.chosen is not None
    return {
        one.lr: fd.mean if (fd := one.spread("fd")) else math.inf
        for one in arm.trials
        if one.plan.searched == arm.chosen.plan.searched
    }
