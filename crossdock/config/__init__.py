"""Configuration: TOML, then command-line overrides, into typed dataclasses, validated once before anything starts."""

from crossdock.config.reading import RUN_CONFIG_FILE, load_config, to_toml
from crossdock.config.settings import (
    Config,
    ConfigError,
    JobConfig,
    LRSchedulerConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainingConfig,
)
from crossdock.config.validation import check_settings, validate

__all__ = [
    "RUN_CONFIG_FILE",
    "Config",
    "ConfigError",
    "JobConfig",
    "LRSchedulerConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "check_settings",
    "load_config",
    "to_toml",
    "validate",
]
