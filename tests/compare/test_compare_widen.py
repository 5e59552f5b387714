"""Where the best learning rate lies at the edge, every arm tries one more."""

from dataclasses import replace

import pytest

from flowdopr.compare.forecast import forecast
from flowdopr.compare.plan import expand
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.statistics import summarise
from flowdopr.compare.widen import searched, widened
from flowdopr.config import apply_overrides

ARMS = "compare.arms=[{name: a, lrs: [1e-3, 2e-3, 8e-3]}, {name: b, lrs: [1e-3, 2e-3, 8e-3]}]"


def results(study, fds):
    """One finished run for each trial of each arm, with the FDs of `fds` by arm."""
    plans = expand(apply_overrides(study, [ARMS, "compare.tuning_seeds=[7]"]))
    values = {arm: iter(own) for arm, own in fds.items()}
    return [
        RunResult(replace(plan), final=Evaluation(8, fd=next(values[plan.arm]))) for plan in plans
    ]


@pytest.mark.parametrize(
    ("first", "second", "rates"),
    [
        ([3, 2, 1], [1, 2, 3], [0.032, 0.0005]),  # beyond both edges, by the last ratios
        ([3, 2, 1], [3, 1, 2], [0.032, 0.004]),  # b lies inside: towards the better neighbour
        ([3, 2, 1], [2, 1, 3], [0.032, 0.00141]),
        ([3, 1, 2], [2, 1, 3], []),
    ],
)
def test_one_more_rate_for_every_arm_or_for_none(study, first, second, rates):
    arms = summarise(results(study, {"a": first, "b": second}))
    more = widened(apply_overrides(study, [ARMS, "compare.tuning_seeds=[7, 8]"]), arms)
    assert [plan.lr for plan in more] == rates * 2
    assert [plan.seed for plan in more] == [7] * len(rates) + [8] * len(rates)
    assert [plan.config.optimizer.lr for plan in more] == rates * 2
    assert all(plan.tuning for plan in more)


def test_an_arm_without_a_finished_run_does_not_widen(study):
    arms = summarise(
        [replace(run, status="failed") for run in results(study, {"a": [1, 2, 3], "b": [1, 2, 3]})]
    )
    assert widened(apply_overrides(study, [ARMS, "compare.tuning_seeds=[7]"]), arms) == []


def test_a_dry_run_says_what_a_wider_grid_may_add(study):
    tuned = apply_overrides(study, [ARMS, "compare.tuning_seeds=[7, 8]", "compare.widen=2"])
    assert "Wider grids may add up to 8 tuning runs." in forecast(tuned).splitlines()


def test_no_grid_is_widened_before_its_runs_have_ended(study):
    config = apply_overrides(study, [ARMS, "compare.tuning_seeds=[7]", "compare.widen=3"])

    def ended(plans):
        return [RunResult(plan, final=Evaluation(8, fd=1 / plan.lr)) for plan in plans]

    def not_started(plans):
        return [RunResult(plan, "not started") for plan in plans]

    assert len(searched(config, ended)) == 6 + 3 * 2
    assert len(searched(config, not_started)) == 6
