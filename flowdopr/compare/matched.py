"""The rollout metric of two runs at equal one-step loss, and after equal time.

A run gives points (loss, FD) and (seconds, FD): one for each evaluated checkpoint or, where the
study repeats it with fewer steps, one for the end of each of these runs, whose learning rates have
decayed alike. FD as a function of the loss is the increasing function nearest to log FD (isotonic
regression). Between the points, log FD is the monotone cubic (PCHIP) in log loss and in log
seconds: straight lines lie above a convex curve, the more so the further its points are apart, and
that differs between arms.

An optimizer that reaches a lower loss also draws better images in the ordinary way. At equal loss
that advantage is taken out, and what is left is what the loss does not see.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.interpolate import PchipInterpolator
from sklearn.isotonic import IsotonicRegression

from flowdopr.compare.results import Evaluation, RunResult

Curve = tuple[np.ndarray, np.ndarray]
"""Two or more logarithms of the loss or of the time, ascending, and log FD there."""
POINTS = 101  # of the common range, over which the ratio is averaged


Points = list[tuple[Evaluation, float | None]]
"""Evaluations, and the seconds of training before each."""


def points_of(run: RunResult, weights: str | None = None) -> Points:
    """The points of a run by step, with one of the study's further `weights` or with its own."""

    def evaluated(one: RunResult) -> tuple[Evaluation, ...]:
        return one.curve if weights is None else one.by_weights.get(weights, ())

    runs = sorted((*run.shorter, run), key=lambda one: one.plan.config.train.steps)
    chosen = (
        [(one, evaluated(one)[-1:]) for one in runs] if run.shorter else [(run, evaluated(run))]
    )
    return [
        (evaluation, one.seconds_per_step and evaluation.step * one.seconds_per_step)
        for one, evaluations in chosen
        for evaluation in evaluations
    ]


def loss_curve(points: Points) -> Curve | None:
    """log FD as an increasing function of log loss; None with fewer than two losses."""
    known = sorted(
        (np.log(one.one_step_loss), np.log(one.fd))
        for one, _ in points
        if one.one_step_loss and one.fd is not None and min(one.one_step_loss, one.fd) > 0
    )
    if len({loss for loss, _ in known}) < 2:
        return None
    loss, log_fd = np.array(known).T
    distinct, where = np.unique(loss, return_index=True)
    return distinct, IsotonicRegression().fit_transform(loss, log_fd)[where]


def time_curve(points: Points) -> Curve | None:
    """log FD over log seconds of training, without evaluation; None without a measured speed, or
    with fewer than two points."""
    known = {
        np.log(seconds): np.log(one.fd)
        for one, seconds in points
        if seconds and one.fd is not None and one.fd > 0
    }
    if len(known) < 2:
        return None
    seconds, log_fd = np.array(sorted(known.items())).T
    return seconds, log_fd


def at_equal_loss(first: RunResult, second: RunResult) -> float | None:
    """Mean of log(FD of first / FD of second) over the losses that both reached, and over the
    weight averages with which the study evaluates them.

    None if they have no loss in common.
    """
    averages = [None, *(name for name in first.by_weights if name in second.by_weights)]
    curves = [
        (loss_curve(points_of(first, weights)), loss_curve(points_of(second, weights)))
        for weights in averages
    ]
    found = [over_shared_losses(one, other) for one, other in curves]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def over_shared_losses(one: Curve | None, other: Curve | None) -> float | None:
    """Mean log(FD of one / FD of other) over the losses that both curves hold; None without any."""
    return _common(one, other, lambda low, high: np.linspace(low, high, POINTS))


def shared_losses(first: RunResult, second: RunResult) -> tuple[float, float] | None:
    """The lowest and the highest loss that both reached with the study's own weight average,
    between which `at_equal_loss` averages."""
    one, other = loss_curve(points_of(first)), loss_curve(points_of(second))
    if one is None or other is None:
        return None
    low, high = _common_range(one[0], other[0])
    return (float(np.exp(low)), float(np.exp(high))) if low < high else None


def at_equal_time(first: RunResult, second: RunResult) -> float | None:
    """log(FD of first / FD of second) when the run that took less time had ended.

    None if the other had no checkpoint by then. Unless the study repeats its runs with fewer steps,
    the slower run is in the middle of its learning rate's decay there, if it has one.
    """
    one, other = time_curve(points_of(first)), time_curve(points_of(second))
    return _common(one, other, lambda low, high: np.array([high]))


def _common_range(x: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The least and the largest value that both hold between their own; crossed without any."""
    return float(max(x[0], other[0])), float(min(x[-1], other[-1]))


def _common(
    one: Curve | None, other: Curve | None, chosen: Callable[[float, float], np.ndarray]
) -> float | None:
    """Mean difference of two curves at the points `chosen` of their common range."""
    if one is None or other is None:
        return None
    (x, y), (other_x, other_y) = one, other
    low, high = _common_range(x, other_x)
    if low > high or (low == high and chosen(low, high).size > 1):
        return None
    at = chosen(low, high)
    difference = PchipInterpolator(x, y)(at) - PchipInterpolator(other_x, other_y)(at)
    return float(np.mean(difference))
