"""Conversions between predictions are exact inverses; weightings equal their published forms."""

import pytest
import torch
from analytic import EXAMPLE_PATHS

from flowdopr.flow import (
    PREDICTIONS,
    WEIGHTINGS,
    FlowMatching,
    LinearPath,
    PolynomialPath,
    convert,
    loss_weight,
)
from flowdopr.flow.path import SAFE_LEVEL
from flowdopr.flow.prediction import SAFE_TIME

paths = pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
sources = pytest.mark.parametrize("source", PREDICTIONS)
targets = pytest.mark.parametrize("target", PREDICTIONS)


def points(path, times):
    x_0, x_1 = torch.randn(len(times), 6).double(), torch.randn(len(times), 6).double()
    x_t, dx_t = path.sample(x_0, x_1, times)
    return x_t, {"velocity": dx_t, "data": x_1, "noise": x_0}


@paths
@sources
@targets
def test_conversion_gives_the_other_target_exactly(path, source, target):
    t = torch.linspace(SAFE_TIME, path.time_at(SAFE_LEVEL) - 1e-9, 101, dtype=torch.float64)
    x_t, truth = points(path, t)
    assert torch.allclose(convert(truth[source], x_t, t, path, source, target), truth[target])


@paths
@targets
def test_velocity_converts_exactly_up_to_the_ends(path, target):
    start = SAFE_TIME if path.still_at_start else 0.0
    t = torch.tensor([start, 1.0], dtype=torch.float64)
    x_t, truth = points(path, t)
    result = convert(truth["velocity"], x_t, t, path, "velocity", target)
    assert torch.allclose(result, truth[target], atol=1e-9)


@paths
@sources
@targets
def test_conversion_is_finite_for_any_output_at_any_time(path, source, target):
    t = torch.cat([torch.linspace(0, 1, 11), torch.tensor([1e-7, 1 - 1e-7])])
    x_t, output = torch.randn(len(t), 6), torch.randn(len(t), 6)
    assert convert(output, x_t, t, path, source, target).isfinite().all()
    half = convert(output.half(), x_t.half(), t.half(), path, source, target)
    assert half.isfinite().all()


@paths
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_weighting_is_the_velocity_error(path, prediction):
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    x_t, truth = points(path, t)
    output = truth[prediction] + 0.1 * torch.randn_like(x_t)
    error = (output - truth[prediction]).square().mean(1)
    velocity = convert(output, x_t, t, path, prediction, "velocity")
    expected = (velocity - truth["velocity"]).square().mean(1)
    assert torch.allclose(loss_weight("velocity", t, path, prediction) * error, expected)


@paths
@pytest.mark.parametrize("weighting", ["velocity", "likelihood", "edm"])
def test_weightings_mean_the_same_error_in_every_space(path, weighting):
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    x_t, truth = points(path, t)
    velocity = truth["velocity"] + 0.1 * torch.randn_like(x_t)
    losses = []
    for prediction in PREDICTIONS:
        output = convert(velocity, x_t, t, path, "velocity", prediction)
        error = (output - truth[prediction]).square().mean(1)
        losses.append(loss_weight(weighting, t, path, prediction) * error)
    assert torch.allclose(losses[0], losses[1])
    assert torch.allclose(losses[0], losses[2])


@paths
def test_published_forms(path):
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    c = path(t)
    level, sigma_data = c.sigma / c.alpha, 0.5
    edm = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
    assert torch.allclose(loss_weight("edm", t, path, "data", sigma_data), edm)
    drift = c.sigma * (c.d_alpha / c.alpha * c.sigma - c.d_sigma)  # SiT's compute_drift
    assert torch.allclose(loss_weight("velocity", t, path, "noise"), (drift / c.sigma) ** 2)
    assert torch.allclose(loss_weight("likelihood", t, path, "noise"), drift / c.sigma**2)


@paths
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_and_not_negative_at_any_time(path, weighting, prediction):
    weight = loss_weight(weighting, torch.linspace(0, 1, 101), path, prediction)
    assert weight.isfinite().all()
    assert (weight >= 0).all()


@pytest.mark.parametrize("weighting", ["velocity", "likelihood", "edm"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_in_float32_are_those_of_float64_or_are_refused(weighting, prediction):
    """alpha_t of this path is 1e-24 at SAFE_TIME: its square is not in float32, ratios are."""
    path, t = PolynomialPath(8), torch.linspace(0, 1, 21, dtype=torch.float64)
    exact = loss_weight(weighting, t, path, prediction)
    assert exact.isfinite().all()
    if exact.max() < torch.finfo(torch.float32).max:
        weight = loss_weight(weighting, t.float(), path, prediction)
        assert torch.allclose(weight.double(), exact, rtol=1e-3)
        FlowMatching(path, prediction=prediction, weighting=weighting)
        return
    with pytest.raises(ValueError, match="leaves float32 on this path") as error:
        FlowMatching(path, prediction=prediction, weighting=weighting)
    assert "\n" not in str(error.value)


def test_the_edm_weight_of_data_tends_to_one_over_the_variance_at_the_noise():
    weight = loss_weight("edm", torch.zeros(1), PolynomialPath(8), "data", 0.5)
    assert weight.item() == pytest.approx(4.0)


def test_unknown_names_are_refused_in_one_line():
    t, path = torch.rand(2), LinearPath()
    for call in (
        lambda: convert(t, t, t, path, "score", "data"),
        lambda: convert(t, t, t, path, "data", "score"),
        lambda: loss_weight("snr", t, path),
        lambda: loss_weight("edm", t, path, "score"),
    ):
        with pytest.raises(ValueError, match="choose one of") as error:
            call()
        assert "\n" not in str(error.value)
