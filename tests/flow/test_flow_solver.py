"""Solvers against a known solution: accuracy, number of calls, independence of the batch."""

import math

import pytest
import torch

from flowdopr.flow import (
    BATCH_DEPENDENT_SOLVERS,
    ODE_SOLVERS,
    solve,
    time_grid,
)
from flowdopr.flow.solver import CALLS_A_STEP, MULTISTEP_SOLVERS

SPAN = torch.tensor([0.0, 1.0])


class Field:
    """dx/dt = cos(3 t) x with x(1) = x(0) exp(sin(3) / 3); keeps the times of all evaluations."""

    def __init__(self):
        self.times = []

    def __call__(self, x, t):
        assert t.ndim == 0
        self.times.append(t.item())
        return torch.cos(3 * t) * x


START = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
END = START * math.exp(math.sin(3) / 3)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_every_solver_finds_the_solution_and_counts_its_calls(solver, backwards):
    field = Field()
    start, end = (END, START) if backwards else (START, END)
    grid = time_grid("uniform", 200)
    grid = grid.flip(0) if backwards else grid
    x, nfe = solve(field, start, grid, solver=solver, atol=1e-7, rtol=1e-7)
    assert torch.allclose(x, end, rtol=1e-2 if solver == "euler" else 2e-4)
    assert nfe == len(field.times)
    assert min(field.times) >= 0
    assert max(field.times) <= 1
    if solver in CALLS_A_STEP:
        assert nfe == 200 * CALLS_A_STEP[solver]


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
@pytest.mark.parametrize("grid", ["uniform", "shifted"])
def test_error_falls_with_the_order_of_the_solver(solver, order, grid):
    def error(steps):
        return (solve(Field(), START, time_grid(grid, steps), solver=solver)[0] - END).norm()

    coarse, fine = (20, 40) if order < 3 else (8, 16)
    assert math.log2(error(coarse) / error(fine)) > order - 0.6


@pytest.mark.parametrize("solver", CALLS_A_STEP)
def test_one_step_solvers_are_right_on_the_rho_grid(solver):
    x, _ = solve(Field(), START, time_grid("edm", 200), solver=solver)
    assert torch.allclose(x, END, rtol=3e-2 if solver == "euler" else 1e-3)


@pytest.mark.parametrize("solver", [n for n in ODE_SOLVERS if n not in BATCH_DEPENDENT_SOLVERS])
def test_an_image_does_not_depend_on_its_batch(solver):
    def curved(x, t):
        return torch.sin(5 * x + t) * 3

    x_0 = torch.randn(6, 3)
    grid = time_grid("uniform", 20)
    together, _ = solve(curved, x_0, grid, solver=solver)
    alone = torch.cat([solve(curved, x, grid, solver=solver)[0] for x in x_0.split(1)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_adaptive_solvers_choose_steps_for_the_batch():
    def stiff(x, t):
        return -50 * x * x.abs()

    easy, hard = torch.full((1, 1), 0.01), torch.full((1, 1), 3.0)
    _, few = solve(stiff, easy, SPAN, solver="dopri5")
    _, many = solve(stiff, torch.cat([easy, hard]), SPAN, solver="dopri5")
    assert many > few


def test_half_precision_is_integrated_in_float32():
    ones = torch.ones(2, 2, dtype=torch.bfloat16)
    x, _ = solve(lambda x, t: -x, ones, time_grid("uniform", 20), solver="rk4")
    assert x.dtype == torch.float32
    assert torch.allclose(x, torch.full((2, 2), math.exp(-1)), atol=1e-6)


def test_a_fixed_step_solver_steps_at_the_times_of_the_grid():
    field = Field()
    solve(field, START, torch.tensor([0.0, 0.5, 0.75, 1.0]), solver="euler")
    assert field.times == [0.0, 0.5, 0.75]


def test_calls_that_the_velocity_counts_itself_are_used():
    class Double:
        calls = 0

        def __call__(self, x, t):
            self.calls += 2
            return -x

    velocity = Double()
    assert solve(velocity, START, time_grid("uniform", 5), solver="midpoint").nfe == 20
    assert solve(velocity, START, time_grid("uniform", 5), solver="midpoint").nfe == 20


@pytest.mark.parametrize(
    ("solver", "times", "words"),
    [
        ("dpm", [0.0, 1.0], "choose one of euler"),
        *((name, [0.0, 0.4, 1.0], "equal steps") for name in MULTISTEP_SOLVERS),
        ("euler", [0.0], "two or more increasing or decreasing times"),
        ("euler", [0.0, 0.5, 0.5, 1.0], "two or more increasing or decreasing times"),
        ("dopri5", [0.0, 1.0, 0.5], "two or more increasing or decreasing times"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(solver, times, words):
    def untouched(x, t):
        raise AssertionError("the velocity was called")

    with pytest.raises(ValueError, match=words) as error:
        solve(untouched, START, torch.tensor(times), solver=solver)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("solver", ["bosh3", "dopri5", "scipy_solver"])
@pytest.mark.parametrize(
    ("velocity", "tolerance"),
    [
        (lambda x, t: x * math.nan, 1e-5),
        (lambda x, t: torch.sin(1e4 * x), 1e-13),
        (lambda x, t: -1e6 * x, 1e-5),  # stiff
        (lambda x, t: x * x * 1e3, 1e-5),  # infinite within the span
    ],
)
def test_a_failure_of_an_adaptive_solver_is_one_line_with_the_remedy(
    solver, velocity, tolerance, monkeypatch
):
    monkeypatch.setattr("flowdopr.flow.solver.MAX_ADAPTIVE_STEPS", 100)
    x_0 = torch.rand(5, 5) + 0.5
    with pytest.raises(ValueError, match=f"{solver}.* use a fixed-step solver") as error:
        solve(velocity, x_0, SPAN, solver=solver, atol=tolerance, rtol=tolerance)
    assert "\n" not in str(error.value)


def test_an_assertion_of_the_model_stays_an_assertion():
    def broken(x, t):
        raise AssertionError("shapes differ")

    with pytest.raises(AssertionError, match="shapes differ"):
        solve(broken, START, SPAN, solver="dopri5")


def test_adaptive_solvers_step_to_the_end_and_never_beyond():
    field = Field()
    solve(field, START, SPAN, solver="dopri5")
    assert sum(t > 1 - 1e-9 for t in field.times) == 2  # the last two stages of the last step
    times = []

    def nearly_still(x, t):  # whose first trial step would be long
        times.append(t.item())
        return 1e-4 * x

    solve(nearly_still, START, SPAN, solver="dopri5")
    assert max(times) <= 1
