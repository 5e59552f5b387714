"""From a resolved config to the parts of this room: the only file here that sees `Config`."""

from flowdopr.config import Config
from flowdopr.flow.coupling import Coupling, make_coupling
from flowdopr.flow.objective import FlowMatching
from flowdopr.flow.path import PATHS, Path
from flowdopr.flow.sampler import Sampling
from flowdopr.flow.time import TimeSampler


def build_path(config: Config) -> Path:
    """`flow.path`."""
    return PATHS[config.flow.path]()


def build_time_sampler(config: Config) -> TimeSampler:
    """Training times."""
    return TimeSampler()


def build_coupling(config: Config) -> Coupling:
    """Which noise goes with which image."""
    return make_coupling("independent")


def build_objective(config: Config) -> FlowMatching:
    """The training objective of section `flow`."""
    return FlowMatching(
        build_path(config),
        time_sampler=build_time_sampler(config),
        coupling=build_coupling(config),
        class_dropout_prob=config.flow.class_dropout_prob,
    )


def build_sampling(config: Config) -> Sampling:
    """Section `sample` with what the model was trained on, for `generate(..., sampling=...)`."""
    return Sampling(
        path=build_path(config),
        solver=config.sample.solver,
        steps=config.sample.steps,
        atol=config.sample.atol,
        rtol=config.sample.rtol,
        guidance_scale=config.sample.guidance_scale,
    )
