"""Rollouts: the ODE dx/dt = v(x, t) from noise at t = 0 to data at t = 1, by torchdiffeq.

A velocity is any function v(x, t) of a state (B, ...) and a scalar time. If it has an attribute
`calls` (see guidance.py), this counts its model calls; otherwise each evaluation counts as one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

Velocity = Callable[[Tensor, Tensor], Tensor]

CALLS_A_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
MULTISTEP_SOLVERS = ("explicit_adams", "implicit_adams", "fixed_adams")
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
ODE_SOLVERS = (*CALLS_A_STEP, *MULTISTEP_SOLVERS, *ADAPTIVE_SOLVERS)
# With these an image depends on the others in its batch: adaptive step sizes and the number of
# corrector iterations of implicit Adams are chosen for the whole batch.
BATCH_DEPENDENT_SOLVERS = (*ADAPTIVE_SOLVERS, "implicit_adams", "fixed_adams")

ROUNDING = 1e-6  # tolerance on equal steps, because the times of a grid are float32
MAX_ADAPTIVE_STEPS = 10_000  # a solver that needs more has a tolerance below float precision
SCIPY_STAGES = 6  # calls a step of scipy's RK45, which has no limit on its number of steps
SOLVER_FAILURES = ("underflow in dt", "non-finite values", "max_num_steps exceeded")


class Rollout(NamedTuple):
    """x_1: the state (B, ...) at the last time. nfe: the number of model calls."""

    x_1: Tensor
    nfe: int


class CountCalls:
    """A velocity with the number of model calls made through this wrapper, in `calls`."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        before = getattr(self.velocity, "calls", 0)
        v = self.velocity(x, t)
        self.calls += getattr(self.velocity, "calls", before + 1) - before
        return v


def check_solver(solver: str, grid: Tensor) -> None:
    """Raise ValueError for an unknown solver, or for times that the solver cannot follow."""
    if solver not in ODE_SOLVERS:
        raise ValueError(f"solver={solver!r}: choose one of {', '.join(ODE_SOLVERS)}")
    steps = grid.diff()
    if grid.ndim != 1 or len(grid) < 2 or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError(f"grid {grid.tolist()}: need two or more increasing or decreasing times")
    if solver in MULTISTEP_SOLVERS:
        equal = torch.linspace(float(grid[0]), float(grid[-1]), len(grid), dtype=torch.float64)
        if (grid.cpu().double() - equal).abs().max() > ROUNDING:
            raise ValueError(f"solver={solver!r} needs equal steps: give it a uniform grid")


def solve(
    velocity: Velocity,
    x_0: Tensor,
    grid: Tensor,
    *,
    solver: str = "midpoint",
    atol: float = 1e-5,
    rtol: float = 1e-5,
) -> Rollout:
    """Integrate `velocity` from `x_0` at the first of the times `grid` to the last.

    >>> from flowdopr.flow import time_grid
    >>> x_1, nfe = solve(lambda x, t: -x, torch.ones(2, 3), time_grid("uniform", 10), solver="rk4")
    >>> nfe
    40

    Image i does not depend on the rest of its batch, up to rounding, except with the solvers in
    BATCH_DEPENDENT_SOLVERS.

    Args:
        velocity: v(x, t) -> (B, ...) for states x (B, ...) and a scalar time t.
        x_0: states (B, ...); half precision is integrated in float32.
        grid: increasing or decreasing times (N + 1,). Fixed-step solvers take these N steps,
            multistep solvers need them equal, and adaptive solvers use only the two ends.
        solver: one of ODE_SOLVERS, torchdiffeq's names.
        atol, rtol: tolerances of adaptive solvers and of implicit Adams.

    Raises:
        ValueError: for an unknown solver, a grid that it cannot follow, or tolerances that an
            adaptive solver cannot reach.
    """
    check_solver(solver, grid)
    x_0 = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
    low, high = float(grid.min()), float(grid.max())
    counter = CountCalls(velocity)

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        # The first trial step of an adaptive solver may leave the span in which models are trained.
        return counter(x, t.clamp(low, high))

    x = _integrate(derivative, x_0, grid.to(x_0), solver, atol, rtol)
    return Rollout(x, counter.calls)


def _integrate(
    derivative: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    grid: Tensor,
    solver: str,
    atol: float,
    rtol: float,
) -> Tensor:
    """The state at the end of `grid`; an assertion that fails in torchdiffeq becomes a ValueError
    of one line."""
    options: dict[str, Any] = {"grid_constructor": lambda func, y0, t: grid}
    if solver == "scipy_solver":
        options, derivative = {}, _limited(derivative, SCIPY_STAGES * MAX_ADAPTIVE_STEPS)
    elif solver in ADAPTIVE_SOLVERS:
        # Without `step_t` the last step would go beyond the end and be interpolated back.
        options = {"step_t": grid[-1:], "max_num_steps": MAX_ADAPTIVE_STEPS}
        if x_0.device.type == "mps":  # no float64 there, in which torchdiffeq keeps times
            options["dtype"] = torch.float32
    ends = grid[[0, -1]]  # torchdiffeq keeps the state at each of the times given here
    try:
        states: Any = odeint(
            derivative, x_0, ends, method=solver, atol=atol, rtol=rtol, options=options
        )
        # scipy returns fewer states, without an error, when it cannot reach the end.
        assert len(states) == len(ends), "underflow in dt"
    except AssertionError as error:
        reason = str(error).split("`")[0].strip()
        if not reason.startswith(SOLVER_FAILURES):
            raise
        raise ValueError(
            f"solver={solver!r} failed ({reason}): raise atol={atol} and rtol={rtol}, "
            "or use a fixed-step solver"
        ) from error
    return states[-1]


def _limited(
    derivative: Callable[[Tensor, Tensor], Tensor], limit: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """`derivative` with the assertions that torchdiffeq makes in its own adaptive solvers."""
    calls = 0

    def checked(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        slope = derivative(t, x)
        assert calls <= limit, "max_num_steps exceeded"
        assert slope.isfinite().all(), "non-finite values"
        return slope

    return checked
