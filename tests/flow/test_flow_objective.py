"""The objective: slices of a draw, label dropout by image, exact losses, no synchronisation."""

import pytest
import torch
from analytic import EXAMPLE_PATHS, gaussian
from torch.utils._python_dispatch import TorchDispatchMode

from flowdopr.flow import (
    PREDICTIONS,
    FlowMatching,
    LinearPath,
    TimeSampler,
    make_coupling,
    one_step_loss,
    rollout_span,
)

SHAPE = (1, 4, 4)


class Conditional(torch.nn.Module):
    """A tiny model that keeps the labels of its last call in `seen`."""

    image_shape = SHAPE

    def __init__(self, num_classes=3):
        super().__init__()
        self.num_classes = num_classes
        self.embed = torch.nn.Embedding(num_classes + 1, 16)
        self.linear = torch.nn.Linear(17, 16)
        self.seen = None

    def forward(self, x, t, y):
        self.seen = y
        flat = torch.cat([x.flatten(1), t[:, None].to(x)], 1)
        shift = 0 if y is None else self.embed(y)
        return (self.linear(flat) + shift).reshape(x.shape)


def draw_of(objective, count=8, seed=0):
    return objective.draw(count, SHAPE, generator=torch.Generator().manual_seed(seed))


def test_a_draw_slices_all_its_parts():
    draw = draw_of(FlowMatching(class_dropout_prob=0.5), 12)
    parts = [draw[i : i + 4] for i in range(0, 12, 4)]
    for name in ("x_0", "t", "keep", "u"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(draw, name))
    assert len(draw) == 12
    assert len(parts[0]) == 4


def test_loss_of_slices_is_the_loss_of_the_batch():
    objective, model = FlowMatching(class_dropout_prob=0.5), Conditional()
    draw, x_1, y = draw_of(objective), torch.randn(8, *SHAPE), torch.arange(8) % 3
    whole = objective(model, x_1, y, draw)
    halves = [objective(model, x_1[i : i + 4], y[i : i + 4], draw[i : i + 4]) for i in (0, 4)]
    assert torch.allclose(whole, torch.cat(halves), atol=1e-6)


@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_zero_exactly_when_the_model_knows_the_target(path, prediction):
    objective = FlowMatching(path, prediction=prediction)
    draw, x_1 = draw_of(objective), torch.randn(8, *SHAPE)
    x_t, dx_t = path.sample(draw.x_0, x_1, draw.t)
    target = {"velocity": dx_t, "data": x_1, "noise": draw.x_0}[prediction]

    def model(x, t, y):
        assert torch.equal(x, x_t)
        return target

    assert torch.equal(objective(model, x_1, None, draw), torch.zeros(8))
    assert torch.allclose(
        objective(lambda x, t, y: target + 2, x_1, None, draw), torch.full((8,), 4.0)
    )


def test_labels_are_dropped_independently_for_each_image():
    objective, model = FlowMatching(class_dropout_prob=0.3), Conditional()
    draw, y = draw_of(objective, 2000), torch.arange(2000) % 3
    objective(model, torch.zeros(2000, *SHAPE), y, draw)
    assert torch.equal(model.seen[draw.keep], y[draw.keep])
    assert (model.seen[~draw.keep] == 3).all()
    assert (~draw.keep).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_class_dropout_finds_the_null_label_of_a_wrapped_or_compiled_model():
    model = Conditional()
    wrapper = torch.nn.DataParallel(model)  # holds the model as .module, as DDP does
    objective = FlowMatching(class_dropout_prob=1.0)
    for outer in (wrapper, torch.compile(model, backend="eager")):
        objective(
            outer, torch.zeros(4, *SHAPE), torch.zeros(4, dtype=torch.long), draw_of(objective, 4)
        )
        assert (model.seen == 3).all()


def test_an_unconditional_model_gets_no_labels():
    model = Conditional(num_classes=0)
    objective = FlowMatching(class_dropout_prob=0.1)
    objective(model, torch.zeros(8, *SHAPE), torch.zeros(8, dtype=torch.long), draw_of(objective))
    assert model.seen is None


def test_dropout_without_a_null_label_is_refused():
    objective = FlowMatching(class_dropout_prob=0.1)
    y = torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match="num_classes"):
        objective(lambda x, t, y: x, torch.zeros(8, *SHAPE), y, draw_of(objective))


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's value is read on the CPU, which would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("coupling", ["independent", "entropic"])
def test_the_objective_never_waits_for_the_device(prediction, coupling):
    objective = FlowMatching(
        prediction=prediction,
        weighting="edm",
        time_sampler=TimeSampler("logit_normal"),
        coupling=make_coupling(coupling),
        class_dropout_prob=0.1,
    )
    model, x_1, y = Conditional(), torch.randn(8, *SHAPE), torch.arange(8) % 3
    generator = torch.Generator().manual_seed(0)
    with NoWaiting():
        draw = objective.draw(8, SHAPE, generator=generator, device="cpu")
        objective(model, x_1, y, draw).mean().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype):
    objective, model = FlowMatching(class_dropout_prob=0.1), Conditional()
    draw, x_1, y = draw_of(objective), torch.randn(8, *SHAPE), torch.arange(8) % 3
    exact = objective(model, x_1, y, draw)
    with torch.autocast("cpu", dtype=dtype):
        loss = objective(model, x_1, y, draw)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, exact, rtol=0.05)


