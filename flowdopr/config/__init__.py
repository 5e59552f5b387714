"""Settings: the schema of every YAML file and the strict loader. Imports no other room."""

from flowdopr.config.load import (
    ConfigError,
    apply_overrides,
    load_config,
    load_data_config,
    to_dict,
    to_yaml,
)
from flowdopr.config.model import DiTConfig, UNetConfig
from flowdopr.config.optimizer import OptimizerConfig
from flowdopr.config.schema import (
    ArmConfig,
    CompareConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "ArmConfig",
    "CompareConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiTConfig",
    "EvaluateConfig",
    "FlowConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TrainConfig",
    "UNetConfig",
    "apply_overrides",
    "load_config",
    "load_data_config",
    "to_dict",
    "to_yaml",
]
