"""From a resolved config to the parts of this room: the only file here that sees `Config`."""

import inspect

from flowdopr.config import Config
from flowdopr.flow.coupling import Coupling, make_coupling
from flowdopr.flow.objective import FlowMatching
from flowdopr.flow.path import PATHS, Path
from flowdopr.flow.sampler import Sampling
from flowdopr.flow.time import TimeSampler


def build_path(config: Config) -> Path:
    """`flow.path` with `flow.path_options`.

    Raises:
        ValueError: an option that this path does not have, or a value that it refuses.
    """
    path, options = PATHS[config.flow.path], config.flow.path_options
    known = list(inspect.signature(path).parameters)
    if unknown := [name for name in options if name not in known]:
        remedy = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(
            f"flow.path_options.{unknown[0]}: no option of {config.flow.path}: {remedy}"
        )
    try:
        return path(**options)
    except ValueError as error:
        raise ValueError(f"flow.path_options: {error}") from error


def build_time_sampler(config: Config) -> TimeSampler:
    """Training times: `flow.time_*`."""
    flow = config.flow
    return TimeSampler(
        flow.time_distribution, flow.time_mean, flow.time_std, flow.time_shift, flow.time_stratified
    )


def build_coupling(config: Config) -> Coupling:
    """Which noise goes with which image: `flow.coupling`."""
    flow = config.flow
    return make_coupling(
        flow.coupling,
        regularisation=flow.coupling_regularisation,
        iterations=flow.coupling_iterations,
    )


def build_objective(config: Config) -> FlowMatching:
    """The training objective of section `flow`."""
    return FlowMatching(
        build_path(config),
        prediction=config.flow.prediction,
        weighting=config.flow.weighting,
        time_sampler=build_time_sampler(config),
        coupling=build_coupling(config),
        class_dropout_prob=config.flow.class_dropout_prob,
        sigma_data=config.flow.sigma_data,
    )


def build_sampling(config: Config) -> Sampling:
    """Section `sample` with what the model was trained on, for `generate(..., sampling=...)`."""
    elsewhere = {"batch_size", "num_images", "guide_run", "guide_weights", "guide_step"}
    settings = config.sample.model_dump(exclude=elsewhere)
    return Sampling(
        path=build_path(config),
        prediction=config.flow.prediction,
        coupling=config.flow.coupling,
        **settings,
    )
