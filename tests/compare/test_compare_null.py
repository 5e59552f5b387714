"""Studies of which the truth is known: how often the report declares a difference.

FD is a function of the one-step loss, with noise of the evaluation. The loss falls as a power of
the step, with noise of the seed, some of which all arms share. Everything from the choice of trials
to the headline is what a report does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest

from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.statistics import chosen_trials
from flowdopr.compare.study import build_study
from flowdopr.config import Config, apply_overrides

CONFIG = Config.model_validate(
    {
        "name": "null",
        "data": {"name": "digits"},
        "model": {"name": "dit"},
        "train": {"steps": 100, "global_batch_size": 8},
    }
)
ARMS = ("adamw", "dopr-adamw", "muon", "dopr-muon")


@dataclass(frozen=True)
class Truth:
    """Deviations and effects are those of log FD."""

    seeds: int = 5
    tuning_seeds: int = 2
    trials: Mapping[float, float] = field(default_factory=lambda: {1e-3: 0.05, 2e-3: 0.0})
    """What each learning rate adds, by way of the loss."""
    checkpoints: int = 6
    of_seed: float = 0.05
    of_all_arms: float = 0.05
    """What a seed adds, by way of the loss, to every arm."""
    of_evaluation: float = 0.03
    lower_loss: Mapping[str, float] = field(default_factory=dict)
    ratio: Mapping[str, float] = field(default_factory=dict)
    """FD at equal loss over that of the other arms."""


@cache
def config_of(arm: str, seed: int) -> Config:
    return apply_overrides(CONFIG, [f"seed={seed}", f"optimizer.name={arm}"])


def one_run(rng, truth: Truth, plan: RunPlan, shared: float) -> RunResult:
    steps = np.arange(1, truth.checkpoints + 1) * 100 // truth.checkpoints
    effect = shared + rng.normal(0, truth.of_seed) + truth.trials[plan.lr]
    effect = effect - truth.lower_loss.get(plan.arm, 0.0) + rng.normal(0, 0.01, len(steps))
    above = 0.075 * (steps / 100) ** -0.75 * np.exp(effect / 2)  # as digits do, roughly
    fd = 200 * above**2 * truth.ratio.get(plan.arm, 1.0)
    noise = np.exp(rng.normal(0, truth.of_evaluation, len(steps) + 2))
    curve = tuple(
        Evaluation(int(step), one_step_loss=0.33 + loss, fd=value)
        for step, loss, value in zip(steps, above, fd * noise[2:], strict=True)
    )
    again = tuple(Evaluation(100, fd=fd[-1] * factor) for factor in noise[:2])
    speed = float(np.exp(rng.normal(0, 0.02)))
    return RunResult(plan, final=curve[-1], curve=curve, by_noise=again, seconds_per_step=speed)


def one_study(rng, truth: Truth):
    def runs_of(seeds, tuning, trials):
        return [
            one_run(rng, truth, RunPlan(arm, lr, seed, config_of(arm, seed), tuning=tuning), shared)
            for seed in seeds
            for shared in [rng.normal(0, truth.of_all_arms)]
            for arm in ARMS
            for lr in truth.trials
            if trials is None or f"lr{lr:g}" == trials[arm]
        ]

    tuning = runs_of(range(100, 100 + truth.tuning_seeds), True, None)
    chosen = {plan.arm: plan.trial for plan in chosen_trials(tuning)} if tuning else None
    return build_study(CONFIG, tuning + runs_of(range(truth.seeds), False, chosen))


def shares(truth: Truth, studies: int) -> tuple[float, float, float]:
    """The shares of studies that declare anything, that show a claim at equal loss, and that show
    dopr-adamw to be better than adamw at equal steps."""
    rng, declared = np.random.default_rng(0), np.zeros(3)
    for _ in range(studies):
        study = one_study(rng, truth)
        shown = [one for one in study.comparisons.all() if one.shown]
        headline = study.verdict.headline
        assert ("ahead of" in headline) <= bool(shown)
        assert any("Shown" in words for words in study.verdict.pairs) <= bool(shown)
        declared += [
            bool(shown),
            any(one.measure.endswith("equal loss") for one in shown),
            "adamw" in study.comparisons.worse_than("dopr-adamw"),
        ]
    return tuple(declared / studies)


def at_most(share: float, studies: int) -> float:
    """`share`, and two standard errors of it in as many studies."""
    return share + 2 * (share * (1 - share) / studies) ** 0.5


LOWER_LOSS = {"dopr-adamw": 0.5, "dopr-muon": 0.5}
NULLS = {
    "tuned on other seeds": Truth(),
    "three seeds": Truth(seeds=3),
    "one trial": Truth(tuning_seeds=0, trials={1e-3: 0.0}),
    "ten seeds, one for tuning": Truth(seeds=10, tuning_seeds=1),
}


def test_under_the_null_few_studies_declare_anything():
    assert shares(Truth(), 50)[0] <= at_most(0.05, 50)


def test_a_lower_loss_alone_is_not_called_better_at_equal_loss():
    """Noise is so low that an error of interpolation of half a percent would be shown."""
    exact = Truth(of_evaluation=0.003, lower_loss=LOWER_LOSS)
    _, at_equal_loss, better = shares(exact, 20)
    assert at_equal_loss <= at_most(0.05, 20)
    assert better > 0.8


def test_a_real_difference_is_shown():
    real = {"dopr-adamw": 0.8, "dopr-muon": 0.8}
    truth = Truth(seeds=3, of_seed=0.01, of_evaluation=0.01, ratio=real)
    _, at_equal_loss, better = shares(truth, 20)
    assert min(at_equal_loss, better) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("null", NULLS)
def test_under_any_null_few_studies_declare_anything(null):
    assert shares(NULLS[null], 200)[0] <= at_most(0.05, 200)


@pytest.mark.slow
def test_where_tuning_errs_most_it_is_declared_little_more_often():
    """Trials as far apart as the noise: one tuning seed chooses the wrong one in a quarter of all
    arms, and ten seeds then see that it is worse."""
    truth = Truth(seeds=10, tuning_seeds=1, trials={1e-3: 0.1, 2e-3: 0.0, 4e-3: 0.1})
    assert shares(truth, 200)[0] <= at_most(0.08, 200)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [3, 10])
@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_any_lower_loss_is_not_called_better_at_equal_loss(checkpoints, noise):
    truth = Truth(checkpoints=checkpoints, of_evaluation=noise, lower_loss=LOWER_LOSS)
    assert shares(truth, 100)[1] <= at_most(0.05, 100)
