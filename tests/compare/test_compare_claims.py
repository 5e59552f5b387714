"""Claims against scipy and by simulation; runs at equal loss and at equal time on known curves."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from flowdopr.compare.claims import bootstrap_interval, claim, holm, log_ratios
from flowdopr.compare.matched import at_equal_loss, at_equal_time, points_of
from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Evaluation, RunResult, with_shorter
from flowdopr.config import Config, apply_overrides

CONFIG = Config.model_validate(
    {
        "name": "tiny",
        "data": {"name": "digits"},
        "model": {"name": "dit"},
        "train": {"steps": 100, "global_batch_size": 8},
    }
)


def claim_of(values, measure="FD"):
    return claim(measure, "a", "b", {seed: [value] for seed, value in enumerate(values)})


def test_a_claim_is_scipys_paired_test_on_logarithms():
    first = {0: [1.0], 1: [2.5], 2: [2.0], 3: [4.0]}
    second = {0: [2.0], 1: [3.0], 2: [3.5], 3: [4.5], 7: [100.0]}  # seed 7 has no partner
    found = claim("FD", "a", "b", log_ratios(first, second))
    logs = [np.log(values[0]) for values in first.values()]
    others = [np.log(second[seed][0]) for seed in first]
    expected = stats.ttest_rel(logs, others)
    interval = expected.confidence_interval(0.95)
    assert found.by_seed == pytest.approx({0: 0.5, 1: 2.5 / 3, 2: 2 / 3.5, 3: 4 / 4.5})
    assert found.ratio == pytest.approx(math.exp(np.mean(logs) - np.mean(others)))
    assert found.interval == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.p_permutation == 2 / 2**4  # all four seeds agree
    assert found.smallest_seen(1) == pytest.approx(found.interval[1] / found.ratio)
    error = expected.statistic**-1 * (np.mean(logs) - np.mean(others))
    needed = stats.t.isf(0.05 / 2 / 7, 3)  # Holm's first step over seven claims
    assert found.smallest_seen(7) == pytest.approx(math.exp(needed * error))


def test_evaluation_seeds_are_averaged_within_a_seed_and_resampled():
    logs = log_ratios({0: [1.0, 4.0], 1: [2.0, None]}, {0: [1.0, 1.0], 1: [1.0, 5.0]})
    assert logs == {0: [0.0, math.log(4)], 1: [math.log(2)]}
    assert claim("FD", "a", "b", logs).by_seed == pytest.approx({0: 2.0, 1: 2.0})
    assert claim("FD", "a", "b", logs).p == 0  # the means over evaluation seeds are equal
    low, high = claim("FD", "a", "b", logs).bootstrap
    assert low < 2 < high  # but the evaluation's noise shows in the bootstrap


def test_the_bootstrap_has_the_deviation_of_the_mean_on_many_seeds():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval([[value] for value in values])
    half = stats.norm.ppf(0.975) * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def shown(claim):
    return holm([claim])[0].shown


def test_few_seeds_show_nothing_however_clear_they_look():
    assert claim_of([-3.0, -3.0001]).p < 0.001
    assert not shown(claim_of([-3.0, -3.0001]))
    single = claim_of([-3.0])
    assert (single.ratio, single.interval, single.p) == (pytest.approx(math.exp(-3)), None, None)
    assert not shown(single)
    assert claim("FD", "a", "b", {}) is None


def test_a_difference_is_shown_only_after_correction_and_if_it_is_larger_than_interpolation():
    clear = claim_of([-0.02, -0.0201, -0.0202])
    assert shown(clear)
    assert not clear.shown
    assert not shown(close := claim_of([-0.008, -0.0081, -0.0082]))
    assert close.smallest_seen(1) == 1.01


def test_the_worse_arm_might_have_been_tuned_better():
    """Its regret is taken from the difference, and the interval reaches further by each."""
    values = {seed: [value] for seed, value in enumerate([-0.3, -0.2, -0.4, -0.3])}
    plain = claim("FD", "a", "b", values)
    first_lower = claim("FD", "a", "b", values, (0.5, 0.1))
    expected = stats.ttest_1samp([-0.2, -0.1, -0.3, -0.2], 0)
    assert first_lower.p == pytest.approx(expected.pvalue)
    assert first_lower.ratio == plain.ratio
    low, high = plain.interval
    assert first_lower.interval == pytest.approx((low * math.exp(-0.5), high * math.exp(0.1)))
    assert claim("FD", "a", "b", values, (0.0, 0.3)).p == 1
    # Seen at Holm's level for four claims in either direction: by as much more as it might be off.
    assert first_lower.smallest_seen(4) == pytest.approx(plain.smallest_seen(4) * math.exp(0.5))


@pytest.mark.parametrize("sizes", [(1e300, 1e-300), (1e-300, 1e300), (1e300, 1e300)])
def test_distances_of_any_size_have_ratios(sizes):
    logs = log_ratios(
        {seed: [sizes[0] * (1 + seed / 9)] for seed in range(3)},
        {seed: [sizes[1]] for seed in range(3)},
    )
    found = claim("FD", "a", "b", logs)
    assert all(math.isfinite(end) for end in (found.ratio, *found.interval, *found.bootstrap))
    assert found.smallest_seen(5) >= 1


def test_an_arm_against_itself_shows_nothing():
    found = claim_of([0.0, 0.0, 0.0])
    assert (found.ratio, found.p, found.p_permutation, found.shown) == (1, 1, 1, False)


def test_holm_is_the_textbook_example():
    """p 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02 (Holm 1979)."""
    claims = [claim_of([0.1, 0.2, 0.3]) for _ in range(4)]
    given = [0.01, 0.04, 0.03, 0.005]
    corrected = holm([replace(one, p=p) for one, p in zip(claims, given, strict=True)])
    assert [one.p_holm for one in corrected] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_permutations_and_holm_are_those_of_scipy_and_statsmodels():
    values = np.random.default_rng(1).normal(0.3, 0.2, size=(6, 7))
    claims = holm([claim_of(row) for row in values])
    for row, found in zip(values, claims, strict=True):
        signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1)
        as_far = abs((row[:, None] * signs).mean(0)) >= abs(row.mean()) - 1e-12
        assert found.p_permutation == pytest.approx(as_far.mean())
    # statsmodels 0.14.4: multipletests(p, method="holm")[1] of these p-values
    given = [0.001, 0.2, 0.013, 0.04, 0.0125, 0.9]
    corrected = holm([replace(one, p=p) for one, p in zip(claims, given, strict=True)])
    assert [one.p_holm for one in corrected] == pytest.approx(
        [0.006, 0.4, 0.0625, 0.12, 0.0625, 0.9]
    )


def test_the_bootstrap_covers_the_ratio_of_a_hierarchy():
    """Seeds and evaluation seeds with noise of their own: of 200 intervals with 20 seeds, about
    95 % cover the truth; with 5 seeds fewer, which is why claims use Student's."""
    rng = np.random.default_rng(0)
    for seeds, low, high in ((20, 0.88, 1.0), (5, 0.75, 0.95)):
        covered = 0
        for _ in range(200):
            values = rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, 3))
            ends = bootstrap_interval(values.tolist(), resamples=500)
            covered += ends[0] < 0 < ends[1]
        assert low < covered / 200 < high


