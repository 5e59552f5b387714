"""Times at which the model is trained, and grids of times at which a solver steps.

A time distribution is its quantile function: uniform numbers u in, times t in [0, 1] out. So one
rule stratifies all of them: u_i = (k_i + uniform) / B with k a permutation of 0 .. B - 1 puts
exactly one time in each of B equally likely bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TIME_DISTRIBUTIONS = ("uniform", "logit_normal", "edm")
TIME_GRIDS = ("uniform", "edm", "shifted")
EDM_MEAN, EDM_STD = -1.2, 1.2  # of log sigma, Karras et al. 2022, table 1


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Resolution shift of Esser et al. (2024, equation 23) on the noise level 1 - t.

    1 - t becomes shift (1 - t) / (1 + (shift - 1)(1 - t)). A shift above 1 spends more time near
    the noise, as larger images need; sqrt(pixels / pixels of the base) is usual; 1 changes nothing.
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
        distribution: "uniform"; "logit_normal", the sigmoid of a normal (Esser et al. 2024); "edm",
            log noise level ~ N(-1.2, 1.2^2) with t = 1 / (1 + noise level), which is a logit-normal
            of mean 1.2 and standard deviation 1.2.
        mean, std: of the normal in "logit_normal"; a positive mean leans towards the data.
        shift: see `shift_time`, applied after the distribution.
        stratified: one time in each of B equally likely bins, rather than independent times.

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
            raise ValueError(f"time distribution {self.distribution!r}: choose one of {choices}")
        if not (self.std > 0 and self.shift > 0):
            raise ValueError(f"std={self.std}, shift={self.shift}: both must be positive")

    def __call__(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """(batch_size,) float32 times on the generator's device, in random order."""
        device = generator.device if generator is not None else None
        u = torch.rand(batch_size, generator=generator, device=device)
        if self.stratified:
            # randperm and not arange: every slice of the batch then spans all times.
            bins = torch.randperm(batch_size, generator=generator, device=device)
            u = (bins + u) / batch_size
        return self.quantile(u)

    def quantile(self, u: Tensor) -> Tensor:
        """Times (any shape) below which lies a fraction `u` of the distribution."""
        if self.distribution == "uniform":
            t = u
        else:
            edm = self.distribution == "edm"
            mean, std = (-EDM_MEAN, EDM_STD) if edm else (self.mean, self.std)
            # Rounding may give u = 0 or 1, whose logit would be infinite.
            normal = torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))
            t = torch.sigmoid(mean + std * normal)
        return shift_time(t, self.shift) if self.shift != 1 else t


def time_grid(
    kind: str | Sequence[float] = "uniform",
    steps: int = 50,
    *,
    start: float = 0.0,
    end: float = 1.0,
    shift: float = 3.0,
    rho: float = 7.0,
) -> Tensor:
    """Increasing times (steps + 1,) from `start` to `end` for a solver with fixed steps.

    >>> time_grid("uniform", 4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])

    Args:
        kind: "uniform"; "edm", the rho-grid of Karras et al. (2022, equation 5) with noise levels
            80 to 0.002 and then 0, at t = 1 / (1 + noise level); "shifted", a uniform grid through
            `shift_time`; or the times themselves, whose ends replace `start` and `end`.
        steps: intervals of the grid; ignored for a list of times.

    Raises:
        ValueError: for an unknown kind, steps below 1, or a list that does not increase in [0, 1].
    """
    if not isinstance(kind, str):
        return _custom_grid(kind)
    if kind not in TIME_GRIDS:
        raise ValueError(f"time grid {kind!r}: choose one of {', '.join(TIME_GRIDS)}, or a list")
    if steps < 1:
        raise ValueError(f"steps={steps}: a rollout needs at least 1")
    if not (shift > 0 and rho > 0):
        raise ValueError(f"shift={shift}, rho={rho} of a time grid: both must be positive")
    if not 0 <= start < end <= 1:
        raise ValueError(f"time span {start} to {end}: need 0 <= start < end <= 1")
    grids: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: torch.linspace(0, 1, steps + 1, dtype=torch.float64),
        "shifted": lambda: shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift),
        "edm": lambda: _edm_grid(steps, rho),
    }
    return (start + (end - start) * grids[kind]()).float()


def _edm_grid(steps: int, rho: float) -> Tensor:
    ramp = torch.linspace(0, 1, max(steps, 2), dtype=torch.float64)[:steps]
    low, high = 0.002 ** (1 / rho), 80.0 ** (1 / rho)
    t = 1 / (1 + (high + ramp * (low - high)) ** rho)
    t[0] = 0.0  # ours starts at pure noise
    return torch.cat([t, torch.ones(1, dtype=torch.float64)])


def _custom_grid(times: Sequence[float]) -> Tensor:
    values = [float(t) for t in times]
    increases = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or not increases or values[0] < 0 or values[-1] > 1:
        raise ValueError(f"time grid {values}: need two or more increasing times within [0, 1]")
    return torch.tensor(values)
