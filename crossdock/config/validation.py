"""Validation: everything that can be known before a process group exists, in one place."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from transformers import PreTrainedConfig

from crossdock.config.data_checks import check_data, check_tokenizer
from crossdock.config.group_checks import check_group_layout, check_groups
from crossdock.config.layout_checks import check_layout
from crossdock.config.requirements import check_writable, require
from crossdock.config.settings import Config, ConfigError, setting_types
from crossdock.config.start_checks import (
    check_initial_weights,
    check_lora,
    check_run_files,
    check_run_folder,
    check_tuned,
)
from crossdock.dispatch import choose_deepep_api, load_deepep, symmetric_problem
from crossdock.models import (
    FAMILIES,
    ModelError,
    build_model,
    most_positions,
    resolve_hf_config,
)
from crossdock.models.family import DEEPEP_SUFFIX
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfigError
from crossdock.parallel import LayoutError, ParallelDims

__all__ = ["check_settings", "validate"]


def validate(config: Config, world_size: int, ranks_per_machine: int = 0, *, elsewhere: bool = False) -> ParallelDims:
    """Check everything that can be known before a process group exists; returns the layout.

    Args:
        config: to check.
        world_size: ranks over all machines.
        ranks_per_machine: for a launcher, whose ranks will know; 0: what this process was told.
        elsewhere: see `check_settings`.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    model = check_settings(config, elsewhere=elsewhere)
    try:
        dims = ParallelDims.from_config(config.parallelism, world_size)
    except LayoutError as error:
        raise ConfigError(f"parallelism.{error.field}", error.value, error.valid) from None
    check_layout(config, dims, model, ranks_per_machine, elsewhere=elsewhere)
    check_group_layout(config, dims)
    return dims


