"""Means, deviations, tuned rates and paired intervals, against hand computation and scipy."""

import math
import random
from dataclasses import replace

import pytest
from scipy import stats

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.statistics import (
    matched_pairs,
    rank_correlations,
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


def test_verdict_with_few_seeds_is_an_observation():
    runs = study_of([("adamw", 5.0, 0.4), ("dopr-adamw", 3.0, 0.5)], seeds=2)
    said = verdict(runs)
    assert said.headline == (
        "dopr-adamw had the lowest mean FD, 3.00 ± 0.01, but is not told apart from adamw "
        "(5.00 ± 0.01). The lowest mean one-step loss was adamw's: 0.4000, against 0.5000. "
        "With 2 seeds an arm this is an observation, not a claim."
    )
    (pair,) = said.pairs
    assert pair.startswith("dopr-adamw over adamw: FD at equal steps 0.600 (0.")
    assert pair.endswith("one-step loss 1.25 (1.25 to 1.25). 2 seeds: too few for a claim.")
    assert said.notes == [
        "Each arm has one trial, which its config gives: this study tuned nothing.",
        "Rank correlation of the one-step loss with FD at the ends of runs: −0.89 over all runs.",
    ]


def by_arm(**distances):
    """Runs of arms named after their optimizers, an underscore for a hyphen, seed by seed."""
    return [
        result(arm, 0.1, seed, fd, optimizer=arm)
        for name, values in distances.items()
        for seed, fd in enumerate(values)
        for arm in [name.replace("_", "-")]
    ]


def test_verdict_claims_what_the_seeds_show():
    said = verdict(by_arm(adamw=[5.0, 5.2, 5.4], dopr_adamw=[4.0, 4.2, 4.3]))
    assert said.headline.startswith(
        "The samples of dopr-adamw are closest to the data: FD 4.17 ± 0.15, ahead of adamw"
    )
    assert "The mean one-step loss of all is the same: 1.000." in said.headline
    assert "Shown after Holm's correction over 1 claim: FD at equal steps is lower" in said.pairs[0]


def test_verdict_names_no_winner_that_the_seeds_do_not_show():
    said = verdict(by_arm(adamw=[1.0, 0.7, 1.3], dopr_adamw=[0.99, 0.71, 1.29]))
    assert "dopr-adamw had the lowest mean FD" in said.headline
    assert "but is not told apart from adamw" in said.headline
    assert "No difference is shown after Holm's correction over 1 claim" in said.pairs[0]
    assert "ratios between 0.967 and 1.03 could not have been seen" in said.pairs[0]


SAME = "The mean one-step loss of all is the same: 1.000."
FEW = "With 1 seed an arm this is an observation, not a claim."


@pytest.mark.parametrize(
    ("distances", "headline"),
    [
        ({"a": [None, None]}, "No run has finished, so there is nothing to compare."),
        ({"a": [2.0, 4.0]}, "a alone has finished runs: FD 3.00 ± 1.41 (2 seeds)."),
        (
            {"a": [2.0, None], "b": [None, None]},
            "a alone has finished runs: FD 2.00 (1 seed). No run of b has finished. 1 of the 2 "
            "seeds of a failed and is in no mean.",
        ),
        (
            {"a": [5.0, 5.2, 5.4], "b": [5.0, 5.2, 5.4]},
            f"a and b share the lowest mean FD, 5.20 ± 0.20. {SAME}",
        ),
        (
            {"a": [5.0, 5.2, 5.4], "b": [5.0, 5.2, 5.4], "c": [9.0, 9.1, 9.2]},
            "a and b share the lowest mean FD, 5.20 ± 0.20, ahead of c (9.10 ± 0.10). " + SAME,
        ),
        (
            {"a": [5.0, 5.2, 5.4], "b": [5.0, 5.2, 5.4], "c": [5.5, 5.0, 9.9]},
            "a and b share the lowest mean FD, 5.20 ± 0.20, but are not told apart from c "
            f"(6.80 ± 2.70). {SAME}",
        ),
        (
            {"a": [5.0, 5.2, 5.4], "b": [4.0, 4.1, 4.4], "c": [3.9, 4.2, 4.35]},
            "c had the lowest mean FD, 4.15 ± 0.23, ahead of a (5.20 ± 0.20), but is not told "
            f"apart from b (4.17 ± 0.21). {SAME}",
        ),
        (
            # b is lower in each seed that a has, but has a bad one more.
            {"a": [5.0, 5.2, 5.4, None], "b": [4.0, 4.2, 4.3, 99.0]},
            "a had the lowest mean FD, 5.20 ± 0.20; paired by seed, b (27.9 ± 47.4) is shown to "
            f"be lower. {SAME} 1 of the 4 seeds of a failed and is in no mean.",
        ),
        (
            {"a": [0.0], "b": [1e30]},
            "a had the lowest mean FD, 0.00, but is not told apart from b (1.00e+30). "
            f"{SAME} {FEW}",
        ),
    ],
)
def test_headlines(distances, headline):
    runs = [
        result(arm, 0.1, seed, fd) for arm, own in distances.items() for seed, fd in enumerate(own)
    ]
    assert verdict(runs).headline == headline


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, 1.0], "The mean one-step loss of all is the same: 1.000."),
        ([1.0, 2.0], "Its mean one-step loss is the lowest, too: 1.000."),
        ([2.0, 1.0], "The lowest mean one-step loss was b's: 1.000, against 2.000."),
        ([None, 1.0], "The lowest mean one-step loss was b's: 1.000."),
        ([None, None], ""),
    ],
)
def test_the_headline_says_whose_loss_was_lowest(losses, words):
    runs = [
        result(arm, 0.1, 0, fd, loss)
        for arm, fd, loss in zip("ab", (1.0, 2.0), losses, strict=True)
    ]
    start, end = "a had the lowest mean FD, 1.00, but is not told apart from b (2.00).", FEW
    assert verdict(runs).headline == " ".join(filter(None, [start, words, end]))


