"""A config builds the parts it names."""

import torch

from flowdopr.config import Config
from flowdopr.flow import (
    LinearPath,
    TimeSampler,
    build_coupling,
    build_objective,
    build_path,
    build_sampling,
    build_time_sampler,
)

CONFIG = Config.model_validate(
    {
        "name": "built",
        "data": {"name": "digits"},
        "model": {"name": "dit"},
        "flow": {"class_dropout_prob": 0.25},
        "train": {"steps": 1, "global_batch_size": 2},
        "sample": {"solver": "rk4", "steps": 7, "atol": 1e-3, "rtol": 1e-4, "guidance_scale": 2.0},
    }
)


def test_objective_follows_the_section_flow():
    objective = build_objective(CONFIG)
    assert isinstance(objective.path, LinearPath)
    assert isinstance(build_path(CONFIG), LinearPath)
    assert objective.time_sampler == build_time_sampler(CONFIG) == TimeSampler()
    assert objective.class_dropout_prob == 0.25
    x_0 = torch.randn(4, 2)
    assert torch.equal(build_coupling(CONFIG)(x_0, x_0, None, torch.rand(4)), x_0)


def test_sampling_follows_the_section_sample():
    sampling = build_sampling(CONFIG)
    assert isinstance(sampling.path, LinearPath)
    for name, value in CONFIG.sample.model_dump().items():
        if hasattr(sampling, name):
            assert getattr(sampling, name) == value