def test_the_objective_compiles_as_one_graph():
    objective, model = FlowMatching(class_dropout_prob=0.1), Conditional()
    draw, x_1, y = draw_of(objective), torch.randn(8, *SHAPE), torch.arange(8) % 3
    compiled = torch.compile(
        lambda x, y, d: objective(model, x, y, d), backend="eager", fullgraph=True
    )
    assert torch.allclose(compiled(x_1, y, draw), objective(model, x_1, y, draw))


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as Apple GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            assert getattr(tensor, "dtype", None) != torch.float64, func
        return result


def test_training_and_one_step_loss_need_no_float64():
    objective = FlowMatching(time_sampler=TimeSampler("edm"))
    x_1 = torch.rand(8, 1, 4, 4)
    with NoFloat64():
        draw = objective.draw(8, (1, 4, 4), generator=torch.Generator().manual_seed(0))
        objective(lambda x, t, y: -x, x_1, None, draw)
        assert one_step_loss(objective, lambda x, t, y: -x, [(x_1, None)]).count == 8


def test_one_step_loss_repeats_and_bins_by_time():
    model, batches = Conditional(), [(torch.randn(40, *SHAPE), torch.arange(40) % 3)] * 3
    first = one_step_loss(FlowMatching(class_dropout_prob=0.9), model, batches, seed=5)
    again = one_step_loss(FlowMatching(), model, batches, seed=5)
    assert first == again
    assert first != one_step_loss(FlowMatching(), model, batches, seed=6)
    assert first.count == 120
    assert len(first.by_time) == 10
    assert sum(first.by_time) / 10 == pytest.approx(first.mean, rel=1e-6)  # 4 images a bin
    assert (model.seen < 3).all()


def test_one_step_loss_does_not_depend_on_how_the_model_was_trained():
    data, path = gaussian(), LinearPath()
    batches = [(torch.randn(40, *SHAPE) * 0.4 + 0.3, None)] * 2
    losses = [
        one_step_loss(
            FlowMatching(
                path,
                prediction=prediction,
                weighting="edm",
                time_sampler=TimeSampler("edm"),
                coupling=make_coupling("exact"),
            ),
            data.model(path, prediction),
            batches,
        ).mean
        for prediction in PREDICTIONS
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)  # their times differ a little


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
def test_one_step_loss_is_taken_at_the_times_that_rollouts_visit(path, prediction):
    times = []

    def model(x, t, y):
        times.append(t)
        return x

    one_step_loss(FlowMatching(path, prediction=prediction), model, [(torch.ones(1000, 3), None)])
    start, end = rollout_span(path, prediction)
    u = ((torch.cat(times).double() - start) / (end - start)).sort().values
    assert torch.allclose(u, (torch.arange(1000).double() + 0.5) / 1000, atol=6e-4)


def test_small_errors_near_the_end_do_not_dominate_the_one_step_loss_of_data():
    """An error of 0.01 in x_1 is 0.01 / (1 - t) in the velocity, whose mean square over the times
    of rollouts is 1e-4 (1 / 0.0099 - 1) = 0.01, and would be 0.1 with times up to 0.999."""
    data, path = gaussian(), LinearPath()
    exact, batches = data.model(path, "data"), [(torch.randn(2000, *SHAPE) * 0.4 + 0.3, None)]
    objective = FlowMatching(path, prediction="data")
    clean = one_step_loss(objective, exact, batches).mean
    noisy = one_step_loss(objective, lambda x, t, y: exact(x, t, y) + 0.01, batches).mean
    assert noisy - clean == pytest.approx(0.01, abs=0.004)


def test_one_step_loss_of_a_perfect_model_is_the_irreducible_variance():
    """Var(x_1 - x_0 | x_t) = s^2 / (t^2 s^2 + (1 - t)^2) for x_1 ~ N(m, s^2), averaged over t."""
    s, path = 0.4, LinearPath()
    t = (torch.arange(100_000).double() + 0.5) / 100_000
    expected = (s**2 / (t**2 * s**2 + (1 - t) ** 2)).mean().item()
    batches = [(torch.randn(2000, *SHAPE) * s + 0.3, None)]
    loss = one_step_loss(FlowMatching(path), gaussian(0.3, s).model(path), batches).mean
    assert loss == pytest.approx(expected, rel=0.02)


def test_wrong_settings_are_refused():
    for call, words in (
        (lambda: FlowMatching(class_dropout_prob=1.5), "class_dropout_prob"),
        (lambda: FlowMatching(prediction="score"), "choose one of"),
        (lambda: FlowMatching(weighting="snr"), "choose one of"),
        (lambda: one_step_loss(FlowMatching(), lambda x, t, y: x, []), "no images"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_draw_is_moved_to_the_device():
    draw = FlowMatching().draw(4, SHAPE, generator=torch.Generator(), device="meta")
    assert draw.x_0.device.type == draw.t.device.type == "meta"
