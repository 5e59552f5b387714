"""Builds the objects of this package from a config; its other files take plain arguments."""

from flowdopr.config import Config
from flowdopr.flow.coupling import Coupling, make_coupling
from flowdopr.flow.objective import FlowMatching
from flowdopr.flow.path import PATHS, Path
from flowdopr.flow.sampler import Sampling
from flowdopr.flow.time import TimeSampler


def build_path(config: Config) -> Path:
    """The path of section `flow.path`.

    Raises:
        ValueError: for a value that this path does not allow.
    """
    options = config.flow.path.model_dump()
    try:
        return PATHS[options.pop("name")](**options)
    except ValueError as error:
        raise ValueError(f"flow.path: {error}") from error


def build_time_sampler(config: Config) -> TimeSampler:
    """The sampler of training times of section `flow.time`."""
    options = config.flow.time.model_dump()
    return TimeSampler(options.pop("name"), **options)


def build_coupling(config: Config) -> Coupling:
    """The coupling of noise and images of section `flow.coupling`."""
    options = config.flow.coupling.model_dump()
    return make_coupling(options.pop("name"), **options)


def build_objective(config: Config) -> FlowMatching:
    """The training objective of section `flow`."""
    weighting = config.flow.weighting.model_dump()
    return FlowMatching(
        build_path(config),
        prediction=config.flow.prediction,
        weighting=weighting.pop("name"),
        time_sampler=build_time_sampler(config),
        coupling=build_coupling(config),
        class_dropout_prob=config.flow.class_dropout_prob,
        **weighting,
    )


def build_sampling(config: Config) -> Sampling:
    """Settings of rollouts from section `sample`, and from `flow` for how the model was trained."""
    solver, guidance = config.sample.solver.model_dump(), config.sample.guidance
    grid = solver.pop("grid", {"name": "uniform"})
    settings = {f"grid_{key}": grid[key] for key in ("rho", "shift") if key in grid}
    if guidance is not None:
        settings |= {"guidance_scale": guidance.scale, "guidance_interval": guidance.interval}
    return Sampling(
        path=build_path(config),
        prediction=config.flow.prediction,
        coupling=config.flow.coupling.name,
        solver=solver.pop("name"),
        time_grid=grid.get("times", grid["name"]),
        **solver,
        **settings,
    )
