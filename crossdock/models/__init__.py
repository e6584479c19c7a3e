"""Models: Hugging Face families with their MoE blocks replaced, and their named sizes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import HFCheckpoint
from crossdock.models.assets import copy_assets, dtypes_of, export_hf, left_out, read_dtypes, write_assets
from crossdock.models.attention import register_wide_attention
from crossdock.models.context import UnknownAttention, accept_context_parallel
from crossdock.models.families import FAMILIES
from crossdock.models.family import DEEPEP_SUFFIX, ExpertSizes, Family, Kernels, ModelConfig, ModelError
from crossdock.models.foreign import foreign_weights
from crossdock.models.generic import replace_experts
from crossdock.models.initial import initialise_weights
from crossdock.models.loss import LossHead, batch_loss, token_loss
from crossdock.models.peft import PeftAdapter, save_peft_adapter
from crossdock.models.upcycling import UPCYCLED, upcycled_config, upcycled_weights
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import local_part

__all__ = [
    "FAMILIES",
    "UPCYCLED",
    "ExpertSizes",
    "Family",
    "LossHead",
    "ModelConfig",
    "ModelError",
    "PeftAdapter",
    "UnknownAttention",
    "accept_context_parallel",
    "batch_loss",
    "build_model",
    "copy_assets",
    "count_parameters",
    "dtypes_of",
    "export_hf",
    "foreign_weights",
    "initialise_weights",
    "left_out",
    "materialise",
    "most_positions",
    "no_adapter",
    "read_dtypes",
    "replace_experts",
    "resolve_hf_config",
    "save_peft_adapter",
    "token_loss",
    "upcycled_config",
    "upcycled_weights",
    "write_assets",
]


def resolve_hf_config(config: ModelConfig) -> PreTrainedConfig:
    """The transformers configuration that `[model]` names: a flavor's, or that of `hf_assets_path/config.json`.

    Raises:
        ModelError: for an unknown name or flavor, or a folder without a usable config.json.
    """
    family = FAMILIES.get(config.name)
    if family is None:
        raise ModelError("name", config.name, f"one of {', '.join(FAMILIES)}")
    if config.hf_assets_path and not Path(config.hf_assets_path).is_dir():
        raise ModelError("hf_assets_path", config.hf_assets_path, "an existing folder")
    flavor = config.flavor.removesuffix(DEEPEP_SUFFIX)
    if not flavor and config.hf_assets_path:
        return _config_of_folder(family, Path(config.hf_assets_path))
    if not family.flavors:
        raise ModelError("flavor", config.flavor, f"{family.name} has none; name a folder in hf_assets_path instead")
    if (flavor or "debug") not in family.flavors:
        raise ModelError("flavor", config.flavor, f"one of {', '.join(family.flavors)}, each also with -deepep")
    return family.hf_config(flavor or "debug")


def most_positions(config: PreTrainedConfig) -> int:
    """The longest sequence that a configuration is for; without end where it names none."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if most is None else most


def no_adapter(model_type: object, remedy: str = "set model.name = generic for") -> str:
    """What to do with a model of this type, which no family's adapter is for; `remedy` asks for `generic`."""
    known = ", ".join(family.model_type for family in FAMILIES.values() if family.model_type)
    return f"there are adapters for {known}; {remedy} {model_type}, whose router is kept, if it has experts"


def _config_of_folder(family: Family, folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            "hf_assets_path", str(folder), f"a folder with a readable config.json ({error}), or set model.flavor"
        ) from None
    if family.model_type and model_type != family.model_type:
        known = {each.model_type: name for name, each in FAMILIES.items() if each.model_type}
        named = f"set model.name = {known[model_type]}" if model_type in known else no_adapter(model_type)
        raise ModelError(
            "hf_assets_path",
            str(folder),
            f"a folder whose config.json has model_type {family.model_type!r}, not {model_type!r} ({named}); or set "
            "model.flavor to use its tokenizer alone",
        )
    return family.hf_config_from(folder)


def build_model(
    family: Family,
    hf_config: PreTrainedConfig,
    moe: MoEConfig,
    dtype: torch.dtype,
    *,
    attn_implementation: str = "sdpa",
    kernels: Kernels = "none",
    force_load_balance: bool = False,
) -> PreTrainedModel:
    """The family's causal language model with `MoE` layers, on the meta device: no memory, no values yet.

    Raises:
        ImportError: where the package of `attn_implementation` is not installed.
    """
    if family.own_attention:
        attn_implementation = "eager" if attn_implementation == "sdpa" else attn_implementation
    elif attn_implementation == "eager" and dtype == torch.float64:
        attn_implementation = register_wide_attention()
    hf_config = copy.deepcopy(hf_config)
    hf_config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = family.build(hf_config)
        model = family.adapt(model, moe, kernels=kernels, force_load_balance=force_load_balance)
        return model.to(dtype)  # type: ignore[arg-type]


def materialise(
    family: Family,
    model: PreTrainedModel,
    device: torch.device,
    *,
    offload: bool = False,
    seed: int | None = 0,
    weights: HFCheckpoint | None = None,
) -> None:
    """Give a model from `build_model`, made parallel or not, its memory and first values: each rank's own shards alone.

    Args:
        family: of the model.
        model: on the meta device; changed in place.
        device: where it will live.
        offload: parameters live in the machine's memory instead (FSDP's CPU offload).
        seed: see `initialise_weights`; the standard deviation is the configuration's `initializer_range`. `None` draws
            nothing: a checkpoint of ours is loaded next.
        weights: checked ones, read in place of first values; adapters, which they have not, are drawn.
    """
    model.to_empty(device="cpu" if offload else device)
    if offload:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(
                    name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
                )
    # What follows is undefined after `to_empty`, or no longer shared.
    model.tie_weights()
    family.reset_buffers(model)
    for layer in moe_layers(model).values():
        layer.reset_buffers()
    if weights is not None:
        weights.load(model, family.keys(model))
        if seed is not None:
            initialise_weights(model, seed, model.config.initializer_range, adapters_alone=True)
    elif seed is not None:
        initialise_weights(model, seed, model.config.initializer_range)
    else:
        for layer in moe_layers(model).values():
            for parameter in layer.experts.slot_parameters().values():
                local_part(parameter.detach()).zero_()  # A checkpoint has nothing for slots without an expert.


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model on any layout; slots without an expert do not count."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for layer in moe_layers(model).values():
        per_slot = sum(p.numel() for p in layer.experts.slot_parameters().values()) // layer.placement.num_rows
        total -= per_slot * (layer.placement.num_rows - layer.num_experts)
    return total
