"""Likelihoods against Gaussians in closed form."""

import math

import pytest
import torch
from analytic import EXAMPLE_PATHS, Mixture, gaussian

from flowdopr.flow import (
    PREDICTIONS,
    LinearPath,
    Sampling,
    bits_per_dim,
    guided_velocity,
    log_likelihood,
    rollout_span,
    time_grid,
)
from flowdopr.flow.likelihood import exact_divergence, hutchinson_divergence

paths = pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)


def signs(shape, seed=0):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


@paths
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gaussian_likelihood_is_the_closed_form(path, trace):
    """The Jacobian of its velocity is a multiple of the identity, so one probe is exact as well."""
    x_1 = torch.randn(6, 5, dtype=torch.float64) * 0.4 + 0.3
    velocity = guided_velocity(gaussian(0.3, 0.4).model(path), path=path)
    result = log_likelihood(
        velocity,
        x_1,
        torch.tensor(rollout_span(path, "velocity")),
        probes=signs(x_1.shape) if trace == "hutchinson" else None,
        atol=1e-7,
        rtol=1e-7,
        path=path,
    )
    expected = torch.distributions.Normal(0.3, 0.4).log_prob(x_1).sum(1)
    # Paths that end before 1 leave out noise of level 0.01, VP starts with a little data.
    assert torch.allclose(result.log_prob, expected, atol=1e-4 if path.end == 1 else 0.02)
    assert result.nfe == velocity.calls


@paths
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("deviation", "tolerance"), [(0.02, 3e-4), (0.005, 8e-4)])
def test_bits_of_narrow_gaussians_on_every_path(path, prediction, deviation, tolerance):
    """Expected error, in bits a number: (0.001 / deviation)^4 / 4 / log 2 = 2e-6 and 6e-4."""
    z = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    x_1 = 0.3 + deviation * (z - z.mean()) / z.std(correction=0)  # so that means are expectations
    sampling = Sampling(path, prediction, solver="dopri5")
    velocity = sampling.velocity(gaussian(0.3, deviation).model(path, prediction), None)
    result = log_likelihood(
        velocity, x_1, probes=signs(x_1.shape), **sampling.likelihood_arguments()
    )
    expected = torch.distributions.Normal(0.3, deviation).log_prob(x_1).sum(1)
    bits = (expected - result.log_prob).mean().item() / 16 / math.log(2)
    assert abs(bits) < tolerance


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_a_narrow_span_gives_the_density_that_the_module_docstring_states(prediction):
    """In float64, with a span that ends far before 1 or starts far after 0."""
    deviation, level, path = 0.02, 0.05, LinearPath()
    span = torch.tensor(rollout_span(path, prediction, level), dtype=torch.float64)
    x_1 = deviation * torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    velocity = guided_velocity(
        gaussian(0, deviation).model(path, prediction), prediction=prediction
    )
    log_prob = log_likelihood(velocity, x_1, span, path=path, atol=1e-9, rtol=1e-9).log_prob
    blur = level if prediction == "data" else 0.0
    exact = torch.distributions.Normal(0, math.hypot(deviation, blur)).log_prob(x_1)[:, 0]
    assert torch.allclose(log_prob, exact, atol=1e-5)


def test_correlated_gaussian_with_the_exact_trace_and_many_probes():
    """x_1 ~ N(0, S): v = (t S - (1 - t) I) (t^2 S + (1 - t)^2 I)^-1 x on the linear path."""
    factor = torch.randn(4, 4, dtype=torch.float64)
    covariance = factor @ factor.T / 4 + 0.1 * torch.eye(4)
    eye = torch.eye(4, dtype=torch.float64)

    def velocity(x, t):
        mix = t**2 * covariance + (1 - t) ** 2 * eye
        return torch.linalg.solve(mix, (x @ (t * covariance - (1 - t) * eye)).T).T

    normal = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    x_1 = normal.sample((3,))
    exact = log_likelihood(velocity, x_1, time_grid("uniform", 60), solver="rk4")
    assert torch.allclose(exact.log_prob, normal.log_prob(x_1), atol=1e-4)
    many = x_1.repeat_interleave(4000, 0)
    few = time_grid("uniform", 10)
    estimate = log_likelihood(velocity, many, few, probes=signs(many.shape), solver="rk4")
    few_steps = log_likelihood(velocity, x_1, few.flip(0), solver="rk4").log_prob
    assert torch.allclose(estimate.log_prob.reshape(3, -1).mean(1), few_steps, atol=0.15)


def test_a_mixture_with_the_exact_trace():
    mixture, path = Mixture(), LinearPath()
    x_1 = torch.linspace(-1, 1, 21, dtype=torch.float64)[:, None]
    velocity = guided_velocity(mixture.model(path), path=path)
    result = log_likelihood(velocity, x_1, torch.tensor([0.0, 1.0]), atol=1e-7, rtol=1e-7)
    expected = mixture.log_density(x_1, torch.ones(()).double(), path)[:, 0]
    assert torch.allclose(result.log_prob, expected, atol=1e-3)


