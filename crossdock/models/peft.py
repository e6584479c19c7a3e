"""Adapters in PEFT's format, in and out, on any layout (docs/finetune.md, "What the adapter holds").

PEFT's `target_parameters` keep an adapter of all experts of a layer in two matrices: `lora_A [E r, in]`, expert after
expert, and `lora_B [out, r E]`, in which the expert runs fastest. Of the two parameters of one module the first
product's are below `experts.base_layer`, the second's below `experts`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock.checkpoint import DTYPES, CheckpointError, in_short, replace_folder, what_is_not_finite
from crossdock.comm import raise_together
from crossdock.experts import halves_apart
from crossdock.lora import LoRAConfig, LoRALinear
from crossdock.models.family import Family
from crossdock.moe import MoE, moe_layers
from crossdock.parallel import local_with_offsets, plain_name
from crossdock.placement import EMPTY

__all__ = ["PeftAdapter", "save_peft_adapter"]

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What changes how an adapter acts, and what ours have.
_MEANING: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "exclude_modules": (None, []),
    "loftq_config": (None, {}),
    # What the others begin with is taken off the weights beside the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
# PEFT's own, where the file says nothing.
_DEFAULTS = {"r": 8, "lora_alpha": 8}
# What says nothing of that; a setting that is none of all these must be off.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout"),
    *("target_modules", "target_parameters", "peft_version", "ensure_weight_tying", "megatron_core"),
    *("qalora_group_size", "runtime_config"),
}


class _Stored(NamedTuple):
    """One parameter, and how PEFT stores it.

    Attributes:
        name: of the tensor there.
        parameter: here, on any layout.
        layer: whose experts' it is; `None` for a linear layer's, which is stored as it is.
        is_a: whether it is stored as `lora_A` is.
        interleaved: whether gate and up take turns there.
    """

    name: str
    parameter: nn.Parameter
    layer: MoE | None = None
    is_a: bool = False
    interleaved: bool = False

    @property
    def shape(self) -> list[int]:
        if self.layer is None:
            return list(self.parameter.shape)
        _, size, rank = self.parameter.shape
        rows = self.layer.num_experts * rank
        return [rows, size] if self.is_a else [size, rows]

    def to_peft(self, experts: Tensor) -> Tensor:
        """`[E, n, r]` as it is stored."""
        if self.interleaved:
            experts = torch.stack(experts.chunk(2, dim=1), dim=2).flatten(1, 2)
        return experts.mT.flatten(0, 1) if self.is_a else experts.permute(1, 2, 0).flatten(1, 2)

    def from_peft(self, stored: Tensor) -> Tensor:
        """What is stored as `[E, n, r]`."""
        assert self.layer is not None
        rank, num_experts = self.parameter.shape[2], self.layer.num_experts
        if self.is_a:
            experts = stored.view(num_experts, rank, -1).mT
        else:
            experts = stored.view(-1, rank, num_experts).permute(2, 0, 1)
        return halves_apart(experts.mT).mT if self.interleaved else experts


def _stored(model: nn.Module, family: Family) -> list[_Stored]:
    """All adapters of `model`."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            there = _PREFIX + plain_name(path)
            found += [
                _Stored(f"{there}.lora_A.weight", module.lora_a),
                _Stored(f"{there}.lora_B.weight", module.lora_b),
            ]
    for path, layer in moe_layers(model).items():
        there, adapters = f"{_PREFIX}{plain_name(path)}.experts", layer.experts.adapters()
        for name, parameter in adapters._asdict().items() if adapters is not None else ():
            is_first, is_a = name.startswith("gate"), name.endswith("_a") != family.peft_swaps
            place = f"{there}.base_layer" if is_first else there
            interleaved = family.hf_keys.interleaved and name == "gate_and_up_lora_b"
            found.append(
                _Stored(f"{place}.lora_{'A' if is_a else 'B'}.weight", parameter, layer, is_a, interleaved)  # type: ignore[arg-type]
            )
    return found


