"""Training times follow their distribution and are stratified; grids have the published times."""

import pytest
import torch
from analytic import EXAMPLE_PATHS
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdopr.flow import Sampling, TimeSampler, VariancePreservingPath, shift_time, time_grid
from flowdopr.flow.time import TIME_DISTRIBUTIONS, TIME_GRIDS

SAMPLERS = {
    "uniform": TimeSampler(),
    "logit_normal": TimeSampler("logit_normal", mean=0.4, std=0.8),
    "edm": TimeSampler("edm"),
    "shifted": TimeSampler(shift=3.0),
    "edm_shifted": TimeSampler("edm", shift=0.5),
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@samplers
def test_one_time_in_each_equally_likely_bin(sampler):
    t = sampler(64, seeded()).sort().values
    edges = sampler.quantile(torch.arange(65) / 64)
    assert (t >= edges[:-1] - 1e-6).all()
    assert (t <= edges[1:] + 1e-6).all()


@samplers
@pytest.mark.parametrize("stratified", [True, False])
def test_times_follow_the_quantile_function(sampler, stratified):
    drawn = TimeSampler(sampler.distribution, sampler.mean, sampler.std, sampler.shift, stratified)
    t = drawn(20_000, seeded()).sort().values
    expected = sampler.quantile((torch.arange(20_000) + 0.5) / 20_000)
    tolerance = 1e-3 if stratified else 0.02
    assert (t - expected).abs().mean() < tolerance


def test_logit_normal_has_its_mean_and_deviation():
    logit = TimeSampler("logit_normal", mean=0.4, std=0.8)(20_000, seeded()).logit()
    assert logit.mean().item() == pytest.approx(0.4, abs=1e-3)
    assert logit.std().item() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
def test_edm_noise_levels_are_log_normal_on_every_path(path):
    c = path(TimeSampler("edm")(20_000, seeded(), path).double())
    log_level = (c.sigma / c.alpha).log()
    assert log_level.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert log_level.std().item() == pytest.approx(1.2, abs=2e-3)


def test_every_slice_of_a_batch_spans_all_times():
    t = TimeSampler()(256, seeded())
    for part in t.split(64):
        assert part.min() < 0.1
        assert part.max() > 0.9


def test_shift_is_esser_et_al_in_our_time():
    t = torch.linspace(0, 1, 11)
    level = 1 - t  # their time, noise at 1
    assert torch.allclose(1 - shift_time(t, 3.0), 3 * level / (1 + 2 * level))
    assert torch.allclose(shift_time(shift_time(t, 3.0), 1 / 3.0), t, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    distribution=st.sampled_from(TIME_DISTRIBUTIONS),
    shift=st.floats(0.1, 10),
    mean=st.floats(-3, 3),
    std=st.floats(0.1, 3),
    batch_size=st.integers(1, 65),
    stratified=st.booleans(),
)
def test_times_are_always_within_zero_and_one(
    distribution, shift, mean, std, batch_size, stratified
):
    sampler = TimeSampler(distribution, mean, std, shift, stratified)
    t = sampler(batch_size, seeded())
    assert t.shape == (batch_size,)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert torch.equal(t, sampler(batch_size, seeded()))


@pytest.mark.parametrize("kind", TIME_GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("span", [(0.0, 1.0), (0.01, 0.99)])
def test_grids_increase_from_start_to_end(kind, steps, span):
    start, end = span
    grid = time_grid(kind, steps, start=start, end=end)
    assert len(grid) == steps + 1
    assert grid[0].item() == pytest.approx(start)
    assert grid[-1].item() == pytest.approx(end)
    assert (grid.diff() > 0).all()


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
def test_edm_grid_has_the_published_noise_levels_on_every_path(path, prediction):
    """Equation 5 of Karras et al. with 18 levels; a span that ends early ends at the lowest."""
    ends_early = prediction == "data" or path.end < 1
    steps = 17 if ends_early else 18
    sampling = Sampling(path, prediction, solver="heun2", steps=steps, time_grid="edm")
    t = sampling.grid().double()
    c = path(t[1 : None if ends_early else -1])
    i = torch.arange(1, 18).double()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert torch.allclose(c.sigma / c.alpha, (high + i / 17 * (low - high)) ** 7, rtol=2e-3)


def test_an_edm_grid_starts_at_the_noise_of_a_path_that_has_less():
    path = VariancePreservingPath(beta_min=0.1, beta_max=0.9)  # noise level 1.3 at t = 0
    grid = time_grid("edm", 8, path=path)
    assert grid[0] == 0
    assert (grid.diff() > 0).all()


def test_a_list_of_times_is_the_grid():
    assert time_grid([0, 0.25, 1]).tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("grid", [[0.5], [0, 0.5, 0.5, 1], [0.9, 0.1], [-0.1, 1], [0, 1.1], []])
def test_wrong_lists_are_refused(grid):
    with pytest.raises(ValueError, match="increasing times"):
        time_grid(grid)


def test_wrong_settings_are_refused():
    for call, words in (
        (lambda: TimeSampler("cosine"), "choose one of"),
        (lambda: TimeSampler(std=0), "positive"),
        (lambda: TimeSampler(shift=-1), "positive"),
        (lambda: time_grid("quadratic"), "choose one of"),
        (lambda: time_grid("uniform", 0), "at least 1"),
        (lambda: time_grid("uniform", 4, start=0.5, end=0.5), "start < end"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_extreme_quantiles_are_within_zero_and_one():
    for sampler in SAMPLERS.values():
        t = sampler.quantile(torch.tensor([0.0, 1.0]))
        assert ((t >= 0) & (t <= 1)).all()
