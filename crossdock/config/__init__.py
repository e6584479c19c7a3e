"""Configuration: TOML, then command-line overrides, into typed dataclasses, validated once before anything starts."""

from crossdock.config.elastic import fit, with_settled_batch
from crossdock.config.group_checks import default_global_batch_size, ranks_per_group
from crossdock.config.layout_checks import AUTO_BATCH, check_layout, check_ring, expert_parallel_degrees
from crossdock.config.reading import (
    PRESETS,
    RUN_CONFIG_FILE,
    load_config,
    read_run_settings,
    read_toml,
    to_toml,
    write_run_settings,
)
from crossdock.config.requirements import check_writable
from crossdock.config.settings import (
    ASSETS_FOLDER,
    Config,
    ConfigError,
    FaultToleranceConfig,
    JobConfig,
    LRSchedulerConfig,
    MetricsConfig,
    OptimizerConfig,
    ProfilingConfig,
    TrainingConfig,
    ValidationConfig,
)
from crossdock.config.tuned import TunedFileError, read_tuned, tuned_file
from crossdock.config.validation import check_settings, validate

__all__ = [
    "ASSETS_FOLDER",
    "AUTO_BATCH",
    "PRESETS",
    "RUN_CONFIG_FILE",
    "Config",
    "ConfigError",
    "FaultToleranceConfig",
    "JobConfig",
    "LRSchedulerConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "ProfilingConfig",
    "TrainingConfig",
    "TunedFileError",
    "ValidationConfig",
    "check_layout",
    "check_ring",
    "check_settings",
    "check_writable",
    "default_global_batch_size",
    "expert_parallel_degrees",
    "fit",
    "load_config",
    "ranks_per_group",
    "read_run_settings",
    "read_toml",
    "read_tuned",
    "to_toml",
    "tuned_file",
    "validate",
    "with_settled_batch",
    "write_run_settings",
]