def check_settings(config: Config, *, elsewhere: bool = False) -> PreTrainedConfig:
    """The part of `validate` that does not depend on the number of ranks; returns the model's configuration.

    Args:
        config: to check.
        elsewhere: the run is planned for other machines: what this one has, devices, packages, files of data and
            weights, is not looked at.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    for name in setting_types():
        value = attrgetter(name)(config)
        require(config, name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
    for valid, (holds, names) in _RANGES.items():
        for name in names.split():
            value = attrgetter(name)(config)
            require(config, name, value is None or holds(value), f"must be {valid}")
    _check_moe(config)
    if not elsewhere:
        check_run_files(config)
        _check_dispatcher(config)
        _check_kernels(config)
        _check_trackers(config)
        _check_attention(config)
    _check_compile(config)
    _check_optimizer(config)
    _check_deterministic(config)
    model = _check_model(config, elsewhere=elsewhere)
    if config.moe.dispatcher == "deepep":
        valid = f"dispatcher 'deepep' needs a hidden size that is a multiple of 256, not {model.hidden_size}"
        require(config, "model.flavor", model.hidden_size % 256 == 0, f"{valid}; use alltoall")
    in_background = config.checkpoint.async_mode == "async" or config.checkpoint.async_when_busy == "wait"
    require(config, "checkpoint.async_when_busy", in_background, "needs checkpoint.async_mode = async")
    if elsewhere:
        return model
    _check_snapshots(config)
    check_groups(config)
    check_run_folder(config)
    check_tuned(config)
    check_initial_weights(config, model)
    check_lora(config, model)
    check_data(config)
    if not os.path.isdir(os.path.expanduser(config.data.cache_folder)):
        check_writable("data.cache_folder", config.data.cache_folder)
    return model


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a positive number": (
        lambda value: value > 0,
        "training.seq_len training.steps training.max_norm optimizer.eps metrics.log_freq profiling.profile_freq "
        "lora.alpha fault_tolerance.max_skipped_steps fault_tolerance.spike_window",
    ),
    "0 or more": (
        lambda value: value >= 0,
        "optimizer.lr optimizer.weight_decay lr_scheduler.warmup_steps checkpoint.interval checkpoint.keep_latest_k "
        "metrics.load_interval validation.interval validation.max_samples lora.rank fault_tolerance.max_restarts "
        "fault_tolerance.snapshot_interval fault_tolerance.straggler_interval fault_tolerance.max_rollbacks "
        "fault_tolerance.replica_check_interval",
    ),
    "-1, or 1 and more": (
        lambda value: value == -1 or value > 0,
        "parallelism.pipeline_parallel_stages_per_rank training.local_batch_size",
    ),
    "0, or 2 or more": (lambda value: value == 0 or value >= 2, "fault_tolerance.replica_groups"),
    "50 to 3600000, an hour": (
        lambda value: 50 <= value <= 3_600_000,
        "fault_tolerance.heartbeat_timeout_ms fault_tolerance.join_timeout_ms",
    ),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        "optimizer.beta1 optimizer.beta2 optimizer.momentum data.held_out",
    ),
    "0 to 1": (lambda value: 0 <= value <= 1, "lr_scheduler.min_lr_factor lr_scheduler.decay_ratio"),
    "0 to 2^63 - 1": (lambda value: 0 <= value < 2**63, "training.seed"),
    "0, or at least 1": (
        lambda value: value == 0 or value >= 1,
        "fault_tolerance.loss_spike_factor fault_tolerance.norm_spike_factor",
    ),
    "1 to 31536000, a year": (lambda value: 0 < value <= 31_536_000, "job.comm_timeout_seconds"),
}


def _check_moe(config: Config) -> None:
    forced = config.training.debug_moe_force_load_balance and config.moe.debug_force_zipf >= 0
    require(config, "moe.debug_force_zipf", not forced, "does not go with training.debug_moe_force_load_balance")
    try:
        config.moe.check()
    except MoEConfigError as error:
        raise ConfigError(f"moe.{error.field}", error.value, error.valid) from None
    wide = config.training.dtype == "float64"
    valid = "needs another training.dtype than float64"
    require(config, "moe.static_shapes", not (config.moe.static_shapes and wide), valid)


def _check_dispatcher(config: Config) -> None:
    if config.moe.dispatcher == "deepep":
        _check_deepep(config)
    if config.moe.dispatcher == "symmetric":
        problem = symmetric_problem(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        valid = f"dispatcher 'symmetric' {problem}; use moe.dispatcher = alltoall"
        require(config, "moe.dispatcher", problem is None, valid)


def _check_deepep(config: Config) -> None:
    size = config.model.flavor.removesuffix(DEEPEP_SUFFIX)
    field, instead = "moe.dispatcher", "moe.dispatcher = alltoall"
    if size != config.model.flavor:
        field, instead = "model.flavor", f"model.flavor = {size} and moe.dispatcher = alltoall"
    try:
        choose_deepep_api(load_deepep(), config.moe.dispatch_options().deepep)
    except ValueError as error:
        raise ConfigError(field, attrgetter(field)(config), f"{error}; that is {instead}") from None
    require(config, field, torch.cuda.is_available(), f"dispatcher 'deepep' needs a GPU; use {instead}")
    in_bf16 = config.training.dtype == "bfloat16"
    require(config, "training.dtype", in_bf16, f"dispatcher 'deepep' needs bfloat16; or use {instead}")


def _check_snapshots(config: Config) -> None:
    folder = config.fault_tolerance.snapshot_folder
    if config.fault_tolerance.snapshot_interval:
        name = "fault_tolerance.snapshot_folder"
        valid = "must be a folder in memory that is there; fault_tolerance.snapshot_interval = 0 takes no snapshots"
        require(config, name, os.path.isdir(folder), valid)
        check_writable(name, folder)


def _check_trackers(config: Config) -> None:
    names = config.metrics.trackers
    require(config, "metrics.trackers", len(set(names)) == len(names), "must name each tracker once")
    for name in names:
        missing = f"the Python package {name} is not installed: pip install 'crossdock[{name}]'"
        require(config, "metrics.trackers", importlib.util.find_spec(name) is not None, missing)
    valid = "must be 1 to 128 letters, digits, '_', '-' and '.'"
    require(config, "metrics.project", re.fullmatch(r"[\w.-]{1,128}", config.metrics.project) is not None, valid)


def _check_deterministic(config: Config) -> None:
    """What `training.deterministic` cannot have: decisions by measured time, sums in no fixed order."""
    if not config.training.deterministic:
        return
    balance, on_gpu = config.balance, torch.cuda.is_available()
    valid = "must be false with training.deterministic: it decides by measured time"
    for name, decides in (
        ("balance.move_if_it_pays", balance.moves and balance.move_if_it_pays),
        ("balance.spill_if_it_pays", balance.spills and balance.spill_if_it_pays),
    ):
        require(config, name, not decides, valid)
    may_be_deepep = config.moe.dispatcher == "deepep" or (
        config.moe.dispatcher == "auto" and on_gpu and importlib.util.find_spec("deep_ep") is not None
    )
    valid = "must be another with training.deterministic, alltoall for one: deepep sums in no order that it promises"
    require(config, "moe.dispatcher", not may_be_deepep, valid)
    valid = "must be false with training.deterministic on a GPU: its kernels are chosen by measured time"
    require(config, "compile.enable", not (config.compile.enable and on_gpu), valid)
    valid = "must be sdpa or eager with training.deterministic: the gradients of others are sums in no fixed order"
    require(config, "model.attn_implementation", config.model.attn_implementation in ("sdpa", "eager"), valid)


def _check_model(config: Config, *, elsewhere: bool) -> PreTrainedConfig:
    chosen = config.run_model
    attention = "sdpa" if elsewhere else config.model.attn_implementation
    for name in ("training.freeze_router", "training.debug_moe_force_load_balance"):
        own = chosen.name == "generic" and attrgetter(name)(config)
        require(config, name, not own, "must be false with model.name = generic, which keeps the family's own router")
    assets = chosen.hf_assets_path
    try:
        model: Any = resolve_hf_config(chosen)
        family = FAMILIES[chosen.name]
        built = build_model(family, model, config.moe, torch.float32, attn_implementation=attention)
        if not moe_layers(built):
            raise ModelError("hf_assets_path", assets, "its config.json has no Mixture-of-Experts layer")
    except MoEConfigError as error:
        raise ConfigError(f"moe.{error.field}", error.value, error.valid) from None
    except ModelError as error:
        raise ConfigError(f"model.{error.field}", error.value, error.valid) from None
    except ImportError as error:
        raise ConfigError("model.attn_implementation", attention, f"needs a package: {error}") from None
    except Exception as error:  # Whatever transformers raises for a config.json that it cannot make a model of.
        cause = f"its config.json makes no model ({type(error).__name__}: {error})"
        raise ConfigError("model.hf_assets_path", assets, cause) from error
    if assets and not elsewhere:
        check_tokenizer(assets, model.vocab_size)
    most = most_positions(model)
    require(config, "training.seq_len", config.training.seq_len <= most, f"at most the model's {most} positions")
    return model


def _check_compile(config: Config) -> None:
    if config.compile.enable:
        backends = torch.compiler.list_backends(exclude_tags=())
        require(config, "compile.backend", config.compile.backend in backends, f"one of {', '.join(backends)}")
        valid = "full or none with compile.enable: what a compiled block computes cannot be kept selectively"
        require(config, "activation_checkpoint.mode", config.activation_checkpoint.mode != "selective", valid)


def _check_optimizer(config: Config) -> None:
    if config.optimizer.name != "muon":
        return
    valid = "must be adamw with lora.rank: adapters are AdamW's, and nothing else is trained"
    require(config, "optimizer.name", not config.lora.rank, valid)
    valid = "must be adamw with training.enable_cpu_offload: Muon's products belong where the model computes"
    require(config, "optimizer.name", not config.training.enable_cpu_offload, valid)


def _check_kernels(config: Config) -> None:
    if config.model.kernels == "none":
        return
    installed = importlib.util.find_spec("liger_kernel") is not None
    require(config, "model.kernels", installed, "needs the package liger-kernel: pip install 'crossdock[liger]'")
    require(config, "model.kernels", torch.cuda.is_available(), "needs a GPU; use none")
    require(config, "training.dtype", config.training.dtype != "float64", "float64 needs model.kernels = none")


_FLASH_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def _check_attention(config: Config) -> None:
    name, attention = "model.attn_implementation", config.model.attn_implementation
    if attention in ("sdpa", "eager"):
        return
    package = _FLASH_ATTENTION.get(attention)
    if package is not None:
        installed = importlib.util.find_spec(package) is not None
        require(config, name, installed, f"needs the package {package}; use sdpa")
        require(config, name, config.training.dtype == "bfloat16", "needs training.dtype = bfloat16; or use sdpa")
    require(config, name, torch.cuda.is_available(), "needs a GPU; use sdpa")
    blind = package is not None and config.data.within_documents and config.training.local_batch_size > 1
    valid = "needs another model.attn_implementation than flash attention, which does not see the ends of documents"
    require(config, "data.attend_within_documents", not blind, valid)
