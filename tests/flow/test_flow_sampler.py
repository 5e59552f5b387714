"""Sampling: images independent of the batch, exact maps of a Gaussian, wrong settings refused."""

from itertools import pairwise

import pytest
import torch
from analytic import EXAMPLE_PATHS, gaussian

from flowdopr.flow import (
    BATCH_DEPENDENT_SOLVERS,
    PREDICTIONS,
    SOLVERS,
    LinearPath,
    Sampling,
    generate,
    guided_velocity,
    image_generator,
    rollout_span,
)
from flowdopr.flow.sampler import finish

SHAPE = (1, 2, 3)
REPEATABLE = [solver for solver in SOLVERS if solver not in BATCH_DEPENDENT_SOLVERS]


class Labelled(torch.nn.Module):
    image_shape = SHAPE
    num_classes = 3

    def forward(self, x, t, y):
        shift = 0 if y is None else y[:, None, None, None]
        return torch.sin(3 * x + t[:, None, None, None]) + shift


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize("solver", REPEATABLE)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_image_i_is_the_same_in_any_batch_and_process(solver, guidance_scale):
    settings = {"seed": 3, "solver": solver, "steps": 6, "guidance_scale": guidance_scale}
    whole = generate(Labelled(), LABELS, batch_size=7, **settings)
    batches = generate(Labelled(), LABELS, batch_size=2, **settings)
    some = generate(Labelled(), LABELS[[6, 3]], indices=[6, 3], batch_size=7, **settings)
    assert torch.allclose(whole.images, batches.images, atol=1e-5)
    assert torch.allclose(whole.images[[6, 3]], some.images, atol=1e-5)
    assert whole.nfe == batches.nfe == some.nfe
    assert not torch.allclose(whole.images[0], whole.images[3])


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "scipy_solver"])
def test_adaptive_solvers_agree_within_their_tolerance_and_report_mean_calls(solver):
    settings = {"seed": 0, "solver": solver, "atol": 1e-5, "rtol": 1e-5}
    whole = generate(Labelled(), LABELS, batch_size=7, **settings)
    batches = generate(Labelled(), LABELS, batch_size=3, **settings)
    assert torch.allclose(whole.images, batches.images, atol=1e-3)
    assert isinstance(whole.nfe, int)
    assert batches.nfe > 10


def test_noise_of_an_image_is_that_of_its_generator():
    samples = generate(lambda x, t, y: 0 * x, None, num_images=3, image_shape=SHAPE, seed=5)
    for i in range(3):
        expected = torch.randn(SHAPE, generator=image_generator(5, i))
        assert torch.allclose(samples.images[i], expected)


