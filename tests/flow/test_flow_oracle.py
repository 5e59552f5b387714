"""The oracle against a float64 sum over the training set, and the errors measured with it."""

import pytest
import torch
from analytic import EXAMPLE_PATHS

from flowdopr.flow import (
    EmpiricalVelocity,
    FlowMatching,
    PolynomialPath,
    Sampling,
    convert,
    excess_error,
    generate,
    one_step_loss,
    rollout_excess,
    solve,
    time_grid,
)
from flowdopr.flow.oracle import SPACES

SHAPE = (1, 3, 3)
paths = pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)


def training_set(count=40, classes=4):
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, *SHAPE, generator=generator) * 2 - 1
    return images, torch.arange(count) % classes


def direct_velocity(images, x_t, t, path):
    """v* at one point in float64, directly by Bayes' rule on dx_t."""
    c = path(t.double())
    x, x_1 = x_t.double().flatten(), images.double().flatten(1)
    weights = (-(x - c.alpha * x_1).square().sum(1) / (2 * c.sigma**2)).softmax(0)
    x_0 = (x - c.alpha * x_1) / c.sigma
    return (weights @ (c.d_alpha * x_1 + c.d_sigma * x_0)).reshape(x_t.shape)


@paths
@pytest.mark.parametrize("chunk_size", [7, 4096])
def test_velocity_equals_bayes_rule_in_float64(path, chunk_size):
    images, _ = training_set()
    oracle = EmpiricalVelocity(images, path=path, chunk_size=chunk_size)
    t = torch.cat([torch.linspace(0, 0.95, 16), 1 - torch.logspace(-1.5, -4, 4)])
    x_t, _ = path.sample(torch.randn(20, *SHAPE), images[:20], t)
    expected = torch.stack(
        [direct_velocity(images, x, s, path) for x, s in zip(x_t, t, strict=True)]
    )
    assert torch.allclose(oracle(x_t, t).double(), expected, atol=2e-3)
    exact = EmpiricalVelocity(images.double(), path=path, chunk_size=chunk_size)
    assert torch.allclose(exact(x_t.double(), t.double()), expected, atol=1e-6)


@paths
def test_float32_is_stable_far_from_the_data_and_at_the_ends(path):
    images, _ = training_set()
    oracle = EmpiricalVelocity(images + 50, path=path, chunk_size=7)
    for t in (0.0, 1e-6, 0.5, 0.999, 1.0):
        assert oracle(torch.randn(5, *SHAPE) * 100, torch.tensor(t)).isfinite().all()


@paths
def test_posterior_mean_is_the_nearest_image_near_the_data_and_the_mean_at_the_noise(path):
    images, _ = training_set()
    oracle = EmpiricalVelocity(images, path=path)
    late = torch.tensor(0.999)
    x_t, _ = path.sample(torch.randn_like(images), images, late)
    assert torch.allclose(oracle.posterior_mean(x_t, late), images, atol=1e-4)
    early = oracle.posterior_mean(torch.zeros(3, *SHAPE), torch.tensor(0.0))
    assert torch.allclose(early, images.mean(0).expand(3, *SHAPE), atol=0.02)


def test_labels_select_their_images_and_the_null_label_all():
    images, labels = training_set()
    oracle = EmpiricalVelocity(images, labels, chunk_size=7)
    x_t, t = torch.randn(5, *SHAPE), torch.rand(5)
    y = torch.tensor([0, 1, 2, 3, 4])
    result = oracle(x_t, t, y)
    for i in range(4):
        own = EmpiricalVelocity(images[labels == i])
        assert torch.allclose(result[i], own(x_t[i : i + 1], t[i : i + 1])[0], atol=1e-4)
    everything = EmpiricalVelocity(images)
    assert torch.allclose(result[4], everything(x_t[4:], t[4:])[0], atol=1e-4)
    assert torch.allclose(oracle(x_t, t), everything(x_t, t), atol=1e-4)