def run(points, seconds=1.0, seed=0):
    """A run whose checkpoints at steps 10, 20, ... have these (loss, FD)."""
    curve = tuple(
        Evaluation(step=10 * (number + 1), one_step_loss=loss, fd=fd)
        for number, (loss, fd) in enumerate(points)
    )
    plan = RunPlan("arm", 0.1, seed, CONFIG)
    return RunResult(plan, final=curve[-1], curve=curve, seconds_per_step=seconds)


def test_equal_loss_takes_out_what_the_loss_explains():
    """FD = loss^2 for both, at other losses: no difference. Halved for one: a ratio of 1/2."""
    losses, others = np.linspace(1, 0.4, 30), np.linspace(0.9, 0.2, 40)
    one, other = run([(x, x**2) for x in losses]), run([(x, x**2) for x in others])
    assert one.final.fd != other.final.fd
    assert at_equal_loss(one, other) == pytest.approx(0, abs=1e-3)
    better = run([(x, x**2 / 2) for x in others])
    assert at_equal_loss(better, one) == pytest.approx(math.log(0.5), abs=1e-3)
    assert at_equal_loss(one, better) == -at_equal_loss(better, one)


def test_equal_loss_needs_losses_in_common_and_bears_noise():
    assert at_equal_loss(run([(1.0, 5), (0.9, 4)]), run([(0.8, 3), (0.7, 2)])) is None
    assert at_equal_loss(run([(1.0, 5)]), run([(1.0, 5), (0.9, 4)])) is None
    wavy = run([(1.0, 4), (0.9, 2), (0.8, 3), (0.7, 1)])  # 2 and 3 become their geometric mean
    flat = run([(0.9, 1.0), (0.8, 1.0)])
    assert at_equal_loss(wavy, flat) == pytest.approx(math.log(6) / 2)