def test_one_family_of_claims_is_corrected_together():
    """Every two arms at equal steps, and the two pairs at equal loss and time: 6 + 2 x 2 claims."""
    rng = random.Random(0)
    runs = by_arm(
        **{
            name: [rng.gauss(5, 1) for _ in range(3)]
            for name in ("adamw", "dopr_adamw", "muon", "dopr_muon")
        }
    )
    runs = [
        replace(
            run,
            curve=(replace(run.final, step=5, one_step_loss=2.0, fd=9.0), run.final),
            seconds_per_step=1.0,
        )
        for run in runs
    ]
    study = build_study(CONFIG, runs)
    tested = [one for one in study.comparisons.all() if one.p_holm is not None]
    assert len(tested) == 10
    smallest = min(tested, key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(min(1, 10 * smallest.p))
    assert "over 10 claims" in study.verdict.pairs[0]


def test_a_measure_with_few_seeds_does_not_hide_the_others():
    runs = by_arm(adamw=[5.0, 5.2, 5.4], dopr_adamw=[4.0, 4.2, 4.3])
    timed = [
        replace(run, curve=(replace(run.final, step=5), run.final), seconds_per_step=1.0)
        if run.plan.seed < 2
        else run
        for run in runs
    ]
    (pair,) = verdict(timed).pairs
    assert "FD at equal steps is lower (p = " in pair
    assert pair.endswith("FD at equal time: 2 seeds, too few for a claim.")
    once = [replace(run, curve=()) if run.plan.seed == 1 else run for run in timed]
    (pair,) = verdict(once).pairs
    assert "over 1 claim:" in pair  # of one seed, nothing is tested


def test_a_pair_without_a_ratio_is_explained():
    said = verdict(by_arm(adamw=[5.0, 5.2], dopr_adamw=[0.0, None]))
    assert said.pairs == []
    words = "dopr-adamw over adamw: no ratio, because in no seed both have a positive FD."
    assert words in said.notes


def test_doubtful_tuning_widens_the_claims_that_it_touches():
    """Trials that one tuning seed cannot tell apart, or can: the ratio is the same, not p."""

    def study_with(distances):
        runs = []
        for arm, fds in (("adamw", distances), ("dopr-adamw", [1.0, 2.0])):
            for lr, fd in zip((0.1, 0.2), fds, strict=True):
                run = result(arm, lr, 9, fd, optimizer=arm)
                runs.append(replace(run, plan=replace(run.plan, tuning=True)))
        reported = by_arm(adamw=[5.0, 5.2, 5.4], dopr_adamw=[4.0, 4.2, 4.3])
        return build_study(CONFIG, runs + reported).comparisons.pairs[0][0]

    clear, doubtful = study_with([1.0, 2.0]), study_with([1.0, 1.0])
    assert clear.ratio == doubtful.ratio
    assert clear.p < doubtful.p
    assert clear.interval[0] == doubtful.interval[0]  # DoPr's own tuning is clear
    assert clear.interval[1] < doubtful.interval[1]


def test_tuning_seeds_choose_the_rate_and_other_seeds_report_it():
    def of_rate(lr, seed, fd, tuning):
        run = result("a", lr, seed, fd)
        return replace(run, plan=replace(run.plan, tuning=tuning))

    tuning = [of_rate(lr, seed, fd, True) for lr, fd in ((0.1, 2.0), (0.2, 1.0)) for seed in (8, 9)]
    (arm,) = summarise(tuning)
    assert (arm.chosen.lr, arm.tuned) == (0.2, None)
    assert (arm.reported.lr, arm.reported.runs) == (0.2, ())  # a tuning run is not a result
    reports = [of_rate(0.2, seed, 5.0 + seed, False) for seed in (0, 1)]
    (arm,) = summarise([*tuning, *reports])
    assert [run.plan.seed for run in arm.reported.runs] == [0, 1]
    assert arm.reported.spread("fd").mean == 5.5
    assert len(arm.every_trial) == 3
    notes = verdict([*tuning, *reports]).notes
    assert notes[0] == "Every arm had the same tuning budget: 2 learning rates × 2 tuning seeds."


def test_a_grid_of_settings_makes_trials_of_an_arm():
    def of_trial(lr, damping, fd):
        run = result("a", lr, 0, fd)
        searched = {"optimizer.dopr.damping": damping}
        return replace(run, plan=replace(run.plan, searched=searched, tuning=True))

    runs = [
        of_trial(lr, damping, lr + abs(damping - 1)) for lr in (1, 2, 4) for damping in (0.1, 1, 2)
    ]
    (arm,) = summarise(runs)
    assert arm.chosen.trial == "lr1-damping1"
    notes = " ".join(verdict(runs).notes)
    assert "the same tuning budget: 9 trials × 1 tuning seed" in notes
    assert "the chosen learning rate 1 is at the edge" in notes
    assert "damping 1 is at the edge" not in notes


def test_rank_correlations_over_all_runs_and_within_arms():
    runs = [result("a", 0.1, seed, fd, fd) for seed, fd in enumerate([1.0, 2.0, 3.0, 4.0])]
    runs += [result("b", 0.1, seed, 9 - fd, fd) for seed, fd in enumerate([1.0, 2.0, 3.0])]
    found = rank_correlations(summarise(runs))
    assert found.keys() == {"", "a"}  # b has three runs
    assert found["a"] == pytest.approx(1)
    losses, distances = [1, 2, 3, 4, 1, 2, 3], [1, 2, 3, 4, 8, 7, 6]
    assert found[""] == pytest.approx(stats.spearmanr(losses, distances).statistic)
    assert any("1.0 within a" in note for note in verdict(runs).notes)


def test_another_number_of_model_calls_that_draws_better_is_named():
    def evaluated(seed, *by_nfe):
        run = result("a", 0.1, seed, 4.0)
        evaluations = (Evaluation(10, fd=fd, nfe=nfe, solver="euler") for nfe, fd in by_nfe)
        return replace(run, by_nfe=tuple(evaluations))

    better = [evaluated(0, (2, 3.0), (20, 4.0)), evaluated(1, (2, 4.0), (20, 4.0))]
    words = "a: FD is lower with 2 model calls of euler, 3.50, than in the table."
    assert words in verdict(better).notes
    level = [evaluated(seed, (2, 3.99), (20, 4.0)) for seed in (0, 1)]
    assert not any("model calls" in note for note in verdict(level).notes)
    raw = {"raw": (Evaluation(5, fd=1.0), Evaluation(10, fd=3.0))}
    other = [replace(run, by_weights=raw) for run in level]
    assert "a: FD is lower with the weights raw, 3.00, than in the table." in verdict(other).notes


def test_a_switch_has_no_edge():
    def of_trial(nesterov, fd):
        run = result("a", 0.1, 0, fd)
        searched = {"optimizer.nesterov": nesterov}
        return replace(run, plan=replace(run.plan, searched=searched, tuning=True))

    notes = " ".join(verdict([of_trial(True, 1.0), of_trial(False, 2.0)]).notes)
    assert "edge of its grid" not in notes


def test_unequal_budgets_and_grid_edges_are_said():
    runs = [result("a", lr, 0, lr) for lr in (0.1, 0.2, 0.3)] + [result("b", 0.1, 0, None)]
    assert "this study tuned nothing" in verdict(runs[-1:]).notes[0]
    runs = [replace(run, plan=replace(run.plan, tuning=True)) for run in runs]
    notes = " ".join(verdict(runs).notes)
    assert "not equal: a 3 learning rates and b 1 learning rate" in notes
    assert "edge of its grid" in notes
    assert "1 run failed, which no mean includes: b-0" in notes