def test_autocast_does_not_lower_its_precision():
    images, _ = training_set()
    oracle = EmpiricalVelocity(images)
    x_t, t = torch.randn(5, *SHAPE), torch.full((5,), 0.8)
    exact = oracle(x_t, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(oracle(x_t, t), exact)


def test_rollouts_end_on_training_images():
    images, labels = training_set()
    oracle = EmpiricalVelocity(images, labels)
    y = torch.arange(12) % 4
    samples = generate(oracle, y, seed=0, solver="midpoint", steps=100).images
    distances = torch.cdist(samples.flatten(1), images.flatten(1))
    assert distances.amin(1).max() < 0.02
    assert torch.equal(labels[distances.argmin(1)], y)


def test_the_oracle_moves_with_its_images_and_does_not_save_them():
    oracle = EmpiricalVelocity(*training_set()).to("meta")
    assert oracle.images.device.type == oracle.mean.device.type == "meta"
    assert oracle.state_dict() == {}


def batches_of(images, labels, repeats=400):
    return [(images, labels)] * repeats


@paths
def test_loss_is_excess_plus_irreducible_over_the_training_set(path):
    images, labels = training_set()
    oracle = EmpiricalVelocity(images, labels, path=path)

    class Model:
        num_classes, image_shape = 4, SHAPE

        def __call__(self, x, t, y):
            return torch.sin(2 * x) + 0.1 * y[:, None, None, None]

    objective = FlowMatching(path)
    batches = batches_of(images, labels)
    parts = excess_error(oracle, objective, Model(), batches, seed=2)
    assert parts.loss == one_step_loss(objective, Model(), batches, seed=2)
    assert parts.loss.mean == pytest.approx(parts.excess.mean + parts.irreducible.mean, rel=0.02)


def test_the_oracle_has_no_excess_and_the_least_loss():
    images, labels = training_set()
    oracle = EmpiricalVelocity(images, labels)
    parts = excess_error(oracle, FlowMatching(), oracle, batches_of(images, labels, 20))
    assert parts.excess.mean == 0
    assert parts.loss == parts.irreducible
    worse = excess_error(oracle, FlowMatching(), lambda x, t, y: -x, batches_of(images, labels, 20))
    assert worse.loss.mean > parts.loss.mean
    assert worse.irreducible == parts.irreducible


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise"])
def test_excess_error_converts_the_models_prediction(prediction):
    images, _ = training_set()
    oracle = EmpiricalVelocity(images)

    def perfect(x, t, y):
        return convert(oracle(x, t), x, t, oracle.path, "velocity", prediction)

    objective = FlowMatching(prediction=prediction)
    parts = excess_error(oracle, objective, perfect, [(images, None)] * 3)
    assert max(parts.excess.by_time[:-1]) < 1e-6
    assert parts.excess.mean < 2e-3  # `convert` limits times to SAFE_TIME, the oracle to LAST


@pytest.mark.parametrize("solver", ["euler", "heun2", "dopri5", "sde_heun"])
def test_excess_along_the_rollout_is_measured_where_the_solver_goes(solver):
    images, labels = training_set()
    oracle = EmpiricalVelocity(images, labels)

    class Shifted(torch.nn.Module):
        num_classes, image_shape = 4, SHAPE

        def forward(self, x, t, y):
            return oracle(x, t, y) + 0.2

    sampling = Sampling(solver=solver, steps=20)
    result = rollout_excess(oracle, Shifted(), torch.arange(8) % 4, seed=0, sampling=sampling)
    assert result.mean == pytest.approx(0.04, rel=1e-3)
    assert result.by_time == pytest.approx([0.04] * 10, rel=1e-3)
    nfe = generate(Shifted(), torch.arange(8) % 4, seed=0, sampling=sampling).nfe
    assert result.count == 8 * nfe


def test_the_irreducible_part_vanishes_at_the_data():
    images, _ = training_set()
    oracle = EmpiricalVelocity(images)
    parts = excess_error(oracle, FlowMatching(), oracle, [(images, None)] * 50)
    assert parts.irreducible.by_time[-1] < 1e-4
    assert parts.irreducible.by_time[0] > 0.2


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5", "sde_heun"])
@pytest.mark.parametrize(
    "path", [*EXAMPLE_PATHS.values(), PolynomialPath(8)], ids=[*EXAMPLE_PATHS, "polynomial_8"]
)
def test_the_oracle_has_no_excess_along_its_rollouts(path, solver, space):
    oracle = EmpiricalVelocity(training_set()[0], path=path)
    settings = Sampling(path, solver=solver, steps=12, atol=1e-4, rtol=1e-4)
    result = rollout_excess(oracle, oracle, num_images=3, seed=0, space=space, sampling=settings)
    assert result.mean < 1e-7
    assert result.count > 0


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 3, 3)])
def test_errors_of_points_of_any_shape(shape):
    """The model has an error of 0.1 everywhere."""
    points = torch.rand(20, *shape, generator=torch.Generator().manual_seed(1))
    oracle = EmpiricalVelocity(points)

    def model(x, t, y):
        return oracle(x, t, y) + 0.1

    parts = excess_error(oracle, FlowMatching(), model, [(points, None)] * 3)
    assert parts.excess.mean == pytest.approx(0.01, rel=1e-4)
    assert parts.loss == one_step_loss(FlowMatching(), model, [(points, None)] * 3)
    assert rollout_excess(oracle, model, num_images=3, seed=0).mean == pytest.approx(0.01, rel=1e-3)


def test_excess_in_the_space_of_data_stays_finite_at_the_end():
    """The model leads to the mean image; its error there is the distance to the training set."""
    images, _ = training_set()
    oracle, centre = EmpiricalVelocity(images), images.mean(0)

    def model(x, t, y):
        return (centre - x) / (1 - t.clamp(max=0.99))[:, None, None, None]

    sampling = Sampling(solver="euler", steps=200)
    result = rollout_excess(oracle, model, num_images=5, seed=0, space="data", sampling=sampling)
    nearest = (images - centre).square().flatten(1).mean(1).min().item()
    assert result.by_time[-1] == pytest.approx(nearest, rel=0.15)
    with pytest.raises(ValueError, match="choose one of"):
        rollout_excess(oracle, model, num_images=5, seed=0, space="noise")


def test_the_oracle_of_unlabelled_images_can_be_integrated_as_a_velocity():
    oracle = EmpiricalVelocity(training_set()[0])
    x, nfe = solve(oracle, torch.randn(2, *SHAPE), time_grid("uniform", 3), solver="euler")
    assert nfe == 3
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda i, y: EmpiricalVelocity(i[:0]), "need images"),
        (lambda i, y: EmpiricalVelocity(i, y[:3]), "a label for each"),
        (lambda i, y: EmpiricalVelocity(i, chunk_size=0), "chunks of 1"),
        (lambda i, y: EmpiricalVelocity(i)(i, torch.tensor(0.5), y), "without labels"),
        (
            lambda i, y: EmpiricalVelocity(i, torch.where(y == 1, 3, y))(i, torch.tensor(0.5), y),
            "no training images",
        ),
        (
            lambda i, y: rollout_excess(EmpiricalVelocity(i), lambda x, t, y: x, seed=0),
            "num_images",
        ),
    ],
)
def test_wrong_uses_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*training_set())
