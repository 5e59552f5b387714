"""Probability paths: how noise x_0 becomes data x_1 as time t goes from 0 to 1.

    x_t  = alpha_t x_1 + sigma_t x_0                                                (1)
    dx_t = alpha_t' x_1 + sigma_t' x_0        (the prime is d/dt)                   (2)

A path is given by the four numbers (alpha_t, sigma_t, alpha_t', sigma_t') and by the inverse of its
noise level sigma_t / alpha_t, which falls with t. Everything else in this package is written in
terms of them. Shapes: x_0, x_1, x_t, dx_t (B, C, H, W) or any (B, ...);
t (B,) or a scalar. Results are float32 at least, whatever the dtype of the images.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Paths whose derivatives diverge at t = 1 end at least this much before it, so that float32 can
# still represent the distance.
NEAREST = 1e-6
SAFE_LEVEL = 1e-3  # least noise level sigma_t / alpha_t at which predictions of data are converted


class Coefficients(NamedTuple):
    """alpha_t, sigma_t and their time derivatives, each of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def determinant(self) -> Tensor:
        """D_t = alpha_t' sigma_t - alpha_t sigma_t', positive inside (0, 1) on every path here.

        (1) and (2) can be solved for x_0 and x_1 exactly where D_t is not zero.
        """
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


class PathSample(NamedTuple):
    """A point of the path and its velocity, both (B, ...)."""

    x_t: Tensor
    dx_t: Tensor


class Path:
    """Base of all paths; a subclass defines `_coefficients`.

    `end`: the last time that is used; later times are treated as `end`. It is 1, or the time of
    noise level SAFE_LEVEL if sigma_t' diverges at t = 1.
    `still_at_start`: whether the velocity at t = 0 is zero for all x_0 and x_1.
    `has_score`: whether x_t given x_1 is Gaussian, as stochastic sampling needs.
    """

    end: float = 1.0
    still_at_start: bool = False
    has_score: bool = True

    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at times `t` of any shape, in float32 (float64 for float64 times)."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return self._coefficients(t.clamp(0.0, self.end))

    def _coefficients(self, t: Tensor) -> Coefficients:
        raise TypeError(f"{type(self).__name__} defines no coefficients: derive from Path")

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """Coefficients at `t` (scalar or (B,)), shaped to multiply `x` (B, ...)."""
        return self(expand(t, x))

    def time_at(self, level: Tensor | float) -> Tensor:
        """The times at which sigma_t / alpha_t falls to `level`; 0 where the path starts below it.

        >>> LinearPath().time_at(torch.tensor([1.0, 0.25]))
        tensor([0.5000, 0.8000])

        Args:
            level: positive noise levels of any shape; a Python number gives a float64 time.
        """
        level = level if isinstance(level, Tensor) else torch.tensor(level, dtype=torch.float64)
        return self._time_at(level).clamp(0.0, 1.0)

    def _time_at(self, level: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no time of a noise level: derive from Path")

    def _end(self) -> float:
        """`end` of a path whose sigma_t' diverges at t = 1."""
        return min(float(self.time_at(SAFE_LEVEL)), 1 - NEAREST)

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """Equations (1) and (2).

        >>> path = LinearPath()
        >>> x_t, dx_t = path.sample(torch.randn(8, 1, 4, 4), torch.rand(8, 1, 4, 4), torch.rand(8))
        >>> x_t.shape
        torch.Size([8, 1, 4, 4])
        """
        c = self.at(t, x_1)
        return PathSample(c.alpha * x_1 + c.sigma * x_0, c.d_alpha * x_1 + c.d_sigma * x_0)


def expand(t: Tensor, x: Tensor) -> Tensor:
    """`t`, a scalar or (B,), reshaped to broadcast with `x` (B, ...)."""
    return t if t.ndim == 0 else t.reshape(-1, *(1 for _ in x.shape[1:]))


def batch_times(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) for a model: a scalar `t` is repeated for each image of `x`."""
    return t.to(x.device).expand(x.shape[0]) if t.ndim == 0 else t


class LinearPath(Path):
    """alpha_t = t, sigma_t = 1 - t: straight lines (Lipman et al. 2023; Liu et al. 2023)."""

    def _coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)

    def _time_at(self, level: Tensor) -> Tensor:
        return 1 / (1 + level)


class TrigonometricPath(Path):
    """alpha_t = sin(pi t / 2), sigma_t = cos(pi t / 2).

    Called GVP by SiT (Ma et al. 2024) after Albergo & Vanden-Eijnden (2023), and "cosine" by
    flow_matching and REPA.
    """

    def _coefficients(self, t: Tensor) -> Coefficients:
        # sigma is a sine of 1 - t because a rounded cosine would be negative at t = 1.
        alpha, sigma = (math.pi / 2 * t).sin(), (math.pi / 2 * (1 - t)).sin()
        return Coefficients(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)

    def _time_at(self, level: Tensor) -> Tensor:
        return torch.atan2(torch.ones_like(level), level) * (2 / math.pi)


class VariancePreservingPath(Path):
    """The VP diffusion of Song et al. (2021) with linear beta, reversed so that noise is at t = 0.

    With u = 1 - t: log alpha_t = -u^2 (beta_max - beta_min) / 4 - u beta_min / 2 and
    sigma_t^2 = 1 - alpha_t^2. The path starts at almost pure noise: alpha_0 = exp(-5.025) = 0.0066.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max and their sum is from 1 (below, the path does
            not start at noise) to 340 (above, alpha_0 is too small for float32).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not (0 < beta_min <= beta_max and 1 <= beta_min + beta_max <= 340):
            raise ValueError(
                f"beta_min={beta_min}, beta_max={beta_max}: need 0 < beta_min <= beta_max, and a "
                "sum of 1 (to start at noise) to 340 (for alpha_0 to stay within float32)"
            )
        self.beta_min, self.beta_max = beta_min, beta_max
        self.end = self._end()

    def _coefficients(self, t: Tensor) -> Coefficients:
        u = 1 - t
        slope = self.beta_max - self.beta_min
        log_alpha = -(u**2) * slope / 4 - u * self.beta_min / 2
        alpha = log_alpha.exp()
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = alpha * (u * slope + self.beta_min) / 2
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def _time_at(self, level: Tensor) -> Tensor:
        # -log alpha_t = log(1 + level^2) / 2 is quadratic in u; this root does not cancel near 0.
        minus_log_alpha = torch.log1p(level**2) / 2
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 4 * slope * minus_log_alpha).sqrt()
        return 1 - 4 * minus_log_alpha / (self.beta_min + root)


