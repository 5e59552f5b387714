"""Stochastic rollouts for paths with a score (Song et al. 2021; Ma et al. 2024, SiT).

    dx = [v + w_t s / 2] dt + sqrt(w_t) dW,     s = grad log p_t = -E[x_0 | x_t] / sigma_t      (8)

has the same marginals as the ODE for every w_t >= 0. Here w_t = 2 noise_scale sigma_t (SiT's
diffusion form "sigma"), so the drift is v - noise_scale E[x_0 | x_t], finite at both ends of time.

The formula for the score s holds when x_0 is Gaussian and independent of x_1, so not after a
coupling by optimal transport. The last step adds no noise, because noise added there would stay in
the images. It has two forms, by SiT's names:

    tweedie    E[x_1 | x_t], the posterior mean (on the linear path also SiT's "Euler", x + v dt)
    mean       x + drift dt, the mean of the stochastic step, SiT's default with dt = 0.04
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from flowdopr.flow.path import Path
from flowdopr.flow.prediction import convert
from flowdopr.flow.solver import CountCalls, Rollout, Velocity

SDE_SOLVERS = ("euler_maruyama", "sde_heun")
LAST_STEPS = ("tweedie", "mean")


def posterior_mean(velocity: Velocity, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """E[x_1 | x_t = x] from one evaluation of `velocity`; x + (1 - t) v on the linear path."""
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

    The stochastic Heun method adds the noise first and then takes a deterministic trapezoid step,
    with two calls an interval, as in SiT.

    Args:
        velocity: v(x, t) as in `solve`.
        x_0: noise (B, ...).
        path: path of the velocity.
        noise: returns standard normal numbers of the shape of `x_0`; called once an interval.
        grid: increasing times (N + 1,); the last interval is the last step.
        solver: "euler_maruyama" or "sde_heun".
        noise_scale: factor in w_t; 1 is SiT's default, 0 is the ODE by Euler or by Heun.
        last_step: "tweedie" or "mean"; either is one call.

    Raises:
        ValueError: for an unknown solver or last step, a path without a score, or a negative noise
            scale.
    """
    check_sde(solver, path, noise_scale, last_step=last_step)
    counter = CountCalls(velocity)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = counter(x, t)
        return v - noise_scale * convert(v, x, t, path, "velocity", "noise")

    x, grid = x_0, grid.to(x_0)
    for t, t_next in pairwise(grid[:-1]):
        dt = t_next - t
        noisy = x + (2 * noise_scale * path(t).sigma * dt).sqrt() * noise()
        if solver == "euler_maruyama":
            x = noisy + dt * drift(x, t)
        else:
            slope = drift(noisy, t)
            x = noisy + dt / 2 * (slope + drift(noisy + dt * slope, t_next))
    if last_step == "tweedie":
        x = posterior_mean(counter, x, grid[-2], path)
    else:
        x = x + (grid[-1] - grid[-2]) * drift(x, grid[-2])
    return Rollout(x, counter.calls)


def check_sde(
    solver: str,
    path: Path,
    noise_scale: float,
    coupling: str = "independent",
    last_step: str = "tweedie",
) -> None:
    """Raise ValueError for settings with which stochastic sampling cannot work."""
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
            f"solver={solver!r} needs a score, coupling={coupling!r} has none: use an ODE solver"
        )
