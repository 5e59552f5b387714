"""Rollouts: the ODE dx/dt = v(x, t) from noise at t = 0 to data at t = 1, by torchdiffeq.

A velocity is any function v(x, t) of a state (B, ...) and a scalar time. If it has an attribute
`calls` (see guidance.py) this counts model calls; otherwise each evaluation is one.
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
# One image's result depends on the others in its batch: step sizes (adaptive) and the number of
# corrector iterations (implicit Adams) are chosen for the batch as a whole.
BATCH_DEPENDENT_SOLVERS = (*ADAPTIVE_SOLVERS, "implicit_adams", "fixed_adams")

ROUNDING = 1e-6  # by which the float32 times of a uniform grid may miss equal steps
MAX_ADAPTIVE_STEPS = 10_000  # beyond this the tolerance is below the precision of the state
SCIPY_STAGES = 6  # calls a step of scipy's RK45, whose steps have no limit of their own
SOLVER_FAILURES = ("underflow in dt", "non-finite values", "max_num_steps exceeded")


class Rollout(NamedTuple):
    """The state at the last time (B, ...) and the number of model calls."""

    x_1: Tensor
    nfe: int


class CountCalls:
    """Counts evaluations of a velocity."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.velocity(x, t)


def check_solver(solver: str, grid: Tensor) -> None:
    """Refuse an unknown solver, or times that a solver cannot follow.

    Raises:
        ValueError: in one line, with the remedy.
    """
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

    With a fixed-step solver other than implicit Adams the result for image i is the same whatever
    else is in the batch, up to rounding; see BATCH_DEPENDENT_SOLVERS for those that cannot.

    Args:
        x_0: states (B, ...); half precision is integrated in float32.
        grid: increasing or decreasing times (N + 1,): the N steps of a fixed-step solver. Adaptive
            solvers use its ends alone; multistep solvers need equal steps.
        solver: any method of torchdiffeq by its own name, see ODE_SOLVERS.
        atol, rtol: tolerances of adaptive solvers and of implicit Adams.

    Raises:
        ValueError: for an unknown solver, a grid that it cannot follow, or an adaptive solver that
            cannot reach its tolerances.
    """
    check_solver(solver, grid)
    x_0 = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
    low, high = float(grid.min()), float(grid.max())
    counter = counted(velocity)
    before = calls_of(counter)

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        # A first trial step of an adaptive solver may reach beyond the span; models know only it.
        return counter(x, t.clamp(low, high))

    x = _integrate(derivative, x_0, grid.to(x_0), solver, atol, rtol)
    return Rollout(x, calls_of(counter) - before)


def _integrate(
    derivative: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    grid: Tensor,
    solver: str,
    atol: float,
    rtol: float,
) -> Tensor:
    """The state at the end of `grid`, by torchdiffeq; its failures become one line."""
    options = _options(solver, grid)
    # torchdiffeq keeps the state at every time it is asked for, so ask only for the ends.
    ends = grid[[0, -1]]
    if solver == "scipy_solver":
        derivative = _limited(derivative, SCIPY_STAGES * MAX_ADAPTIVE_STEPS)
    try:
        states: Any = odeint(
            derivative, x_0, ends, method=solver, atol=atol, rtol=rtol, options=options
        )
        # scipy returns what it has, without a word, when it cannot reach the end.
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
    """`derivative` with the failures of torchdiffeq's own adaptive solvers."""
    calls = 0

    def checked(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        slope = derivative(t, x)
        assert calls <= limit, "max_num_steps exceeded"
        assert slope.isfinite().all(), "non-finite values"
        return slope

    return checked


def _options(solver: str, grid: Tensor) -> dict[str, Any]:
    """torchdiffeq's options: the grid of a fixed-step solver, the last step of an adaptive one."""
    if solver == "scipy_solver":
        return {}
    if solver in ADAPTIVE_SOLVERS:
        # Left alone they step over the end and interpolate back.
        return {"step_t": grid[-1:], "max_num_steps": MAX_ADAPTIVE_STEPS}
    return {"grid_constructor": lambda func, y0, t: grid}


def counted(velocity: Velocity) -> Velocity:
    """`velocity` itself if it counts its calls, else wrapped in a counter."""
    return velocity if hasattr(velocity, "calls") else CountCalls(velocity)


def calls_of(velocity: Velocity) -> int:
    """Model calls that a counting velocity has made."""
    return int(getattr(velocity, "calls", 0))