def test_divergences_of_a_known_jacobian():
    matrix = torch.randn(6, 6)
    x = torch.randn(5, 1, 2, 3, requires_grad=True)
    v = (x.flatten(1) @ matrix.T).sin().reshape(x.shape)
    slope = (x.flatten(1) @ matrix.T).cos()
    assert torch.allclose(exact_divergence(v, x), slope @ matrix.diagonal(), atol=1e-5)
    probes = signs(x.shape)
    expected = torch.einsum("bi,bi,ij,bj->b", probes.flatten(1), slope, matrix, probes.flatten(1))
    assert torch.allclose(hutchinson_divergence(probes)(v, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "prediction"),
    [(path, "velocity") for path in EXAMPLE_PATHS.values()]
    + [(LinearPath(), "data"), (LinearPath(), "noise")],
)
def test_probabilities_of_all_levels_of_a_pixel_sum_to_one(path, prediction):
    levels = torch.arange(256, dtype=torch.uint8).repeat(8).reshape(-1, 1, 1, 1)
    result = bits_per_dim(
        gaussian(0.0, 0.2).model(path, prediction),
        levels,
        seed=0,
        batch_size=2048,
        sampling=Sampling(path=path, prediction=prediction, solver="rk4", steps=150),
    )
    assert torch.exp2(-result.bits).sum().item() / 8 == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_bits_do_not_depend_on_the_batch(trace):
    images = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    sampling = Sampling(solver="rk4", steps=20)
    model = gaussian(0.0, 0.5).model(LinearPath())
    whole = bits_per_dim(model, images, seed=1, trace=trace, sampling=sampling)
    parts = bits_per_dim(model, images, seed=1, trace=trace, sampling=sampling, batch_size=2)
    last = bits_per_dim(model, images[3:], seed=1, first_index=3, trace=trace, sampling=sampling)
    assert torch.allclose(whole.bits, parts.bits, atol=1e-5)
    assert torch.allclose(whole.bits[3:], last.bits, atol=1e-5)
    assert whole.nfe == parts.nfe == 80


def test_bits_of_uniform_noise_under_a_wide_gaussian():
    """-log2 N(x; 0, 1) + log2(127.5), averaged over x uniform in [-1, 1]."""
    images = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    model = gaussian(0.0, 1.0).model(LinearPath())
    bits = bits_per_dim(model, images, seed=0, sampling=Sampling(solver="rk4", steps=20)).bits
    expected = (1 / 3 + math.log(2 * math.pi)) / 2 / math.log(2) + math.log2(127.5)
    assert bits.mean().item() == pytest.approx(expected, abs=0.02)


def test_a_network_and_labels_pass_through():
    class Tiny(torch.nn.Module):
        num_classes = 2

        def __init__(self):
            super().__init__()
            self.embed, self.mix = torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4)

        def forward(self, x, t, y):
            return torch.tanh(self.mix(x.flatten(1)) + self.embed(y)).reshape(x.shape)

    images = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    result = bits_per_dim(Tiny(), images, torch.tensor([0, 1, 1]), seed=0)
    assert result.bits.isfinite().all()
    assert result.nfe > 0


@pytest.mark.parametrize(
    ("images", "settings", "words"),
    [
        (torch.zeros(1, 1, 2, 2), {}, "uint8"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), {}, "need \\(N, C, H, W\\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), {"trace": "skilling"}, "choose one of"),
        (
            torch.zeros(1, 1, 2, 2, dtype=torch.uint8),
            {"sampling": Sampling(solver="euler_maruyama")},
            "stochastic",
        ),
    ],
)
def test_wrong_uses_are_refused(images, settings, words):
    with pytest.raises(ValueError, match=words):
        bits_per_dim(lambda x, t, y: x, images, seed=0, **settings)


def test_dequantised_levels_fill_the_interval_that_rounds_to_them():
    """The dequantised value is computed back from the bits, whose density is N(0, 0.3^2)."""
    levels = torch.arange(140, 250, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    model, sampling = gaussian(0.0, 0.3).model(LinearPath()), Sampling(solver="rk4", steps=100)
    bits = bits_per_dim(model, levels, seed=0, sampling=sampling).bits
    log_density = (math.log2(127.5) - bits) * math.log(2)
    peak = -math.log(0.3 * math.sqrt(2 * math.pi))
    x = 0.3 * (2 * (peak - log_density)).sqrt()
    offset = (x + 1) * 127.5 - levels.flatten()
    assert offset.abs().max() < 0.51
    assert offset.max() > 0.4
    assert offset.min() < -0.4