def test_a_run_against_itself_is_level_at_equal_loss_and_time():
    own = run([(1.0, 5.3), (0.9, 4.1), (0.9, 4.2), (0.7, 1.9)])
    assert at_equal_loss(own, own) == at_equal_time(own, own) == 0


def test_equal_time_is_when_the_faster_run_has_ended():
    fast, slow = run([(1, 8.0), (1, 4.0)], 1.0), run([(1, 6.0), (1, 3.0)], 1.5)
    # The slow run has 90 / seconds at 15 and 30 s, a straight line in logarithms: 4.5 at 20 s.
    expected = math.log(4.0) - math.log(4.5)
    assert at_equal_time(fast, slow) == pytest.approx(expected)
    assert at_equal_time(fast, run([(1, 1.0)], 9.0)) is None
    unknown = RunResult(fast.plan, final=fast.final, curve=fast.curve)
    assert at_equal_time(fast, unknown) is None


def test_shorter_runs_give_the_points_in_place_of_checkpoints():
    def end(steps, loss, fd, seconds=1.0):
        config = apply_overrides(CONFIG, [f"train.steps={steps}"])
        one = run([(loss, fd)], seconds)
        evaluation = replace(one.final, step=steps)
        plan = replace(one.plan, config=config, shorter=steps < 100)
        return replace(one, plan=plan, final=evaluation, curve=(evaluation,))

    long = replace(end(100, 0.5, 1.0), curve=(Evaluation(50, 9.0, 9.0), end(100, 0.5, 1.0).final))
    (whole,) = with_shorter([end(50, 1.0, 4.0, 2.0), long, end(25, 2.0, 16.0)])
    found = [(one.step, one.fd, seconds) for one, seconds in points_of(whole)]
    assert found == [(25, 16.0, 25.0), (50, 4.0, 100.0), (100, 1.0, 100.0)]
    other = run([(2.0, 8.0), (1.0, 2.0), (0.5, 0.5)])
    assert at_equal_loss(whole, other) == pytest.approx(math.log(2))
    failed = RunResult(end(50, 1.0, 4.0).plan, status="failed")
    (whole,) = with_shorter([long, failed])
    assert [one.step for one, _ in points_of(whole)] == [100]
    assert at_equal_loss(whole, other) is None


def test_equal_loss_is_a_mean_over_weight_averages():
    def with_average(run, factor):
        scaled = tuple(replace(one, fd=one.fd * factor) for one in run.curve)
        return replace(run, by_weights={"raw": scaled})

    one, other = run([(1.0, 4.0), (0.5, 2.0)]), run([(1.0, 4.0), (0.5, 2.0)])
    assert at_equal_loss(with_average(one, 3.0), with_average(other, 1.0)) == pytest.approx(
        math.log(3) / 2
    )
    assert at_equal_loss(with_average(one, 3.0), other) == pytest.approx(0)
