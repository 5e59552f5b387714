"""Energy distances against loops and a closed form, and drift of rollouts whose error is known."""

import math

import numpy as np
import pytest
import torch
from analytic import EXAMPLE_PATHS, gaussian

from flowdopr.flow import FlowMatching, Sampling, energy_distance, rollout_drift


def samples(count, seed, shift=0.0, size=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) + shift


def test_energy_distance_is_its_definition_over_distinct_pairs():
    x, y = samples(7, 0, size=3), samples(5, 1, shift=0.5, size=3)
    between = np.mean([(a - b).norm() for a in x for b in y])
    own = [
        np.mean([(a - b).norm() for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in (x, y)
    ]
    expected = (2 * between - sum(own)) / (2 * between)
    assert energy_distance(x, y).item() == pytest.approx(float(expected), rel=1e-9)


def test_energy_distance_of_shifted_normals_is_the_closed_form():
    """X - Y ~ N(m, 2) is a folded normal: E|X - Y| = 2/sqrt(pi) exp(-m^2/4) + m erf(m/2)."""
    m = 1.5
    between = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = (between - 2 / math.sqrt(math.pi)) / between
    found = energy_distance(samples(4000, 0), samples(4000, 1, m)).item()
    assert found == pytest.approx(expected, abs=0.01)


def test_equal_distributions_are_at_no_distance_on_average():
    found = [energy_distance(samples(8, i), samples(8, 1000 + i)).item() for i in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
def test_rollouts_of_the_exact_velocity_stay_on_the_path(path):
    deviation = 0.5
    exact = gaussian(0.0, deviation).model(path)
    x_1 = deviation * torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    objective = FlowMatching(path)
    sampling = Sampling(path, solver="heun2", steps=20)
    drift = rollout_drift(objective, exact, x_1, seed=0, sampling=sampling)
    known = [value for value in drift.by_time if not math.isnan(value)]
    assert max(map(abs, known)) < 0.02

    def too_fast(x, t, y):
        return 1.6 * exact(x, t, y)

    wrong = rollout_drift(objective, too_fast, x_1, seed=0, sampling=sampling).by_time
    assert wrong[-1] > 0.02 > abs(wrong[0])


def test_fewer_than_two_images_are_refused():
    with pytest.raises(ValueError, match="two or more"):
        rollout_drift(FlowMatching(), lambda x, t, y: -x, torch.zeros(1, 3), seed=0)
