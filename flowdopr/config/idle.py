"""Settings that do nothing beside others: whoever sets one is told so, with the remedy.

Only a value that differs from the default counts, and only if it was given beside or after what
makes it idle. So a file's `sample.steps` is no error once `sample.solver=dopri5` overrides the
file, and a run's own settings are none when it is sampled from with others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flowdopr.config.schema import Config

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
TOLERANT = (*ADAPTIVE, "implicit_adams", "fixed_adams")
STOCHASTIC = ("euler_maruyama", "sde_heun")


class Use(NamedTuple):
    """When a setting acts: `acts`, decided by other settings, and what to do where it does not."""

    setting: str
    by: tuple[str, ...]
    acts: Callable[[Config], bool]
    remedy: str


USES = (
    Use(
        "flow.sigma_data",
        ("flow.weighting",),
        lambda c: c.flow.weighting == "edm",
        "it belongs to flow.weighting=edm",
    ),
    *(
        Use(
            f"flow.{key}",
            ("flow.time_distribution",),
            lambda c: c.flow.time_distribution == "logit_normal",
            "it belongs to flow.time_distribution=logit_normal",
        )
        for key in ("time_mean", "time_std")
    ),
    *(
        Use(
            f"flow.{key}",
            ("flow.coupling",),
            lambda c: c.flow.coupling == "entropic",
            "it belongs to flow.coupling=entropic",
        )
        for key in ("coupling_regularisation", "coupling_iterations")
    ),
    Use(
        "sample.steps",
        ("sample.solver",),
        lambda c: c.sample.solver not in ADAPTIVE,
        "an adaptive solver takes sample.atol and sample.rtol",
    ),
    Use(
        "sample.steps",
        ("sample.time_grid",),
        lambda c: c.sample.solver in ADAPTIVE or isinstance(c.sample.time_grid, str),
        "a list of times has its own number of steps",
    ),
    Use(
        "sample.grid_shift",
        ("sample.time_grid",),
        lambda c: c.sample.time_grid == "shifted",
        "it belongs to sample.time_grid=shifted",
    ),
    Use(
        "sample.grid_rho",
        ("sample.time_grid",),
        lambda c: c.sample.time_grid == "edm",
        "it belongs to sample.time_grid=edm",
    ),
    *(
        Use(
            f"sample.{key}",
            ("sample.solver", "evaluate.metrics"),
            lambda c: c.sample.solver in TOLERANT or "bpd" in c.evaluate.metrics,
            "it belongs to adaptive solvers such as dopri5, and to the metric bpd",
        )
        for key in ("atol", "rtol")
    ),
    *(
        Use(
            f"sample.{key}",
            ("sample.solver",),
            lambda c: c.sample.solver in STOCHASTIC,
            f"it belongs to {' and '.join(STOCHASTIC)}",
        )
        for key in ("noise_scale", "last_step", "last_step_size")
    ),
    Use(
        "sample.guidance_interval",
        ("sample.guidance_scale",),
        lambda c: c.sample.guidance_scale != 1,
        "there is no guidance at 1: set another scale",
    ),
    Use(
        "evaluate.inception_weights",
        ("evaluate.extractor",),
        lambda c: c.evaluate.extractor == "inception",
        "it belongs to evaluate.extractor=inception",
    ),
    *(
        Use(
            f"evaluate.bpd_{key}",
            ("evaluate.metrics",),
            lambda c: "bpd" in c.evaluate.metrics,
            "add bpd to the metrics",
        )
        for key in ("num_images", "trace")
    ),
    *(
        Use(
            f"evaluate.excess_{key}",
            ("evaluate.metrics",),
            lambda c: "excess" in c.evaluate.metrics,
            "add excess to the metrics",
        )
        for key in ("num_images", "space")
    ),
)


def idle_setting(config: Config, layers: Sequence[Mapping[str, Any]]) -> str | None:
    """One line about the first setting that was given and does nothing; None if all act.

    Args:
        config: what came of everything that was given.
        layers: what was given, as nested mappings: files from the base on, then overrides.
    """
    arms = config.compare.arms if config.compare else ()
    for use in USES:
        value, default = _value(config, use.setting), _value(Config, use.setting)
        if value == default or use.acts(config):
            continue
        given = _last(layers, [use.setting])
        in_an_arm = any(key in arm.set for arm in arms for key in use.by)
        if given < 0 or given < _last(layers, use.by) or in_an_arm:
            continue
        beside = ", ".join(f"{key}={_text(_value(config, key))}" for key in use.by)
        return (
            f"{use.setting}={_text(value)} has no effect with {beside}: {use.remedy}, "
            f"or leave it at {_text(default)}"
        )
    return None


def _last(layers: Sequence[Mapping[str, Any]], settings: Iterable[str]) -> int:
    """Number of the last layer that gives one of the settings; -1 if none does."""
    pairs = [setting.split(".") for setting in settings]
    found = [
        number
        for number, layer in enumerate(layers)
        for section, key in pairs
        if isinstance(layer.get(section), dict) and key in layer[section]
    ]
    return max(found, default=-1)


def _value(config: Config | type[Config], setting: str) -> Any:
    """The setting's value, or its default where `config` is the schema itself."""
    section, key = setting.split(".")
    if isinstance(config, Config):
        return getattr(getattr(config, section), key)
    return getattr(config.model_fields[section].default, key)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
