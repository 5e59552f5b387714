"""Stochastic rollouts have the marginals of the ODE; the last step is the posterior mean."""

import pytest
import torch
from analytic import EXAMPLE_PATHS, Mixture

from flowdopr.flow import (
    LinearPath,
    Path,
    Sampling,
    TrigonometricPath,
    VariancePreservingPath,
    guided_velocity,
    solve,
    solve_sde,
    time_grid,
)
from flowdopr.flow.sde import LAST_STEPS, SDE_SOLVERS, posterior_mean

paths = pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)


@paths
@pytest.mark.parametrize("solver", SDE_SOLVERS)
@pytest.mark.parametrize("noise_scale", [0.5, 1.0])
def test_samples_follow_the_data_distribution(path, solver, noise_scale):
    """Kolmogorov-Smirnov distance of 5,000 samples from the mixture; chance gives 0.02."""
    mixture, count = Mixture(), 5_000
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(count, 1, generator=generator)

    grid = time_grid("shifted", 100, end=min(path.end, 0.999), shift=1 / 2)
    velocity = guided_velocity(mixture.model(path), path=path)
    x_1, nfe = solve_sde(
        velocity, noise(), path, noise, grid=grid, solver=solver, noise_scale=noise_scale
    )
    probabilities = mixture.cdf(x_1.double(), torch.ones(()).double(), path).flatten().sort().values
    distance = (probabilities - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < (0.06 if solver == "euler_maruyama" else 0.03)
    assert nfe == (100 if solver == "euler_maruyama" else 199)


@pytest.mark.parametrize(("solver", "ode"), [("euler_maruyama", "euler"), ("sde_heun", "heun2")])
def test_without_noise_it_is_the_ode(solver, ode):
    path, x_0 = LinearPath(), torch.randn(5, 2)
    grid = time_grid("uniform", 10)

    def velocity(x, t):
        return torch.sin(3 * x) - t

    x_1, _ = solve_sde(
        velocity, x_0, path, lambda: torch.randn(5, 2), grid=grid, solver=solver, noise_scale=0
    )
    before_last, _ = solve(velocity, x_0, grid[:-1], solver=ode)
    assert torch.allclose(x_1, posterior_mean(velocity, before_last, grid[-2], path), atol=1e-6)


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("path", [LinearPath(), TrigonometricPath()])
def test_steps_and_last_step_are_sits(path, last_step):
    """SiT's sample_sde in float64: N - 1 steps from 0 to 1 - size, then one of that size."""
    steps, size, generator = 25, 0.04, torch.Generator().manual_seed(3)
    x_0 = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    draws = torch.randn(steps, 6, 2, generator=generator, dtype=torch.float64)
    velocity = guided_velocity(Mixture().model(path), path=path)

    def score(x, t):
        c = path(t)
        v = velocity(x, t)
        ratio = c.alpha / c.d_alpha  # SiT's get_score_from_velocity
        return (ratio * v - x) / (c.sigma**2 - ratio * c.d_sigma * c.sigma)

    def drift(x, t):
        return velocity(x, t) + path(t).sigma * score(x, t)

    times = torch.linspace(0, 1 - size, steps, dtype=torch.float64)
    x, dt = x_0, times[1] - times[0]
    for t, draw in zip(times[:-1], draws, strict=False):
        x = x + drift(x, t) * dt + (2 * path(t).sigma * dt).sqrt() * draw
    c, t = path(times[-1]), times[-1]
    tweedie = x / c.alpha + c.sigma**2 / c.alpha * score(x, t)
    expected = {"mean": x + drift(x, t) * size, "tweedie": tweedie}[last_step]
    sampling = Sampling(
        path, solver="euler_maruyama", steps=steps, last_step=last_step, last_step_size=size
    )
    noise = iter(draws)
    result = sampling.rollout(velocity, x_0, lambda: next(noise))
    assert torch.allclose(result.x_1, expected, atol=1e-5)
    assert result.nfe == steps


def test_the_last_step_is_the_last_interval_by_default():
    def grid(**settings):
        return Sampling(solver="sde_heun", steps=4, **settings).grid().tolist()

    assert grid() == [0, 0.25, 0.5, 0.75, 1]
    assert grid(last_step_size=0.1) == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert grid(path=VariancePreservingPath())[-1] == 1
    assert grid(prediction="data")[-1] == 1


@paths
def test_posterior_mean_is_exact(path):
    mixture, t = Mixture(), torch.tensor(0.6, dtype=torch.float64)
    x = torch.randn(50, 1, dtype=torch.float64)
    mean = posterior_mean(guided_velocity(mixture.model(path), path=path), x, t, path)
    assert torch.allclose(mean, mixture.posterior(x, t.expand(50, 1), path)[1])


@paths
def test_the_score_is_the_gradient_of_the_log_density(path):
    mixture = Mixture()
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)[:, None].expand(19, 41)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).expand(19, 41).clone().requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, t, path).sum(), x)
    x_0, _ = mixture.posterior(x.detach(), t, path)
    assert torch.allclose(score, -x_0 / path(t).sigma, rtol=1e-8, atol=1e-8)


class NoScore(LinearPath):
    has_score = False


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        (NoScore(), {}, "needs a score"),
        (LinearPath(), {"solver": "euler"}, "choose one of"),
        (LinearPath(), {"noise_scale": -1.0}, "negative"),
        (LinearPath(), {"last_step": "Euler"}, "choose one of tweedie, mean"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(path: Path, settings, words):
    def untouched(*_):
        raise AssertionError("something ran")

    with pytest.raises(ValueError, match=words):
        solve_sde(untouched, torch.ones(1), path, untouched, grid=time_grid(), **settings)
