"""Ratios of two arms' metrics, paired by seed, and the strength of the evidence for each.

With the metric m of both arms at the same seed s and evaluation seed e, l_se = log(m1_se / m2_se),
and l_s its mean over e. The ratio is exp(mean of l_s) with

- Student's t-interval of the mean of l_s, and the p-value of the two-sided paired t-test;
- the interval of a hierarchical bootstrap (Saravanan et al. 2020): seeds are drawn with
  replacement, and for each of them its evaluation seeds;
- the p-value of the permutation test, in which arms are exchanged within seeds. It needs no normal
  distribution, and cannot be less than 2 / 2^n with n seeds.

A difference is shown if the t-test's p-value stays below 0.05 after Holm's correction (1979) over
all claims made together, and there are three seeds or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
SMALLEST = 0.01
"""A ratio nearer to 1 is not called a difference: interpolation between checkpoints errs by up to
0.006."""
RESAMPLES = 10_000
LARGEST = 300.0  # size of a log ratio; the square of its exponential is a number, too


@dataclass(frozen=True)
class Claim:
    """`first` over `second` in one measure. Intervals and p-values need two seeds, else None."""

    measure: str
    """For example "FD at equal loss"; lower is better."""
    first: str
    second: str
    by_seed: dict[int, float]
    """exp(l_s)."""
    ratio: float
    interval: tuple[float, float] | None = None
    bootstrap: tuple[float, float] | None = None
    p: float | None = None
    p_permutation: float | None = None
    p_holm: float | None = None
    """p after Holm's correction over the claims made together with this one."""

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def shown(self) -> bool:
        """Whether a difference is shown. Nothing is shown before Holm's correction."""
        return (
            self.seeds >= FEWEST_SEEDS
            and self.p_holm is not None
            and self.p_holm < 1 - CONFIDENCE
            and abs(self.ratio - 1) > SMALLEST
        )

    def smallest_seen(self, claims: int) -> float | None:
        """The ratio above 1 from which on a difference would have been shown with this spread of
        the seeds and this doubt about the tuning, in whichever direction that takes more, at the
        level that the smallest p-value of so many claims must reach."""
        if self.interval is None:
            return None
        level, freedom = 1 - CONFIDENCE, self.seeds - 1
        logs = np.log(list(self.by_seed.values()))
        error = float(logs.std(ddof=1)) / math.sqrt(self.seeds)
        more = stats.t.isf(level / claims / 2, freedom) - stats.t.isf(level / 2, freedom)
        low, high = self.interval
        reach = math.log(max(high / self.ratio, self.ratio / low))
        return max(_exp(reach + float(more) * error), 1 + SMALLEST)


LogRatios = Mapping[int, Sequence[float]]
"""l_se by seed s, one number for each evaluation seed e."""


def log_ratios(
    first: Mapping[int, Sequence[float | None]], second: Mapping[int, Sequence[float | None]]
) -> LogRatios:
    """l_se of two arms' metrics by seed and evaluation seed, where both are positive."""
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        pairs = zip(first[seed], second[seed], strict=False)
        known = [(a, b) for a, b in pairs if a is not None and b is not None and min(a, b) > 0]
        if known:
            found[seed] = [math.log(a) - math.log(b) for a, b in known]
    return found


def claim(
    measure: str,
    first: str,
    second: str,
    logs: LogRatios,
    regrets: tuple[float, float] = (0.0, 0.0),
) -> Claim | None:
    """The claim of these log ratios, before Holm's correction; None without any.

    Args:
        regrets: how much lower log of each arm's metric might be with another choice of its trial.
            The interval reaches as much further, and the test takes that of the arm which is worse
            from the difference.
    """
    if not logs:
        return None
    means = np.array([np.mean(values) for values in logs.values()])
    by_seed = {seed: _exp(float(mean)) for seed, mean in zip(logs, means, strict=True)}
    ratio = _exp(float(means.mean()))
    if len(means) < 2:
        return Claim(measure, first, second, by_seed, ratio)
    low, high = bootstrap_interval(list(logs.values()))
    test = _t_test(means, regrets)
    return Claim(
        measure,
        first,
        second,
        by_seed,
        ratio,
        interval=(_exp(test.low), _exp(test.high)),
        bootstrap=(_exp(low), _exp(high)),
        p=test.p,
        p_permutation=_permutation_p(means),
    )


class _TTest(NamedTuple):
    low: float
    high: float
    p: float


def _t_test(values: np.ndarray, regrets: tuple[float, float]) -> _TTest:
    """Of a mean of zero; equal values other than zero are certain, zeros show nothing."""
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    surplus = abs(mean) - regrets[int(mean < 0)]
    freedom = len(values) - 1
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error
    if surplus <= 0 or error == 0:
        p = float(surplus <= 0)
    else:
        p = float(2 * stats.t.sf(surplus / error, freedom))
    return _TTest(float(mean - half - regrets[0]), float(mean + half + regrets[1]), p)


def _permutation_p(values: np.ndarray) -> float:
    """The p-value of the mean's size when the signs of the values are exchangeable."""
    found = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0
    )
    return float(found.pvalue)


def bootstrap_interval(
    values: Sequence[Sequence[float]], resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile interval of the mean over seeds of the means over evaluation seeds."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(values), size=(resamples, len(values)))
    means = np.empty(chosen.shape)
    for seed, row in enumerate(values):
        where = chosen == seed
        again = rng.integers(len(row), size=(int(where.sum()), len(row)))
        means[where] = np.asarray(row)[again].mean(1)
    low, high = np.quantile(means.mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _exp(value: float) -> float:
    """exp, of what a number can hold."""
    return math.exp(min(max(value, -LARGEST), LARGEST))


def holm(claims: Sequence[Claim]) -> list[Claim]:
    """The claims with `p_holm`: sorted p-values times m, m - 1, ..., made increasing, at most 1."""
    tested = sorted((one for one in claims if one.p is not None), key=lambda one: one.p or 0.0)
    corrected, largest = {}, 0.0
    for rank, one in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * (one.p or 0.0)))
        corrected[id(one)] = largest
    return [replace(one, p_holm=corrected.get(id(one))) for one in claims]