class CosinePath(Path):
    """The cosine schedule of Nichol & Dhariwal (2021, equation 17), with noise at t = 0.

    With the angle theta = (1 - t + s) / (1 + s) pi / 2: alpha_t = cos(theta) / cos(theta_1), where
    theta_1 is the angle at t = 1, and sigma_t^2 = 1 - alpha_t^2. A larger offset s > 0 leaves more
    noise near the data.

    Raises:
        ValueError: for an offset outside (0, 1].
    """

    def __init__(self, offset: float = 0.008) -> None:
        if not 0 < offset <= 1:
            raise ValueError(
                f"offset={offset}: must be positive, at most 1 (trigonometric is offset 0)"
            )
        self.offset = offset
        self.end = self._end()

    def _coefficients(self, t: Tensor) -> Coefficients:
        speed = math.pi / 2 / (1 + self.offset)
        last = speed * self.offset
        theta = speed * (1 - t) + last
        scale = math.cos(last)
        alpha = (speed * t).sin() / scale  # theta is pi / 2 - speed t
        # cos^2 b - cos^2 a = sin(a - b) sin(a + b) avoids cancellation when sigma_t is small.
        sigma = ((speed * (1 - t)).sin() * (theta + last).sin()).sqrt() / scale
        d_alpha = speed * theta.sin() / scale
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def _time_at(self, level: Tensor) -> Tensor:
        speed = math.pi / 2 / (1 + self.offset)
        # alpha_t = sin(speed t) / cos(theta_1) is 1 / sqrt(1 + level^2).
        return (math.cos(speed * self.offset) / (1 + level**2).sqrt()).asin() / speed


class PolynomialPath(Path):
    """alpha_t = t^power, sigma_t = 1 - t^power (flow_matching's polynomial convex scheduler).

    Raises:
        ValueError: for a power below 1 (the velocity would be infinite at t = 0) or above 8
            (alpha_t near t = 0 would be too small for float32).
    """

    def __init__(self, power: float = 2.0) -> None:
        if not 1 <= power <= 8:
            raise ValueError(f"power={power}: must be between 1 (the linear path) and 8")
        self.power = power
        self.still_at_start = power > 1

    def _coefficients(self, t: Tensor) -> Coefficients:
        alpha = t**self.power
        d_alpha = self.power * t ** (self.power - 1)
        return Coefficients(alpha, 1 - alpha, d_alpha, -d_alpha)

    def _time_at(self, level: Tensor) -> Tensor:
        return (1 / (1 + level)) ** (1 / self.power)


PATHS: dict[str, type[Path]] = {
    "linear": LinearPath,
    "trigonometric": TrigonometricPath,
    "variance_preserving": VariancePreservingPath,
    "cosine": CosinePath,
    "polynomial": PolynomialPath,
}
