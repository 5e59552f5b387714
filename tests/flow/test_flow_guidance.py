"""Guidance: equation (7) for all predictions, the number of calls, wrong uses refused."""

from itertools import combinations

import pytest
import torch
from analytic import EXAMPLE_PATHS

from flowdopr.flow import PREDICTIONS, convert, guided_velocity, solve, time_grid


class Affine:
    """output = factor (x + y) on all channels; keeps the sizes of its batches."""

    num_classes = 2

    def __init__(self, factor=1.0):
        self.factor = factor
        self.batches = []

    def __call__(self, x, t, y):
        assert t.shape == (len(x),)
        self.batches.append(len(x))
        shift = torch.zeros(len(x)) if y is None else y.to(x)
        return self.factor * (x + shift[:, None, None, None])


X, Y, T = torch.randn(3, 4, 2, 2), torch.tensor([0, 1, 0]), torch.tensor(0.4)


def test_scale_one_calls_once_with_the_labels():
    model = Affine()
    velocity = guided_velocity(model, Y)
    assert torch.equal(velocity(X, T), model(X, T.expand(3), Y))
    assert velocity.calls == 1
    assert model.batches[0] == 3


def test_classifier_free_guidance_guides_every_channel_of_every_image():
    model = Affine()
    velocity = guided_velocity(model, Y, 3.0)
    null = model(X, T.expand(3), torch.full((3,), 2))
    own = model(X, T.expand(3), Y)
    assert torch.allclose(velocity(X, T), null + 3 * (own - null))
    assert velocity.calls == 2
    assert model.batches[-1] == 6


def test_scale_zero_is_the_unconditional_model():
    model = Affine()
    velocity = guided_velocity(model, Y, 0.0)
    assert torch.allclose(velocity(X, T), model(X, T.expand(3), torch.full((3,), 2)))


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_the_same_in_every_space(path, prediction):
    velocity_model = Affine()

    def translated(x, t, y):
        return convert(velocity_model(x, t, y), x, t, path, "velocity", prediction)

    translated.num_classes = 2
    expected = guided_velocity(velocity_model, Y, 2.5, path=path)(X.double(), T)
    guided = guided_velocity(translated, Y, 2.5, path=path, prediction=prediction)
    assert torch.allclose(guided(X.double(), T), expected, atol=1e-5)


def test_autoguidance_uses_the_second_model_with_the_same_labels():
    model, worse = Affine(), Affine(0.5)
    velocity = guided_velocity(model, Y, 2.0, guide_model=worse)
    own, other = model(X, T.expand(3), Y), worse(X, T.expand(3), Y)
    assert torch.allclose(velocity(X, T), other + 2 * (own - other))
    assert velocity.calls == 2


def test_autoguidance_works_without_labels():
    velocity = guided_velocity(lambda x, t, y: x, None, 2.0, guide_model=lambda x, t, y: -x)
    assert torch.allclose(velocity(X, T), 3 * X)


def test_outside_of_its_interval_guidance_is_off_and_free():
    model = Affine()
    velocity = guided_velocity(model, Y, 3.0, guidance_interval=(0.2, 0.7))
    plain, guided = guided_velocity(model, Y), guided_velocity(model, Y, 3.0)
    for t, expected, calls in (
        (0.1, plain, 1),
        (0.2, guided, 2),
        (0.5, guided, 2),
        (0.8, plain, 1),
    ):
        velocity.calls = 0
        assert torch.equal(velocity(X, torch.tensor(t)), expected(X, torch.tensor(t)))
        assert velocity.calls == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_interval_are_guided_on_every_grid_of_ten_steps(dtype):
    """Euler evaluates at 0, 0.1, ..., 0.9; guided calls count twice."""
    for low, high in combinations(range(11), 2):
        velocity = guided_velocity(Affine(), Y, 3.0, guidance_interval=(low / 10, high / 10))
        nfe = solve(velocity, X.to(dtype), time_grid("uniform", 10), solver="euler").nfe
        assert nfe == 10 + len(range(low, min(high, 9) + 1)), (low, high)


def test_half_precision_output_is_combined_in_float32():
    velocity = guided_velocity(lambda x, t, y: x.bfloat16())
    assert velocity(X, T).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_scale": 2.0}, "needs labels"),
        ({"y": Y, "guidance_scale": 2.0}, "num_classes"),
        ({"guide_model": Affine()}, "no effect"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (-0.1, 0.2)}, "guidance_interval"),
        ({"prediction": "score"}, "choose one of"),
    ],
)
def test_wrong_uses_are_refused_in_one_line(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        guided_velocity(lambda x, t, y: x, **arguments)
    assert "\n" not in str(error.value)


def test_an_unconditional_model_cannot_be_guided_even_with_labels():
    model = Affine()
    model.num_classes = 0
    with pytest.raises(ValueError, match="needs labels"):
        guided_velocity(model, Y, 2.0)
