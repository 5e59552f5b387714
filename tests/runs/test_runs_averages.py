"""The mathematics of weight averages: profiles, and other lengths made of stored averages."""

import doctest

import numpy as np
import pytest
import torch

from flowdopr.runs import averages
from flowdopr.runs.averages import Average, combine, gamma_of, posthoc_coefficients


def test_the_examples_run():
    found = doctest.testmod(averages)
    assert found.attempted
    assert not found.failed


def random_walk(steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, 7, generator=generator, dtype=torch.float64).cumsum(0)


def run_averages(path: torch.Tensor, averages, snapshots=()):
    """The averages after the last row of `path`, and what they were after the steps `snapshots`."""
    values, stored = {average.name: torch.zeros(7).double() for average in averages}, {}
    for step, row in enumerate(path, start=1):
        for average in averages:
            keep = average.keep(step)
            values[average.name] = keep * values[average.name] + (1 - keep) * row
        if step in snapshots:
            stored |= {(step, name): {"w": value} for name, value in values.items()}
    return values, stored


def test_exponential_average_forgets_the_start_quickly():
    average = Average(decay=0.9)
    assert [average.keep(step) for step in (1, 8, 1000)] == [2 / 11, 0.5, 0.9]


@pytest.mark.parametrize("length", [0.02, 0.1, 0.25])
def test_power_function_average_has_its_profile(length):
    gamma = gamma_of(length)
    sigma = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
    assert sigma == pytest.approx(length)
    steps = 200
    path = random_walk(steps)
    found, _ = run_averages(path, [Average(length=length)])
    tau = torch.arange(steps + 1, dtype=torch.float64)
    share = (tau / steps) ** (gamma + 1)  # cumulative weight of the steps up to tau, equation (2)
    expected = (share.diff()[:, None] * path).sum(0)
    torch.testing.assert_close(found[f"power-{length:g}"], expected)


def test_other_lengths_are_reconstructed():
    """As EDM2 finds: from two lengths and a few snapshots, other lengths come out to about 1 %."""
    steps, stored = 4000, (0.05, 0.10)
    path = random_walk(steps)
    stored_at = range(250, steps + 1, 250)
    wanted = [Average(length=length) for length in (0.06, 0.08, 0.13)]
    kept = [Average(length=length) for length in stored]
    truth, copies = run_averages(path, [*kept, *wanted], stored_at)
    keys = [(step, length) for step in stored_at for length in stored]
    for average, length in zip(wanted, (0.06, 0.08, 0.13), strict=True):
        coefficients = posthoc_coefficients(keys, steps, length)
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        snapshots = (copies[step, f"power-{sigma:g}"] for step, sigma in keys)
        made = combine(snapshots, coefficients.tolist())["w"]
        scale = (path[-1] - path.mean(0)).norm()
        assert (made - truth[average.name]).norm() < 0.02 * scale


def test_a_stored_length_is_its_own_reconstruction():
    keys = [(step, length) for step in (10, 20, 30) for length in (0.05, 0.1)]
    coefficients = posthoc_coefficients(keys, 30, 0.1)
    np.testing.assert_allclose(coefficients, [0, 0, 0, 0, 0, 1], atol=1e-6)


def test_few_averages_keep_the_weights_scale_or_are_refused():
    keys = [(200, 0.05), (200, 0.1)]
    for length in (0.06, 0.25):  # the free least squares give 0.25 coefficients with sum 0.5
        coefficients = posthoc_coefficients(keys, 200, length, max_error=np.inf)
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    posthoc_coefficients(keys, 200, 0.06)
    with pytest.raises(ValueError, match=r"2 stored .* error of 1, more than 0\.1: choose"):
        posthoc_coefficients(keys, 200, 0.25)
    with pytest.raises(ValueError, match=r"1 stored average up to step 200"):
        posthoc_coefficients(keys[:1], 200, 0.1)


def test_the_reported_error_is_the_profiles():
    step, length, keys = 400, 0.15, [(t, sigma) for t in (200, 400) for sigma in (0.05, 0.1)]
    coefficients = posthoc_coefficients(keys, step, length, max_error=np.inf)
    tau = (np.arange(40_000) + 0.5) * step / 40_000

    def profile(end, sigma):
        gamma = gamma_of(sigma)
        return np.where(tau < end, (gamma + 1) * (tau / end) ** gamma / end, 0.0)

    made = sum(c * profile(*key) for c, key in zip(coefficients, keys, strict=True))
    wanted = profile(step, length)
    error = float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))
    posthoc_coefficients(keys, step, length, max_error=error * 1.001)
    with pytest.raises(ValueError, match=f"error of {error:.2g}"):
        posthoc_coefficients(keys, step, length, max_error=error * 0.999)
