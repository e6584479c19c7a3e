"""Configuration: TOML, then command-line overrides, into typed dataclasses, validated once before anything starts."""

from crossdock.config.reading import RUN_CONFIG_FILE, load_config, to_toml
from crossdock.config.settings import (
    Config,
    ConfigError,
    DataConfig,
    JobConfig,
    LRSchedulerConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from crossdock.config.validation import check_settings, validate

__all__ = [
    "RUN_CONFIG_FILE",
    "Config",
    "ConfigError",
    "DataConfig",
    "JobConfig",
    "LRSchedulerConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "ValidationConfig",
    "check_settings",
    "load_config",
    "to_toml",
    "validate",
]
