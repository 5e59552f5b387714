"""Every setting of a config reaches the object that is built from it."""

from typing import get_args

import pytest
import torch

from flowdopr.config import FlowConfig, SampleConfig, load_config
from flowdopr.config.sample import AdaptiveSolver, ImplicitAdamsSolver, SDESolver
from flowdopr.config.types import choices, names_of
from flowdopr.flow import (
    ADAPTIVE_SOLVERS,
    BATCH_DEPENDENT_SOLVERS,
    COUPLINGS,
    PATHS,
    PREDICTIONS,
    SDE_SOLVERS,
    SOLVERS,
    WEIGHTINGS,
    LinearPath,
    Sampling,
    TimeSampler,
    build_coupling,
    build_objective,
    build_path,
    build_sampling,
    build_time_sampler,
    make_coupling,
)
from flowdopr.flow.coupling import Entropic
from flowdopr.flow.path import VariancePreservingPath
from flowdopr.flow.sde import LAST_STEPS
from flowdopr.flow.time import TIME_DISTRIBUTIONS, TIME_GRIDS

SMALL = """
name: built
data: {name: digits}
model: {name: dit}
train: {steps: 1, global_batch_size: 2}
"""


@pytest.fixture
def config_of(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return lambda *overrides: load_config(path, overrides)


def names(section, setting):
    return set(choices(section.model_fields[setting]))


def test_the_config_offers_exactly_the_names_that_are_implemented():
    assert names(FlowConfig, "path") == set(PATHS)
    assert get_args(FlowConfig.model_fields["prediction"].annotation) == PREDICTIONS
    assert names(FlowConfig, "weighting") == set(WEIGHTINGS)
    assert names(FlowConfig, "time") == set(TIME_DISTRIBUTIONS)
    assert names(FlowConfig, "coupling") == set(COUPLINGS)
    assert names(SampleConfig, "solver") == set(SOLVERS)
    assert names(SDESolver, "grid") == {*TIME_GRIDS, "list"}
    assert names_of(SDESolver) == SDE_SOLVERS
    assert names_of(AdaptiveSolver) == ADAPTIVE_SOLVERS
    assert {*names_of(AdaptiveSolver), *names_of(ImplicitAdamsSolver)} == set(
        BATCH_DEPENDENT_SOLVERS
    )
    assert get_args(SDESolver.model_fields["last_step"].annotation) == LAST_STEPS


@pytest.mark.parametrize("name", PATHS)
def test_a_path_has_the_same_defaults_in_config_and_class(config_of, name):
    assert vars(build_path(config_of(f"flow.path={name}"))) == vars(PATHS[name]())


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_coupling_has_the_same_defaults_in_config_and_function(config_of, name):
    built, own = build_coupling(config_of(f"flow.coupling={name}")), make_coupling(name)
    assert getattr(built, "__dict__", built) == getattr(own, "__dict__", own)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_has_the_same_defaults_in_config_and_sampling(config_of, name):
    built, own = build_sampling(config_of(f"sample.solver={name}")), Sampling(solver=name)
    assert vars(built) | {"path": None} == vars(own) | {"path": None}


def test_defaults_are_plain_flow_matching(config_of):
    objective = build_objective(config_of())
    assert isinstance(objective.path, LinearPath)
    assert objective.prediction == "velocity"
    assert objective.weighting == "uniform"
    assert objective.time_sampler == build_time_sampler(config_of()) == TimeSampler()
    assert objective.class_dropout_prob == 0.1
    x_0 = torch.randn(4, 2)
    assert torch.equal(build_coupling(config_of())(x_0, x_0, None, torch.rand(4)), x_0)


def test_objective_follows_the_section_flow(config_of):
    config = config_of(
        "flow.path={name: variance_preserving, beta_max: 10}",
        "flow.prediction=noise",
        "flow.weighting={name: edm, sigma_data: 0.3}",
        "flow.time={name: logit_normal, mean: 0.2, std: 0.7, shift: 2, stratified: false}",
        "flow.coupling={name: entropic, regularisation: 0.2}",
        "flow.class_dropout_prob=0.25",
    )
    objective = build_objective(config)
    assert isinstance(objective.path, VariancePreservingPath)
    assert objective.path.beta_max == 10
    assert (objective.prediction, objective.weighting) == ("noise", "edm")
    assert objective.sigma_data == 0.3
    assert objective.time_sampler == TimeSampler("logit_normal", 0.2, 0.7, 2.0, False)
    assert isinstance(objective.coupling, Entropic)
    assert objective.coupling.regularisation == 0.2
    assert objective.class_dropout_prob == 0.25


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        (
            "{name: rk4, steps: 7, grid: {name: shifted, shift: 2}}",
            {"solver": "rk4", "steps": 7, "time_grid": "shifted", "grid_shift": 2.0},
        ),
        (
            "{name: heun2, grid: {name: edm, rho: 5}}",
            {"solver": "heun2", "time_grid": "edm", "grid_rho": 5.0},
        ),
        ("{name: euler, grid: [0, 0.2, 1]}", {"time_grid": (0.0, 0.2, 1.0), "steps": 2}),
        ("{name: dopri5, atol: 1e-3, rtol: 1e-4}", {"atol": 1e-3, "rtol": 1e-4}),
        ("{name: fixed_adams, steps: 7, atol: 1e-3}", {"steps": 7, "atol": 1e-3}),
        (
            "{name: sde_heun, noise_scale: 0.5, last_step: mean, last_step_size: 0.04}",
            {"noise_scale": 0.5, "last_step": "mean", "last_step_size": 0.04},
        ),
    ],
)
def test_sampling_follows_the_sections_sample_and_flow(config_of, solver, settings):
    guidance = "sample.guidance={scale: 2, interval: [0.2, 0.8]}"
    flow = ("flow.path=cosine", "flow.prediction=data")
    sampling = build_sampling(config_of(f"sample.solver={solver}", guidance, *flow))
    settings = settings | {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}
    assert {name: getattr(sampling, name) for name in settings} == settings
    assert isinstance(sampling.path, PATHS["cosine"])
    assert sampling.prediction == "data"


@pytest.mark.parametrize(
    ("build", "overrides", "words"),
    [
        (
            build_objective,
            ["flow.path={name: variance_preserving, beta_max: 500}"],
            "flow.path: .*beta_max=500.0",
        ),
        (
            build_objective,
            [
                "flow.path={name: polynomial, power: 8}",
                "flow.prediction=noise",
                "flow.weighting=edm",
            ],
            "leaves float32",
        ),
        (build_sampling, ["flow.coupling=exact", "sample.solver=sde_heun"], "needs a score"),
    ],
)
def test_wrong_combinations_are_refused_when_built(config_of, build, overrides, words):
    with pytest.raises(ValueError, match=words) as error:
        build(config_of(*overrides))
    assert "\n" not in str(error.value)
