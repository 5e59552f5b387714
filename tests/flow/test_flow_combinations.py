"""Every combination of settings either works or is refused with the right message."""

import pytest
import torch
from analytic import EXAMPLE_PATHS, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdopr.flow import (
    ADAPTIVE_SOLVERS,
    COUPLINGS,
    PREDICTIONS,
    SDE_SOLVERS,
    SOLVERS,
    WEIGHTINGS,
    FlowMatching,
    Sampling,
    TimeSampler,
    generate,
    make_coupling,
)
from flowdopr.flow.solver import CALLS_A_STEP, MULTISTEP_SOLVERS
from flowdopr.flow.time import TIME_DISTRIBUTIONS, TIME_GRIDS

SHAPE = (2, 2, 2)
examples = settings(deadline=None, max_examples=150)


class Tiny(torch.nn.Module):
    image_shape = SHAPE

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.embed, self.mix = torch.nn.Embedding(num_classes + 1, 8), torch.nn.Linear(9, 8)

    def forward(self, x, t, y):
        assert (y is None) == (self.num_classes == 0)
        out = self.mix(torch.cat([x.flatten(1), t[:, None].to(x)], 1))
        return (out if y is None else out + self.embed(y)).reshape(x.shape)


@examples
@given(
    path=st.sampled_from(list(EXAMPLE_PATHS)),
    prediction=st.sampled_from(PREDICTIONS),
    weighting=st.sampled_from(list(WEIGHTINGS)),
    distribution=st.sampled_from(TIME_DISTRIBUTIONS),
    coupling=st.sampled_from(COUPLINGS),
    num_classes=st.sampled_from([0, 3]),
    dropout=st.sampled_from([0.0, 0.1, 1.0]),
    batch_size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_objective_trains(
    path, prediction, weighting, distribution, coupling, num_classes, dropout, batch_size, dtype
):
    objective = FlowMatching(
        EXAMPLE_PATHS[path],
        prediction=prediction,
        weighting=weighting,
        time_sampler=TimeSampler(distribution),
        coupling=make_coupling(coupling),
        class_dropout_prob=dropout,
    )
    model = Tiny(num_classes)
    draw = objective.draw(batch_size, SHAPE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(batch_size) % 3
    loss = objective(model, torch.rand(batch_size, *SHAPE).to(dtype), y, draw)
    assert loss.shape == (batch_size,)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    loss.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def reason_to_refuse(solver, grid, coupling, guidance_scale, num_classes):
    if solver in SDE_SOLVERS and coupling != "independent":
        return "needs a score"
    if solver in ADAPTIVE_SOLVERS and grid != "uniform":
        return "chooses its own times"
    if solver in MULTISTEP_SOLVERS and grid != "uniform":
        return "equal steps"
    if guidance_scale != 1 and num_classes == 0:
        return "needs labels"
    return None


@examples
# The Adams solvers may not converge in 12 steps for predictions of the data.
@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@given(
    path=st.sampled_from(list(EXAMPLE_PATHS)),
    prediction=st.sampled_from(PREDICTIONS),
    coupling=st.sampled_from(COUPLINGS),
    solver=st.sampled_from([name for name in SOLVERS if name != "implicit_adams"]),
    grid=st.sampled_from([*TIME_GRIDS, (0.0, 0.2, 0.6, 1.0)]),
    guidance_scale=st.sampled_from([0.0, 1.0, 2.0]),
    interval=st.sampled_from([(0.0, 1.0), (0.3, 0.6)]),
    num_classes=st.sampled_from([0, 3]),
)
def test_every_sampling_works_or_is_refused(
    path, prediction, coupling, solver, grid, guidance_scale, interval, num_classes
):
    model = Tiny(num_classes).requires_grad_(False)
    labels = torch.tensor([0, 1, 2]) if num_classes else None

    def sample():
        return generate(
            model,
            labels,
            num_images=None if num_classes else 3,
            seed=0,
            path=EXAMPLE_PATHS[path],
            prediction=prediction,
            coupling=coupling,
            solver=solver,
            steps=12,
            time_grid=grid,
            atol=1e-2,
            rtol=1e-2,
            guidance_scale=guidance_scale,
            guidance_interval=interval,
        )

    reason = reason_to_refuse(solver, grid, coupling, guidance_scale, num_classes)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            sample()
        return
    samples = sample()
    assert samples.images.shape == (3, *SHAPE)
    assert samples.images.isfinite().all()
    if solver in CALLS_A_STEP and guidance_scale == 1:
        times = Sampling(EXAMPLE_PATHS[path], prediction, steps=12, time_grid=grid).grid()
        steps, finishing = len(times) - 1, 0 if times[-1] == 1 else 2
        assert samples.nfe == steps * CALLS_A_STEP[solver] + finishing


# Stochastic rollouts of noise predictions start later than others, so their noise differs.
@pytest.mark.parametrize(
    ("prediction", "solver", "tolerance"),
    [
        *(("data", name, 2e-3) for name in ("heun2", "rk4", *SDE_SOLVERS)),
        *(("noise", name, 0.01) for name in ("heun2", "rk4")),
    ],
)
@pytest.mark.parametrize("path", EXAMPLE_PATHS.values(), ids=EXAMPLE_PATHS)
def test_exact_models_of_data_or_noise_give_the_images_of_the_velocity(
    path, prediction, solver, tolerance
):
    def images(prediction):
        return generate(
            gaussian().model(path, prediction),
            None,
            num_images=4,
            image_shape=SHAPE,
            seed=0,
            path=path,
            prediction=prediction,
            solver=solver,
            time_grid=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98],
        ).images

    assert torch.allclose(images(prediction), images("velocity"), atol=tolerance)
