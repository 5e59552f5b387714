"""Paths against finite differences, the continuity equation and exact transport of a mixture."""

import math

import pytest
import torch
from analytic import EXAMPLE_PATHS, Mixture

from flowdopr.flow import (
    PATHS,
    CosinePath,
    LinearPath,
    Path,
    PolynomialPath,
    TrigonometricPath,
    VariancePreservingPath,
    guided_velocity,
    solve,
)

paths = pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)


@paths
def test_derivatives_equal_finite_differences(path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    h = 1e-6
    before, here, after = path(t - h), path(t), path(t + h)
    slope_alpha = (after.alpha - before.alpha) / (2 * h)
    slope_sigma = (after.sigma - before.sigma) / (2 * h)
    assert torch.allclose(here.d_alpha, slope_alpha, rtol=1e-6, atol=1e-8)
    assert torch.allclose(here.d_sigma, slope_sigma, rtol=1e-6, atol=1e-8)


@paths
def test_ends_are_noise_and_data(path):
    start, end = path(torch.tensor(0.0)), path(torch.tensor(1.0))
    assert start.sigma.item() == pytest.approx(1, abs=1e-4)
    assert 0 <= start.alpha.item() < 0.007  # exp(-5.025) on the variance-preserving path
    assert end.alpha.item() == pytest.approx(1, abs=1e-4)
    assert 0 <= end.sigma.item() < 0.004


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_coefficients_are_finite_on_all_of_time_and_at_least_float32(path, dtype):
    c = path(torch.linspace(0, 1, 1001).to(dtype))
    for value in c:
        assert value.isfinite().all()
        assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert (c.alpha >= 0).all()
    assert (c.sigma >= 0).all()
    assert (c.determinant[1:-1] > 0).all()


@pytest.mark.parametrize("path", [TrigonometricPath(), VariancePreservingPath(), CosinePath()])
def test_variance_preserving_paths_preserve_variance(path):
    c = path(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert torch.allclose(c.alpha**2 + c.sigma**2, torch.ones(()).double(), atol=1e-12)


@paths
def test_sample_broadcasts_times_and_matches_its_definition(path):
    x_0, x_1 = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    x_t, dx_t = path.sample(x_0, x_1, t)
    for i in range(3):
        c = path(t[i])
        assert torch.allclose(x_t[i], c.alpha * x_1[i] + c.sigma * x_0[i])
        assert torch.allclose(dx_t[i], c.d_alpha * x_1[i] + c.d_sigma * x_0[i])
        assert torch.equal(path.sample(x_0, x_1, t[i]).x_t[i], x_t[i])


def test_half_precision_images_are_mixed_in_float32():
    x_0, x_1 = torch.randn(2, 5, dtype=torch.bfloat16), torch.randn(2, 5, dtype=torch.bfloat16)
    x_t, dx_t = LinearPath().sample(x_0, x_1, torch.rand(2))
    assert x_t.dtype == dx_t.dtype == torch.float32


@paths
def test_marginals_of_a_mixture_obey_the_continuity_equation(path):
    """d/dt p_t(x) + d/dx (p_t(x) v(x, t)) = 0, derivatives by autograd in float64."""
    mixture = Mixture()
    t, x = torch.meshgrid(
        torch.linspace(0.02, 0.98, 25, dtype=torch.float64),
        torch.linspace(-2.5, 2.5, 41, dtype=torch.float64),
        indexing="ij",
    )
    t, x = t.clone().requires_grad_(), x.clone().requires_grad_()
    density = mixture.log_density(x, t, path).exp()
    (change,) = torch.autograd.grad(density.sum(), t, retain_graph=True)
    flux = density * mixture.velocity(x, t.detach(), path)
    (outflow,) = torch.autograd.grad(flux.sum(), x)
    scale = change.abs().max()
    assert (change + outflow).abs().max() < 1e-10 * scale


@paths
def test_rollout_transports_a_mixture_exactly(path):
    """In one dimension a flow keeps quantiles: F_start(x(start)) = F_end(x(end))."""
    mixture = Mixture()
    start, end = 0.0, min(path.end, 0.999)
    x_start = torch.linspace(-2, 2, 33, dtype=torch.float64)[:, None]
    velocity = guided_velocity(mixture.model(path), path=path)
    span = torch.tensor([start, end], dtype=torch.float64)
    x_end, _ = solve(velocity, x_start, span, solver="dopri5", atol=1e-8, rtol=1e-8)
    before = mixture.cdf(x_start, torch.full_like(x_start, start), path)
    after = mixture.cdf(x_end, torch.full_like(x_end, end), path)
    assert torch.allclose(before, after, atol=2e-5)


@paths
def test_time_at_inverts_the_noise_level(path):
    level = torch.logspace(2, -3, 101, dtype=torch.float64)
    t = path.time_at(level)
    c = path(t)
    assert torch.allclose(c.sigma / c.alpha, level, rtol=1e-6)
    assert torch.allclose(path.time_at(level.float()).double(), t, atol=1e-6)
    assert path.time_at(1e4) >= 0
    assert path.time_at(0.0) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("variance_preserving", {"beta_max": 500.0}),
        ("variance_preserving", {"beta_max": math.inf}),
        ("variance_preserving", {"beta_min": math.nan}),
        ("variance_preserving", {"beta_max": 0.2}),
        ("cosine", {"offset": math.inf}),
        ("cosine", {"offset": 1e30}),
        ("cosine", {"offset": math.nan}),
        ("polynomial", {"power": math.nan}),
        ("polynomial", {"power": 40.0}),
        ("variance_preserving", {"beta_min": 0.0}),
        ("cosine", {"offset": 0.0}),
        ("polynomial", {"power": 0.5}),
    ],
)
def test_options_outside_their_range_are_refused_in_one_line(name, options):
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        PATHS[name](**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path",
    [
        VariancePreservingPath(1e-6, 339),
        VariancePreservingPath(170, 170),
        VariancePreservingPath(0.5, 0.5),
        CosinePath(1e-6),
        CosinePath(1.0),
        PolynomialPath(8),
    ],
)
def test_extreme_options_that_are_accepted_keep_float32_equal_to_float64(path):
    t = torch.linspace(1e-3, 1 - 1e-3, 33)
    for single, double in zip(path(t), path(t.double()), strict=True):
        assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-37)
    c = path(torch.tensor([0.0, 1.0]))
    assert all(value.isfinite().all() for value in c)
    assert c.sigma[0] > 0.6
    assert c.alpha[1] > 0.99


def test_a_path_without_coefficients_is_refused():
    with pytest.raises(TypeError, match="defines no coefficients"):
        Path()(torch.tensor(0.5))
