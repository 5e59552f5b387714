"""Distributions of training times, and time grids for solvers.

Each distribution is given by its quantile function, from uniform numbers u to times t in [0, 1].
All are therefore stratified alike: u_i = (k_i + uniform) / B, with k a permutation of 0 .. B - 1,
puts exactly one time in each of B equally likely bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowdopr.flow.path import LinearPath, Path

TIME_DISTRIBUTIONS = ("uniform", "logit_normal", "edm")
TIME_GRIDS = ("uniform", "edm", "shifted")
# Karras et al. 2022, table 1: mean and standard deviation of the log noise level in training, and
# the noise levels between which their grid goes.
EDM_MEAN, EDM_STD = -1.2, 1.2
EDM_HIGHEST, EDM_LOWEST = 80.0, 0.002
LINEAR = LinearPath()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Resolution shift of Esser et al. (2024, equation 23) on the noise level 1 - t.

    1 - t becomes shift (1 - t) / (1 + (shift - 1)(1 - t)). A shift above 1 puts more times near the
    noise, as larger images need; sqrt(pixels / pixels of a base size) is usual; 1 changes nothing.
    """
    noise_level = 1 - t
    return 1 - shift * noise_level / (1 + (shift - 1) * noise_level)


@dataclass(frozen=True)
class TimeSampler:
    """Draws training times.

    >>> t = TimeSampler("logit_normal", std=0.8)(256)
    >>> t.shape
    torch.Size([256])

    Args:
        distribution: "uniform"; "logit_normal", the sigmoid of a normal variable (Esser et al.
            2024); "edm", log noise level ~ N(-1.2, 1.2^2), with the level sigma_t / alpha_t of the
            path.
        mean, std: those of the normal variable in "logit_normal"; a positive mean favours times
            near the data.
        shift: applied to the times drawn, see `shift_time`.
        stratified: one time in each of B equally likely bins, instead of independent times.

    Raises:
        ValueError: for an unknown distribution, or a std or shift that is not positive.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    stratified: bool = True

    def __post_init__(self) -> None:
        if self.distribution not in TIME_DISTRIBUTIONS:
            choices = ", ".join(TIME_DISTRIBUTIONS)
            raise ValueError(f"distribution={self.distribution!r}: choose one of {choices}")
        if not (self.std > 0 and self.shift > 0):
            raise ValueError(f"std={self.std}, shift={self.shift}: both must be positive")

    def __call__(
        self, batch_size: int, generator: torch.Generator | None = None, path: Path = LINEAR
    ) -> Tensor:
        """(batch_size,) float32 times on the generator's device, in random order."""
        device = generator.device if generator is not None else None
        u = torch.rand(batch_size, generator=generator, device=device)
        if self.stratified:
            # Bins are shuffled so that every slice of the batch covers all of [0, 1].
            bins = torch.randperm(batch_size, generator=generator, device=device)
            u = (bins + u) / batch_size
        return self.quantile(u, path)

    def quantile(self, u: Tensor, path: Path = LINEAR) -> Tensor:
        """The quantile function at `u`, of any shape; only "edm" depends on `path`."""
        # u may be 0, or 1 by rounding, where the normal quantile is infinite.
        normal = torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))
        if self.distribution == "uniform":
            t = u
        elif self.distribution == "edm":
            t = path.time_at((EDM_MEAN - EDM_STD * normal).exp())  # t rises where the level falls
        else:
            t = torch.sigmoid(self.mean + self.std * normal)
        return shift_time(t, self.shift) if self.shift != 1 else t


def time_grid(
    kind: str | Sequence[float] = "uniform",
    steps: int = 50,
    *,
    start: float = 0.0,
    end: float = 1.0,
    shift: float = 3.0,
    rho: float = 7.0,
    path: Path = LINEAR,
) -> Tensor:
    """Increasing times (steps + 1,) from `start` to `end`, for a solver with fixed steps.

    >>> time_grid("uniform", 4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])

    Args:
        kind: "uniform"; "edm", the grid of Karras et al. (2022, equation 5) with exponent `rho`, at
            the times where `path` has the noise levels from 80 to 0.002, and then `end`;
            "shifted", a uniform grid mapped by `shift_time`; or a list of times, which replaces all
            the rest.
        steps: number of intervals.

    Raises:
        ValueError: for an unknown kind, steps below 1, or a list that does not increase in [0, 1].
    """
    if not isinstance(kind, str):
        return _custom_grid(kind)
    if kind not in TIME_GRIDS:
        raise ValueError(f"time_grid={kind!r}: choose one of {', '.join(TIME_GRIDS)}, or a list")
    if steps < 1:
        raise ValueError(f"steps={steps}: a rollout needs at least 1")
    if not (shift > 0 and rho > 0):
        raise ValueError(f"time_grid: shift={shift}, rho={rho}: both must be positive")
    if not 0 <= start < end <= 1:
        raise ValueError(f"time_grid: start={start}, end={end}: need 0 <= start < end <= 1")
    if kind == "edm":
        return _edm_grid(steps, rho, path, start, end).float()
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid = shift_time(grid, shift) if kind == "shifted" else grid
    return (start + (end - start) * grid).float()


def _edm_grid(steps: int, rho: float, path: Path, start: float, end: float) -> Tensor:
    """EDM's noise levels within those of `start` and `end`, as times from `start` to `end`.

    Where `end` lies beyond EDM's lowest level, the last interval leads from that level to `end`.
    """
    c = path(torch.tensor([start, end], dtype=torch.float64))
    first, last = (c.sigma / c.alpha).tolist()
    beyond = last < 0.999 * EDM_LOWEST  # and not equal but for rounding
    high, low = min(first, EDM_HIGHEST) ** (1 / rho), max(last, EDM_LOWEST) ** (1 / rho)
    ramp = torch.linspace(0, 1, max(steps + (not beyond), 2), dtype=torch.float64)
    inner = path.time_at((high + ramp * (low - high)) ** rho)[1:steps]
    return torch.cat([ramp.new_tensor([start]), inner, ramp.new_tensor([end])])


def _custom_grid(times: Sequence[float]) -> Tensor:
    values = [float(t) for t in times]
    increases = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or not increases or values[0] < 0 or values[-1] > 1:
        raise ValueError(f"time_grid={values}: need two or more increasing times within [0, 1]")
    return torch.tensor(values)
