"""Settings: the schema of every YAML file and the strict loader."""

from flowdopr.config.errors import ConfigError, did_you_mean
from flowdopr.config.flow import FlowConfig
from flowdopr.config.load import (
    apply_overrides,
    effective,
    load_config,
    load_data_config,
    read_config,
    to_dict,
    to_yaml,
    with_damping_in_steps,
)
from flowdopr.config.model import DiTConfig
from flowdopr.config.optimizer import DoPrConfig
from flowdopr.config.sample import SampleConfig
from flowdopr.config.schema import (
    ArmConfig,
    CompareConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    TrainConfig,
)
from flowdopr.config.shipped import shipped, title

__all__ = [
    "ArmConfig",
    "CompareConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiTConfig",
    "DoPrConfig",
    "EvaluateConfig",
    "FlowConfig",
    "SampleConfig",
    "TrainConfig",
    "apply_overrides",
    "did_you_mean",
    "effective",
    "load_config",
    "load_data_config",
    "read_config",
    "shipped",
    "title",
    "to_dict",
    "to_yaml",
    "with_damping_in_steps",
]