@torch.no_grad()
def save_peft_adapter(
    model: nn.Module,
    family: Family,
    config: LoRAConfig,
    base: str,
    destination: Path,
    dtype: str = "",
    *,
    replace: bool = False,
) -> None:
    """Write the folder that `peft.PeftModel.from_pretrained` loads onto the base model. Collective; on any layout.

    It is written beside its final place and renamed when whole. The first rank holds all adapters for that.

    Args:
        model: with adapters.
        family: of the model.
        config: what they were made with.
        base: folder of the weights beside them, for the adapter's configuration.
        destination: must not exist, unless `replace`.
        dtype: torch's name of the tensors' dtype; empty: as they are.
        replace: remove what is at `destination`, when the new folder is whole.

    Raises:
        CheckpointError: on all ranks, if it exists or could not be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    # First of all, since it makes FSDP shard again what a forward pass has left gathered.
    model.state_dict()
    tensors = {}
    for stored in _stored(model, family):
        parameter = stored.parameter.detach()
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if rank == 0:
            if stored.layer is not None:
                whole = stored.to_peft(whole[torch.tensor(stored.layer.placement.expert_to_row)])
            kept = whole.to("cpu", getattr(torch, dtype) if dtype else None)
            tensors[stored.name] = kept.clone(memory_format=torch.contiguous_format)
    error: Exception | None = None
    if rank == 0:
        partial = destination.with_name(f".{destination.name}.partial")
        try:
            if destination.exists() and not replace:
                raise FileExistsError(0, "it exists; name another folder, or remove it")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(tensors, partial / _WEIGHTS_FILE, metadata={"format": "pt"})
            (partial / _CONFIG_FILE).write_text(json.dumps(_peft_config(model, config, base), indent=2) + "\n")
            replace_folder(partial, destination)
        except (OSError, SafetensorError) as caught:
            reason = getattr(caught, "strerror", None) or caught
            error = CheckpointError(f"cannot write the adapter to {destination}: {reason}")
    raise_together(error)


def _targets(model: nn.Module) -> dict[str, list[str]]:
    """By PEFT's setting, the paths of what has an adapter."""
    modules = [plain_name(path) for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    layers = [plain_name(path) for path, layer in moe_layers(model).items() if layer.experts.adapters() is not None]
    parameters = [f"{path}.experts.{name}" for path in layers for name in ("gate_up_proj", "down_proj")]
    return {"target_modules": modules, "target_parameters": parameters}


def _peft_config(model: nn.Module, config: LoRAConfig, base: str) -> dict[str, Any]:
    targets = _targets(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": sorted({_end(path, 2) for path in targets["target_modules"]}),
        "target_parameters": sorted({_end(path, 3) for path in targets["target_parameters"]}) or None,
    }


def _end(path: str, names: int) -> str:
    """The last `names` of a path: enough to tell it from all that is no target."""
    return ".".join(path.split(".")[-names:])


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's format; made by `open`, which reads the configuration and headers alone.

    Attributes:
        folder: holds both files.
        config: what adapter_config.json says.
        shapes: of the tensors, by name.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, list[int]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> PeftAdapter:
        """Read configuration and headers.

        Raises:
            CheckpointError: for a folder without an adapter, or files that cannot be read.
        """
        for name in (_CONFIG_FILE, _WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} holds no adapter in PEFT's format: it has no {name}")
        try:
            config = json.loads((folder / _CONFIG_FILE).read_text())
            if not isinstance(config, dict):
                raise ValueError("no table of settings")
            with safe_open(folder / _WEIGHTS_FILE, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: part.get_shape() for name, part in slices.items()}
                unread = [
                    f"{name} is {part.get_dtype()}" for name, part in slices.items() if part.get_dtype() not in DTYPES
                ]
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the adapter in {folder}: {error}") from None
        if unread:
            raise CheckpointError(f"cannot read the adapter in {folder}: {unread[0]}; {', '.join(DTYPES)} can be read")
        return cls(folder, config, shapes)

    def check(self, model: nn.Module, family: Family, config: LoRAConfig) -> None:
        """Compare with the adapters of `model`, which may be on the meta device, on any layout.

        Raises:
            CheckpointError: naming what differs: rank, scale, or tensors that are missing, unexpected or misshapen.
        """
        meaning = {**_MEANING, "r": (config.rank,), "lora_alpha": (config.alpha,)}
        problems = [
            f"{_CONFIG_FILE} has {key} {self.config.get(key, _DEFAULTS.get(key))!r}, not {values[0]!r}"
            for key, values in meaning.items()
            if self.config.get(key, _DEFAULTS.get(key, values[0])) not in values
        ]
        problems += [
            f"{_CONFIG_FILE} has {key} {value!r}, which is not known"
            for key, value in self.config.items()
            if key not in meaning and key not in _NEUTRAL and value is not None and value is not False
        ]
        for key, adapted in _targets(model).items():
            targets = self.config.get(key)
            if isinstance(targets, str):  # A pattern.
                continue
            ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) else ()
            missed = [path for path in adapted if not f".{path}".endswith(ends)]
            problems += [f"{_CONFIG_FILE} has {key} {targets}, without {path}" for path in missed[:1]]
        wanted = {stored.name: stored.shape for stored in _stored(model, family)}
        if wanted.keys().isdisjoint(self.shapes):
            problems.append(f"none of its {len(self.shapes)} tensors is one of the model's {len(wanted)}")
        else:
            problems += [f"{name} is missing" for name in sorted(wanted.keys() - self.shapes.keys())]
            problems += [f"{name} is unexpected" for name in sorted(self.shapes.keys() - wanted.keys())]
            problems += [
                f"{name} has shape {self.shapes[name]}, not {wanted[name]}"
                for name in sorted(wanted.keys() & self.shapes.keys())
                if self.shapes[name] != wanted[name]
            ]
        if problems:
            raise CheckpointError(f"the adapter in {self.folder} does not fit the model: {in_short(problems)}")

    @torch.no_grad()
    def load(self, model: nn.Module, family: Family) -> None:
        """Fill the adapters of `model` in place, after `check`. Slots without an expert become 0.

        Raises:
            CheckpointError: on all ranks, if a file could not be read on one, or holds NaN or infinity.
        """
        error: Exception | None = None
        try:
            with safe_open(self.folder / _WEIGHTS_FILE, framework="pt") as file:
                for stored in _stored(model, family):
                    values = file.get_tensor(stored.name)
                    if what := what_is_not_finite(values):
                        raise CheckpointError(f"{stored.name} {what}")
                    _fill(stored, values)
        except (OSError, RuntimeError, SafetensorError) as caught:
            error = CheckpointError(f"cannot read the adapter in {self.folder}: {caught}")
        raise_together(error)


def _fill(stored: _Stored, values: Tensor) -> None:
    """Copy what this rank has of a parameter."""
    local, offsets = local_with_offsets(stored.parameter.detach())
    if stored.layer is not None:
        values = stored.from_peft(values)
        slots = [
            values[expert] if expert != EMPTY else torch.zeros_like(values[0])
            for expert in stored.layer.local_expert_ids
        ]
        values, offsets = torch.stack(slots), (0, *offsets[1:])
    for dim, (offset, size) in enumerate(zip(offsets, local.shape, strict=True)):
        values = values.narrow(dim, offset, size)
    local.copy_(values)
