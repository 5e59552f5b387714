"""Means, deviations, tuned rates and paired intervals, against hand computation and scipy."""

import math

import pytest
from scipy import stats

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.statistics import (
    RateSummary,
    matched_pairs,
    paired_difference,
    spread,
    summarise,
)
from flowdopr.compare.study import build_study
from flowdopr.config import Config, apply_overrides

CONFIG = Config.model_validate(
    {
        "name": "tiny",
        "data": {"name": "digits"},
        "model": {"name": "dit"},
        "train": {"steps": 10, "global_batch_size": 8},
    }
)


def result(arm, lr, seed, fd=None, loss=1.0, optimizer="adamw"):
    config = apply_overrides(CONFIG, [f"name=tiny/{arm}-{seed}", f"optimizer.name={optimizer}"])
    plan = RunPlan(arm, lr, seed, config)
    if fd is None:
        return RunResult(plan, "failed")
    return RunResult(plan, final=Evaluation(step=10, fd=fd, one_step_loss=loss))


def rate(arm, distances):
    return RateSummary(arm, 0.1, tuple(result(arm, 0.1, seed, d) for seed, d in distances.items()))


def verdict(runs):
    return build_study(CONFIG, runs).verdict


def test_spread_is_the_sample_deviation():
    found = spread([1.0, 2.0, 4.0, None])
    assert found.mean == pytest.approx(7 / 3)
    assert found.sd == pytest.approx(math.sqrt(7 / 3))  # (16/9 + 1/9 + 25/9) / 2
    assert found.n == 3
    assert spread([5.0]).sd is None
    assert spread([None]) is None


def test_the_rollouts_choose_the_rate_and_the_mean_decides():
    runs = [
        # The single best run (1.0) is at 0.1, the best mean at 0.2.
        *(result("a", 0.1, seed, fd, loss=0.5) for seed, fd in enumerate([1.0, 9.0])),
        *(result("a", 0.2, seed, fd, loss=0.6) for seed, fd in enumerate([3.0, 4.0])),
    ]
    (arm,) = summarise(runs)
    assert arm.tuned.lr == 0.2
    assert arm.tuned.spread("fd").mean == 3.5
    assert arm.tuned_by_loss.lr == 0.1


def test_a_rate_whose_seeds_failed_cannot_win_by_the_survivors():
    runs = [result("a", 0.1, 0, 9.0), result("a", 0.1, 1, 9.0)]
    runs += [result("a", 0.9, 0, 1.0), result("a", 0.9, 1, None)]
    assert summarise(runs)[0].tuned.lr == 0.1


def test_an_arm_without_a_finished_run_has_no_rate():
    (arm,) = summarise([result("a", 0.1, 0, None)])
    assert arm.tuned is None
    assert arm.tuned_by_loss is None


def test_paired_difference_is_scipys_interval():
    first = {0: 1.0, 1: 2.5, 2: 2.0, 3: 4.0}
    second = {0: 2.0, 1: 3.0, 2: 3.5, 3: 4.5, 7: 100.0}  # seed 7 has no partner
    found = paired_difference("FD", rate("dopr", first), rate("plain", second), "fd")
    assert found.by_seed == {0: -1.0, 1: -0.5, 2: -1.5, 3: -0.5}
    reference = stats.ttest_rel([*first.values()], [second[seed] for seed in first])
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(-0.875)
    assert found.shown


def test_few_seeds_show_nothing_however_clear_they_look():
    found = paired_difference("FD", rate("a", {0: 1.0, 1: 1.0}), rate("b", {0: 9.0, 1: 9.1}), "fd")
    assert found.high < 0
    assert not found.shown
    single = paired_difference("FD", rate("a", {0: 1.0}), rate("b", {0: 9.0}), "fd")
    assert (single.sd, single.low, single.high, single.shown) == (None, None, None, False)


def test_no_shared_seed_no_difference():
    assert paired_difference("FD", rate("a", {0: 1.0}), rate("b", {1: 9.0}), "fd") is None


def test_pairs_are_an_optimizer_with_and_without_activation_preconditioning():
    optimizers = ["adamw", "dopr-adamw", "muon", "dopr-muon", "dopr-sgd"]
    summaries = summarise([result(name, 0.1, 0, 1.0, optimizer=name) for name in optimizers])
    pairs = [(first.name, second.name) for first, second in matched_pairs(summaries)]
    assert pairs == [("dopr-adamw", "adamw"), ("dopr-muon", "muon")]


def study_of(pairs, seeds):
    return [
        result(name, 0.1, seed, fd + 0.01 * seed, loss, optimizer=name)
        for name, fd, loss in pairs
        for seed in range(seeds)
    ]


def test_verdict_names_winner_and_disagreement():
    runs = study_of([("adamw", 5.0, 0.4), ("dopr-adamw", 3.0, 0.5)], seeds=2)
    said = verdict(runs)
    assert said.headline.startswith(
        "The samples of dopr-adamw came closest to the data: FD 3.00 ± 0.01, ahead of adamw"
    )
    assert "lowest one-step loss was adamw's: 0.4000, against 0.5000" in said.headline
    assert "not a claim" in said.headline
    assert said.pairs == [
        "dopr-adamw against adamw: FD lower by 2.00 (lower in 2 of 2 seeds); "
        "one-step loss higher by 0.100 (higher in 2 of 2 seeds). 2 seeds: too few for a claim."
    ]
    assert said.notes == ["Every arm had the same tuning budget: 1 learning rate × 2 seeds."]


def test_verdict_with_seeds_enough_gives_the_interval():
    runs = [
        result(name, 0.1, seed, fd, optimizer=name)
        for name, distances in (("adamw", [5.0, 5.2, 5.4]), ("dopr-adamw", [4.0, 4.4, 4.3]))
        for seed, fd in enumerate(distances)
    ]
    said = verdict(runs)
    assert "not a claim" not in said.headline
    assert said.pairs[0].endswith("leaves out zero.")
    assert "t-interval" in said.pairs[0]


def test_unequal_budgets_and_grid_edges_are_said():
    runs = [result("a", lr, 0, lr) for lr in (0.1, 0.2, 0.3)] + [result("b", 0.1, 0, None)]
    notes = " ".join(verdict(runs).notes)
    assert "not equal: a 3 learning rates and b 1 learning rate" in notes
    assert "edge of its grid" in notes
    assert "1 run failed, which no mean includes: b-0" in notes
