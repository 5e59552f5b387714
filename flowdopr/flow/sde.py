"""Stochastic rollouts for paths with a score (Song et al. 2021; Ma et al. 2024, SiT).

    dx = [v + w_t s / 2] dt + sqrt(w_t) dW,     s = grad log p_t = -E[x_0 | x_t] / sigma_t      (8)

has the marginals of the ODE for every w_t >= 0. With w_t = 2 noise_scale sigma_t (SiT's diffusion
"sigma" with this norm) the drift is v - noise_scale E[x_0 | x_t], finite at both ends of time.

The score formula holds when x_0 is Gaussian and independent of x_1: not after a coupling by optimal
transport. The last step adds no fresh noise, which would be left in the images. By SiT's names:

    tweedie    E[x_1 | x_t], the posterior mean (on the linear path also SiT's "Euler", x + v dt)
    mean       x + drift dt, the mean of the stochastic step, SiT's default with dt = 0.04
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from flowdopr.flow.path import Path
from flowdopr.flow.prediction import convert
from flowdopr.flow.solver import Rollout, Velocity, calls_of, counted

SDE_SOLVERS = ("euler_maruyama", "sde_heun")
LAST_STEPS = ("tweedie", "mean")


def posterior_mean(velocity: Velocity, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """E[x_1 | x_t = x], one evaluation of `velocity`; for the linear path x + (1 - t) v."""
    return convert(velocity(x, t), x, t, path, "velocity", "data")


def solve_sde(
    velocity: Velocity,
    x_0: Tensor,
    path: Path,
    noise: Callable[[], Tensor],
    *,
    grid: Tensor,
    solver: str = "euler_maruyama",
    noise_scale: float = 1.0,
    last_step: str = "tweedie",
) -> Rollout:
    """Integrate (8) over the times `grid` by Euler-Maruyama or by Heun.

    >>> import torch
    >>> from flowdopr.flow import LinearPath, time_grid
    >>> x_0 = torch.randn(4, 3)
    >>> draw = lambda: torch.randn(4, 3)
    >>> solve_sde(lambda x, t: -x, x_0, LinearPath(), draw, grid=time_grid("uniform", 10)).nfe
    10

    Heun's method (stochastic, as in SiT) adds the noise first and then takes a deterministic
    trapezoid step, two calls an interval.

    Args:
        noise: called once an interval, gives standard normal numbers of the shape of `x_0`.
        grid: increasing times (N + 1,); its last interval is the last step.
        noise_scale: of w_t; 1 is SiT's default, 0 is the ODE by Euler or by Heun.
        last_step: of LAST_STEPS, one call.

    Raises:
        ValueError: for an unknown solver or last step, a path without score or a negative noise
            scale.
    """
    check_sde(solver, path, noise_scale, last_step=last_step)
    counter = counted(velocity)
    before = calls_of(counter)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = counter(x, t)
        return v - noise_scale * convert(v, x, t, path, "velocity", "noise")

    x, grid = x_0, grid.to(x_0)
    for t, t_next in pairwise(grid[:-1]):
        dt = t_next - t
        shaken = x + (2 * noise_scale * path(t).sigma * dt).sqrt() * noise()
        if solver == "euler_maruyama":
            x = shaken + dt * drift(x, t)
        else:
            slope = drift(shaken, t)
            x = shaken + dt / 2 * (slope + drift(shaken + dt * slope, t_next))
    if last_step == "tweedie":
        x = posterior_mean(counter, x, grid[-2], path)
    else:
        x = x + (grid[-1] - grid[-2]) * drift(x, grid[-2])
    return Rollout(x, calls_of(counter) - before)


def check_sde(
    solver: str,
    path: Path,
    noise_scale: float,
    coupling: str = "independent",
    last_step: str = "tweedie",
) -> None:
    """Refuse stochastic sampling that cannot work.

    Raises:
        ValueError: in one line, with the remedy.
    """
    if solver not in SDE_SOLVERS:
        raise ValueError(f"SDE solver={solver!r}: choose one of {', '.join(SDE_SOLVERS)}")
    if last_step not in LAST_STEPS:
        raise ValueError(f"last_step={last_step!r}: choose one of {', '.join(LAST_STEPS)}")
    if noise_scale < 0:
        raise ValueError(f"noise_scale={noise_scale}: must not be negative (0 is the ODE)")
    if not path.has_score:
        raise ValueError(
            f"solver={solver!r} needs a score, {type(path).__name__} has none: use an ODE solver"
        )
    if coupling != "independent":
        raise ValueError(
            f"solver={solver!r} needs a score, coupling {coupling!r} has none: use an ODE solver"
        )
