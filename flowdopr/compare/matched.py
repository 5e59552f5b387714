"""The rollout metric of two runs at equal one-step loss, and after equal time.

A run gives points (loss, FD) and (seconds, FD), one for each evaluated checkpoint. FD as a function
of the loss is the increasing function nearest to log FD (isotonic regression), linear between the
points; as a function of time, log FD is linear between the points.

An optimizer that reaches a lower loss also draws better images in the ordinary way. At equal loss
that advantage is taken out, and what is left is what the loss does not see.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.isotonic import IsotonicRegression

from flowdopr.compare.results import RunResult

Curve = tuple[np.ndarray, np.ndarray]
"""Ascending values of the loss or of the time, and log FD there."""
POINTS = 101  # of the common range, over which the ratio is averaged


def loss_curve(run: RunResult) -> Curve | None:
    """log FD as an increasing function of the loss; None with fewer than two losses."""
    points = sorted(
        (one.one_step_loss, np.log(one.fd))
        for one in run.curve
        if one.one_step_loss is not None and one.fd is not None and one.fd > 0
    )
    if len({loss for loss, _ in points}) < 2:
        return None
    loss, log_fd = np.array(points).T
    return loss, IsotonicRegression().fit_transform(loss, log_fd)


def time_curve(run: RunResult) -> Curve | None:
    """log FD over the seconds of training, without evaluation; None without a measured speed."""
    points = [
        (one.step * run.seconds_per_step, np.log(one.fd))
        for one in run.curve
        if run.seconds_per_step and one.fd is not None and one.fd > 0
    ]
    if not points:
        return None
    seconds, log_fd = np.array(points).T
    return seconds, log_fd


def at_equal_loss(first: RunResult, second: RunResult) -> float | None:
    """Mean of log(FD of first / FD of second) over the losses that both reached.

    None if they have no loss in common.
    """
    return _common(loss_curve, first, second, lambda low, high: np.linspace(low, high, POINTS))


def shared_losses(first: RunResult, second: RunResult) -> tuple[float, float] | None:
    """The lowest and the highest loss that both reached, between which `at_equal_loss` averages."""
    one, other = loss_curve(first), loss_curve(second)
    if one is None or other is None:
        return None
    low, high = _common_range(one[0], other[0])
    return (low, high) if low < high else None


def at_equal_time(first: RunResult, second: RunResult) -> float | None:
    """log(FD of first / FD of second) when the run that took less time had ended.

    None if the other had no checkpoint by then. The slower run is in the middle of its learning
    rate's decay there, if it has one.
    """
    return _common(time_curve, first, second, lambda low, high: np.array([high]))


def _common_range(x: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The least and the largest value that both hold between their own; crossed without any."""
    return float(max(x[0], other[0])), float(min(x[-1], other[-1]))


def _common(
    curve: Callable[[RunResult], Curve | None],
    first: RunResult,
    second: RunResult,
    chosen: Callable[[float, float], np.ndarray],
) -> float | None:
    """Mean difference of two curves at the points `chosen` of their common range."""
    one, other = curve(first), curve(second)
    if one is None or other is None:
        return None
    (x, y), (other_x, other_y) = one, other
    low, high = _common_range(x, other_x)
    if low > high or (low == high and chosen(low, high).size > 1):
        return None
    at = chosen(low, high)
    return float(np.mean(np.interp(at, x, y) - np.interp(at, other_x, other_y)))