def test_noise_is_normal_and_differs_between_seeds_and_images():
    rows = [torch.randn(20, generator=image_generator(s, i)) for s in range(30) for i in range(30)]
    noise = torch.stack(rows)
    assert noise.unique(dim=0).shape[0] == 900
    assert noise.mean().abs() < 0.03
    assert (noise.std() - 1).abs() < 0.03
    assert (noise.T @ noise / 900 - torch.eye(20)).abs().max() < 0.2


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2", "rk4", "dopri5"])
def test_a_perfect_model_maps_noise_to_the_gaussian_of_the_data(path, prediction, solver):
    """The flow of a Gaussian is affine: x_1 = m + s (x_0 - alpha_0 m) / sd(x_0)."""
    mean, deviation = 0.3, 0.4
    model = gaussian(mean, deviation).model(path, prediction)
    samples = generate(
        model,
        None,
        num_images=20,
        image_shape=SHAPE,
        seed=0,
        solver=solver,
        steps=200,
        path=path,
        prediction=prediction,
    )
    x_0 = torch.stack([torch.randn(SHAPE, generator=image_generator(0, i)) for i in range(20)])
    start = path(torch.tensor(0.0))
    spread = ((start.alpha * deviation) ** 2 + start.sigma**2).sqrt()
    expected = mean + deviation * (x_0 - start.alpha * mean) / spread
    assert (samples.images - expected).abs().max() < 0.04


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("deviation", "tolerance"), [(0.02, 0.02), (0.005, 0.12)])
def test_small_variations_keep_their_size_on_every_path(path, prediction, deviation, tolerance):
    """Rollouts end at the same noise level on all paths, and the step to t = 1 does not shrink."""
    model = gaussian(0.3, deviation).model(path, prediction)
    settings = {"path": path, "prediction": prediction, "solver": "dopri5", "atol": 1e-6}
    images = generate(model, None, num_images=20, image_shape=SHAPE, seed=0, **settings).images
    x_0 = torch.stack([torch.randn(SHAPE, generator=image_generator(0, i)) for i in range(20)])
    assert ((images - 0.3) / deviation - x_0).std().item() < tolerance


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
def test_the_finishing_step_is_of_second_order_in_the_noise_level(path):
    """The exact flow scales the deviations of a Gaussian by d / sd(x_t)."""
    deviation, errors = 0.3, []
    velocity = guided_velocity(gaussian(0.0, deviation).model(path), path=path)
    for level in (0.08, 0.04, 0.02):
        t = path.time_at(level)
        c = path(t)
        spread = ((c.alpha * deviation) ** 2 + c.sigma**2).sqrt()
        x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
        errors.append((finish(velocity, x, t, path) - x * deviation / spread).abs().max().item())
    assert all(fine < coarse / 5 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rollouts_stay_within_their_span(path, prediction):
    start, end = rollout_span(path, prediction)
    levels = [path(torch.tensor(t, dtype=torch.float64)) for t in (start, end)]
    if start > 0:
        assert (levels[0].alpha / levels[0].sigma).item() == pytest.approx(0.01)
    if end < 1:
        assert (levels[1].sigma / levels[1].alpha).item() == pytest.approx(0.01)
    assert (start > 0) == (prediction == "noise")
    assert (end < 1) == (prediction == "data" or path.end < 1)
    grid = Sampling(path, prediction, solver="euler", time_grid=[0, 0.1, 0.6, 1]).grid()
    assert grid.tolist() == pytest.approx([start, *(t for t in (0.1, 0.6) if t > start), end])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", ["euler", "heun2", "rk4"])
def test_a_models_small_errors_stay_small(prediction, solver):
    """The conversion divides by the distance to its singular end, where rollouts do not go."""
    exact = gaussian().model(LinearPath(), prediction)

    def model(x, t, y):
        return exact(x, t, y) + 0.01 * torch.sin(100 * x + 50 * t[:, None, None, None])

    settings = {"num_images": 20, "image_shape": SHAPE, "seed": 0, "steps": 50, "solver": solver}
    perfect = generate(exact, None, prediction=prediction, **settings)
    perturbed = generate(model, None, prediction=prediction, **settings)
    assert (perfect.images - perturbed.images).abs().max() < 0.06


def test_calls_of_the_finishing_step_are_counted():
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return x

    samples = generate(
        model, None, num_images=2, image_shape=SHAPE, seed=0, prediction="data", steps=5
    )
    assert samples.nfe == len(calls) == 12


def test_the_shape_is_the_models():
    samples = generate(Labelled(), LABELS, seed=0, steps=1, batch_size=3, device="cpu")
    assert samples.images.shape == (7, *SHAPE)
    assert samples.images.dtype == torch.float32


def test_settings_by_name_take_precedence_over_sampling():
    sampling = Sampling(solver="euler", steps=4)
    assert generate(Labelled(), LABELS, seed=0, sampling=sampling).nfe == 4
    assert generate(Labelled(), LABELS, seed=0, sampling=sampling, steps=6).nfe == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "ddim"}, "choose one of"),
        ({"solver": "dopri5", "time_grid": "edm"}, "chooses its own times"),
        ({"solver": "euler_maruyama", "coupling": "exact"}, "needs a score"),
        ({"solver": "sde_heun", "noise_scale": -1.0}, "negative"),
        ({"steps": 0}, "at least 1"),
        ({"solver": "sde_heun", "last_step_size": 1.0}, "between 0 and 1"),
        ({"solver": "sde_heun", "last_step_size": 0.1, "steps": 1}, "2 steps or more"),
        (
            {"solver": "sde_heun", "last_step_size": 0.1, "time_grid": [0, 0.5, 1]},
            "leave it out",
        ),
        ({"prediction": "score"}, "choose one of"),
        ({"time_grid": [0.5, 0.2]}, "increasing"),
        ({"time_grid": [0.5, 0.6]}, r"times \[0.5, 0.6\].* must be 0"),
        ({"guidance_scale": 2.0}, "needs labels"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"num_images": None}, "nothing to sample"),
        ({"num_images": 0}, "nothing to sample"),
        ({"batch_size": 0}, "nothing to sample"),
        ({"labels": LABELS}, "leave num_images out"),
        ({"indices": [5]}, "1 indices for 2 images: give one for each"),
        ({"image_shape": None}, "image_shape"),
        ({"seed": -1}, "negative"),
    ],
)
def test_wrong_settings_are_refused_in_one_line_before_anything_runs(arguments, words):
    def untouched(x, t, y):
        raise AssertionError("the model was called")

    defaults = {"labels": None, "num_images": 2, "image_shape": SHAPE, "seed": 0}
    with pytest.raises(ValueError, match=words) as error:
        generate(untouched, **(defaults | arguments))
    assert "\n" not in str(error.value)
