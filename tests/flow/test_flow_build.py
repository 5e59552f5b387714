"""A config builds the parts it names, all of them."""

from typing import Literal, get_args, get_origin

import pytest
import torch

from flowdopr.config import Config, FlowConfig, SampleConfig
from flowdopr.flow import (
    COUPLINGS,
    PATHS,
    PREDICTIONS,
    WEIGHTINGS,
    LinearPath,
    TimeSampler,
    build_coupling,
    build_objective,
    build_path,
    build_sampling,
    build_time_sampler,
)
from flowdopr.flow.coupling import Entropic
from flowdopr.flow.path import VariancePreservingPath
from flowdopr.flow.sde import LAST_STEPS
from flowdopr.flow.time import TIME_DISTRIBUTIONS, TIME_GRIDS


def config_of(flow=None, sample=None):
    return Config.model_validate(
        {
            "name": "built",
            "data": {"name": "digits"},
            "model": {"name": "dit"},
            "train": {"steps": 1, "global_batch_size": 2},
            "flow": flow or {},
            "sample": sample or {},
        }
    )


def literals(section, field):
    """The names that a setting may take, also where it may be something else as well."""
    annotation = section.model_fields[field].annotation
    parts = [annotation, *get_args(annotation)]
    return next(get_args(part) for part in parts if get_origin(part) is Literal)


def test_the_config_offers_exactly_what_there_is():
    assert literals(FlowConfig, "path") == tuple(PATHS)
    assert literals(FlowConfig, "prediction") == PREDICTIONS
    assert literals(FlowConfig, "weighting") == tuple(WEIGHTINGS)
    assert literals(FlowConfig, "time_distribution") == TIME_DISTRIBUTIONS
    assert literals(FlowConfig, "coupling") == COUPLINGS
    assert literals(SampleConfig, "time_grid") == TIME_GRIDS
    assert literals(SampleConfig, "last_step") == LAST_STEPS


def test_defaults_are_plain_flow_matching():
    objective = build_objective(config_of())
    assert isinstance(objective.path, LinearPath)
    assert objective.prediction == "velocity"
    assert objective.weighting == "uniform"
    assert objective.time_sampler == build_time_sampler(config_of()) == TimeSampler()
    assert objective.class_dropout_prob == 0.1
    x_0 = torch.randn(4, 2)
    assert torch.equal(build_coupling(config_of())(x_0, x_0, None, torch.rand(4)), x_0)


def test_objective_follows_the_section_flow():
    config = config_of(
        {
            "path": "variance_preserving",
            "path_options": {"beta_max": 10.0},
            "prediction": "noise",
            "weighting": "edm",
            "sigma_data": 0.3,
            "time_distribution": "logit_normal",
            "time_mean": 0.2,
            "time_std": 0.7,
            "time_shift": 2.0,
            "time_stratified": False,
            "coupling": "entropic",
            "coupling_regularisation": 0.2,
            "class_dropout_prob": 0.25,
        }
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


def test_sampling_follows_the_sections_sample_and_flow():
    settings = {
        "solver": "rk4",
        "steps": 7,
        "time_grid": "shifted",
        "grid_shift": 2.0,
        "atol": 1e-3,
        "guidance_scale": 2.0,
        "guidance_interval": (0.2, 0.8),
        "noise_scale": 0.5,
        "last_step": "mean",
        "last_step_size": 0.04,
    }
    sampling = build_sampling(config_of({"path": "cosine", "prediction": "data"}, settings))
    assert {name: getattr(sampling, name) for name in settings} == settings
    assert isinstance(sampling.path, PATHS["cosine"])
    assert sampling.prediction == "data"


@pytest.mark.parametrize(
    ("build", "flow", "sample", "words"),
    [
        (build_path, {"path_options": {"power": 2.0}}, {}, "it has none"),
        (build_path, {"path": "polynomial", "path_options": {"beta_min": 1.0}}, {}, "it has power"),
        (build_path, {"path": "polynomial", "path_options": {"power": 0.5}}, {}, "power=0.5"),
        (
            build_objective,
            {"path": "variance_preserving", "path_options": {"beta_max": 500.0}},
            {},
            "flow.path_options: .*beta_max=500.0",
        ),
        (
            build_objective,
            {"path": "polynomial", "path_options": {"power": 8}, "prediction": "noise"}
            | {"weighting": "edm"},
            {},
            "leaves float32",
        ),
        (build_sampling, {}, {"time_grid": (0.5, 0.6)}, "sample.time_grid"),
        (build_sampling, {}, {"solver": "ddim"}, "choose one of"),
        (build_sampling, {}, {"solver": "dopri5", "time_grid": "edm"}, "chooses its own times"),
        (build_sampling, {"coupling": "exact"}, {"solver": "sde_heun"}, "needs a score"),
    ],
)
def test_wrong_combinations_are_refused_when_built(build, flow, sample, words):
    with pytest.raises(ValueError, match=words) as error:
        build(config_of(flow, sample))
    assert "\n" not in str(error.value)
