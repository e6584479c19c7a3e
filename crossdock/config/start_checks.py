"""Checks of what a run starts from, weights and adapters, and of the folder in which it may go on."""

from __future__ import annotations

import os
from operator import attrgetter
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from crossdock.checkpoint import (
    CHECKSUMS_FILE,
    CheckpointError,
    HFCheckpoint,
    find_checkpoint,
    folder_problem,
    holds_weights_alone,
)
from crossdock.config.reading import RUN_CONFIG_FILE, read_run_settings
from crossdock.config.requirements import check_writable, require
from crossdock.config.settings import ASSETS_FOLDER, Config, ConfigError
from crossdock.config.tuned import TunedFileError, read_tuned
from crossdock.lora import LoRAError, add_lora
from crossdock.models import FAMILIES, PeftAdapter, build_model
from crossdock.models.family import DEEPEP_SUFFIX
from crossdock.models.generic import Generic

__all__ = ["check_initial_weights", "check_lora", "check_run_files", "check_run_folder", "check_tuned"]


def check_run_files(config: Config) -> None:
    """What a resumed run reads of its own folder, or a new one of another run's, must be what was written there."""
    resumed = config.run_model is not config.model
    if resumed and Path(config.job.dump_folder, RUN_CONFIG_FILE).is_file():
        read_run_settings(Path(config.job.dump_folder))
    assets = config.run_model.hf_assets_path
    if assets and (resumed or Path(assets, CHECKSUMS_FILE).is_file()) and (problem := folder_problem(Path(assets))):
        if resumed:
            raise ConfigError("job.dump_folder", config.job.dump_folder, problem)
        raise ConfigError("model.hf_assets_path", assets, problem)


def check_initial_weights(config: Config, hf_config: PreTrainedConfig) -> None:
    """Weights that a new run starts from: headers and configuration must fit the model. A resumed run has its own."""
    named = config.checkpoint.initial_load_path
    require(
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
    if saved is not None and saved.is_file() and read_run_settings(saved.parent).lora.rank:
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


def check_lora(config: Config, hf_config: PreTrainedConfig) -> None:
    lora, family = config.lora, FAMILIES[config.model.name]
    if not lora.rank:
        require(config, "lora.adapter_path", not lora.adapter_path, "needs lora.rank, the rank of that adapter")
        return
    valid = "needs weights beside the adapters: checkpoint.initial_load_in_hf with model.hf_assets_path, or "
    require(config, "lora.rank", bool(config.initial_weights), f"{valid}checkpoint.initial_load_path")
    unique = bool(lora.targets) and len(set(lora.targets)) == len(lora.targets)
    require(config, "lora.targets", unique, "must be attention, experts or both, each once")
    valid = "must be attention alone with model.name = generic, which knows no adapters of experts"
    require(config, "lora.targets", not isinstance(family, Generic) or "experts" not in lora.targets, valid)
    for name in ("training.freeze_router", "training.freeze_experts"):
        frozen = attrgetter(name)(config)
        require(config, name, not frozen, "does not go with lora.rank: LoRA leaves all weights as they are")
    model = build_model(family, hf_config, config.moe, torch.float32)
    try:
        add_lora(model, lora, family.attention)
        if lora.adapter_path and find_checkpoint(Path(config.job.dump_folder)) is None:
            PeftAdapter.open(Path(lora.adapter_path)).check(model, family, lora)
    except LoRAError as error:
        raise ConfigError(f"lora.{error.field}", error.value, error.valid) from None
    except CheckpointError as error:
        raise ConfigError("lora.adapter_path", lora.adapter_path, str(error)) from None


def check_tuned(config: Config) -> None:
    """A file of measurements that is named must be one; of `auto`, there need not be any."""
    tuned = config.training.tuned
    require(config, "training.tuned", bool(tuned), "must be auto, off or a file of `crossdock tune`")
    if tuned in ("auto", "off"):
        return
    try:
        read_tuned(Path(tuned))
    except TunedFileError as error:
        raise ConfigError(
            "training.tuned", tuned, f"must be auto, off or a file of `crossdock tune`: {error}"
        ) from None


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
    "optimizer.name",
)


def check_run_folder(config: Config) -> None:
    folder = config.job.dump_folder
    if not folder:
        return
    check_writable("job.dump_folder", folder)
    checkpoint = find_checkpoint(Path(folder))
    valid = "holds converted weights and no run to go on with; name it in checkpoint.initial_load_path instead"
    require(config, "job.dump_folder", checkpoint is None or not holds_weights_alone(*checkpoint), valid)
    saved = os.path.join(folder, RUN_CONFIG_FILE)
    if os.path.isfile(saved):
        before = read_run_settings(Path(folder))
        for name in _FIXED:
            value = attrgetter("data.row_packing" if name == "data.packing" else name)
            old = value(before)
            valid = f"must be {old!r}, as in the run that {folder} holds; or choose another job.dump_folder"
            require(config, name, value(config) == old, valid)
        base = before.initial_weights
        if before.lora.rank and config.initial_weights != base and os.path.exists(base):
            valid = f"must name {base!r}, the weights beside the adapters in {folder}; they are still there"
            raise ConfigError("checkpoint.initial_load_path", config.initial_weights, valid)
        old, dtype = before.training.dtype, config.training.dtype
        valid = f"the run that {folder} holds is {old}; weights of float64 and others do not mix"
        require(config, "training.dtype", (old == "float64") == (dtype == "float64"), valid)
    else:
        # Replica groups start one after the other, and the first one's settings come last.
        begun = {ASSETS_FOLDER} if config.fault_tolerance.replica_groups else set()
        found = os.listdir(folder) if os.path.isdir(folder) else []
        usable = all(name.startswith(".") or name in begun for name in found)
        require(config, "job.dump_folder", usable, "must be the folder of a run, an empty one or a new one")
