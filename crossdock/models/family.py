"""What a model family has to say about itself, and the settings that choose one."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import HFKeys
from crossdock.experts import SWIGLU, ActivationName, ExpertParams, ExpertsFormula
from crossdock.models.loss import LossHead
from crossdock.models.norm import Kernels, NormFormula, build_norm
from crossdock.models.padding import accept_padding_mask
from crossdock.moe import MoE
from crossdock.moe_config import MoEConfig
from crossdock.parallel import Region, TensorPlan
from crossdock.routing import RouterConfig

__all__ = [
    "DEEPEP_SUFFIX",
    "GATED",
    "GROUPED_QUERIES",
    "Block",
    "ExpertSizes",
    "Family",
    "Kernels",
    "ModelConfig",
    "ModelError",
    "formula_of",
    "read_hf_config",
]

DEEPEP_SUFFIX = "-deepep"

GROUPED_QUERIES = Region(columns=("q_proj",), rows=("o_proj",), key_values=("k_proj", "v_proj"))
"""Attention with a projection each for queries, keys and values."""
GATED = Region(columns=("gate_proj", "up_proj"), rows=("down_proj",))
"""A gated feed-forward layer."""

# transformers' names of activations, and ours.
_ACTIVATIONS: Mapping[str, ActivationName] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "relu": "relu",
        "relu2": "relu_squared",
    }
)


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: which model is trained."""

    name: str = "qwen3"
    """Model family; `generic` for those of transformers that none is for."""
    flavor: str = ""
    """A named size of the family; a suffix `-deepep` chooses that dispatcher. Empty: config.json of hf_assets_path, or
    `debug` without one."""
    hf_assets_path: str = ""
    """Folder in Hugging Face's format with tokenizer and, where flavor is empty, config.json. Its weights are read with
    checkpoint.initial_load_in_hf alone."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention, by transformers' names. `flash_attention_*` need their package and a GPU."""
    kernels: Kernels = "none"
    """`liger` computes norms and the loss with liger-kernel, which must be installed."""


class ModelError(ValueError):
    """A `[model]` setting that names no model. `field` is the key, `value` what it holds, `valid` what would do."""

    def __init__(self, field: str, value: str, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


@dataclass(frozen=True)
class Block:
    """What an MoE block of transformers holds: views of its tensors, and what it computes.

    Attributes:
        router: how it decides.
        gate: the router's weight `[E, H]`.
        experts: as ours lie.
        formula: what an expert computes.
        gate_bias: on the router's logits `[E]`.
        expert_bias: on the choice alone `[E]`.
        shared: the experts that every token passes, with `gate_proj`, `up_proj` and `down_proj`.
        shared_gate: scales their output.
    """

    router: RouterConfig
    gate: Tensor
    experts: ExpertParams
    formula: ExpertsFormula = SWIGLU
    gate_bias: Tensor | None = None
    expert_bias: Tensor | None = None
    shared: nn.Module | None = None
    shared_gate: nn.Module | None = None


class ExpertSizes(NamedTuple):
    """`E`, `H` and `I` of the experts that a configuration asks for."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class Family(ABC):
    """An adapter for one Hugging Face model family: `read_block`, and some names. CONTRIBUTING.md says how to add one.

    Attributes:
        name: of `model.name`.
        model_type: in the family's config.json.
        block: name of transformers' class of an MoE block.
        norm: name of its class of RMSNorm, empty for none that can be replaced; `norm_formula` is what that computes.
        returns_scores: whether a block returns its router's scores too, as some models' code expects.
        own_attention: whether its attention is more than softmax of products, so that only transformers' own `eager`
            computes it on a CPU.
        attention: names of the modules that are attention, for LoRA.
        peft_swaps: whether PEFT takes an expert's inputs for its outputs: where transformers' experts are
            `[E, in, out]` without an attribute `is_transposed` that says so.
        tensor_regions, tensor_whole: what of a block tensor parallelism splits, or leaves whole (`TensorPlan`).
        hf_keys: how its checkpoints name their tensors.
        flavors: sizes by name, as arguments of the family's configuration class.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    block: ClassVar[str]
    norm: ClassVar[str] = ""
    norm_formula: ClassVar[NormFormula] = NormFormula()
    returns_scores: ClassVar[bool] = False
    own_attention: ClassVar[bool] = False
    attention: ClassVar[tuple[str, ...]] = ("self_attn",)
    peft_swaps: ClassVar[bool] = False
    tensor_regions: ClassVar[Mapping[str, Region]] = MappingProxyType({"self_attn": GROUPED_QUERIES, "mlp": GATED})
    tensor_whole: ClassVar[tuple[str, ...]] = ()
    hf_keys: ClassVar[HFKeys]
    flavors: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    @abstractmethod
    def read_block(self, block: Any, config: Any) -> Block:
        """What a block of class `block` holds, `config` being the text model's configuration."""

    def expert_sizes(self, config: Any) -> ExpertSizes:
        """Of a configuration of this family, by the names that transformers has for them."""
        counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        size = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return ExpertSizes(next(count for count in counts if count is not None), config.hidden_size, size)

    def tensor_plan(self, config: Any) -> TensorPlan:
        """What tensor parallelism splits of a model with this configuration."""
        text = config.get_text_config()
        return TensorPlan(text.num_attention_heads, text.num_key_value_heads, self.tensor_regions, self.tensor_whole)

    def keys(self, model: PreTrainedModel) -> HFKeys:
        """How a checkpoint of `model`, from `adapt`, names its tensors.

        Raises:
            CheckpointError: where that cannot be read and written.
        """
        return self.hf_keys

    def hf_config(self, flavor: str) -> PreTrainedConfig:
        """The configuration of a flavor."""
        return CONFIG_MAPPING[self.model_type](**self.flavors[flavor])

    def hf_config_from(self, folder: Path) -> PreTrainedConfig:
        """The configuration in `folder/config.json`."""
        return read_hf_config(folder)

    def build(self, hf_config: PreTrainedConfig) -> PreTrainedModel:
        """The family's transformers model with the attention that its configuration names, on the default device."""
        attention = hf_config._attn_implementation
        return AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, dtype=torch.float32)

    def adapt(
        self, model: PreTrainedModel, moe: MoEConfig, *, kernels: Kernels = "none", force_load_balance: bool = False
    ) -> PreTrainedModel:
        """Replace, in place and values kept, the MoE blocks by `crossdock.MoE`, norms by ones that keep float64 (or by
        Liger's) and the output projection by a `LossHead`; let it take a `padding_mask`."""
        # The auxiliary losses are ours, so that transformers need not collect logits that no module of its own makes.
        model.config.output_router_logits = False
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == self.block:
                    block = self.read_block(child, model.config)
                    router = replace(block.router, force_load_balance=force_load_balance)
                    setattr(module, name, _moe(replace(block, router=router), moe, self.returns_scores))
                elif type(child).__name__ == self.norm:
                    setattr(module, name, build_norm(cast(Any, child), self.norm_formula, kernels))
        model.set_output_embeddings(LossHead(cast(nn.Linear, model.get_output_embeddings()), kernels))
        accept_padding_mask(model)
        return model

    def reset_buffers(self, model: nn.Module) -> None:
        """Compute non-persistent buffers (rotary frequencies) again, after `to_empty`."""
        for module in model.modules():
            if module._non_persistent_buffers_set and type(module).__name__.endswith("RotaryEmbedding"):
                with torch.device("cpu"):
                    fresh = type(module)(cast(Any, module).config)
                for name, buffer in fresh.named_buffers():
                    module.get_buffer(name).copy_(buffer)


def read_hf_config(folder: Path) -> PreTrainedConfig:
    """transformers' own configuration in `folder/config.json`: code that a folder brings along is never run.

    Raises:
        ValueError: for a model that has no other code; whatever transformers raises for a file that it cannot read.
    """
    written = json.loads((folder / "config.json").read_text())
    model_type = written.get("model_type")
    if written.get("auto_map") and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"it names code of its own (auto_map), which is never run, and transformers knows no model_type "
            f"{model_type!r}"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # transformers' own classes are taken in any case; nothing that is written later names that code again.
    config.__dict__.pop("auto_map", None)
    return config


def formula_of(activation: str, **settings: Any) -> ExpertsFormula:
    """The experts' formula with transformers' name of an activation.

    Raises:
        ValueError: for one that ours have not.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {activation!r}; experts compute {', '.join(_ACTIVATIONS)}")
    return ExpertsFormula(_ACTIVATIONS[activation], **settings)


@torch.no_grad()
def _moe(block: Block, config: MoEConfig, returns_scores: bool) -> MoE:
    """The block as a `MoE` of the same device and dtype."""
    intermediate_size, hidden_size = block.experts.down_projs.shape[1:]
    shared: Any = block.shared
    with block.gate.device:
        layer = MoE(
            hidden_size,
            intermediate_size,
            block.router,
            config,
            formula=block.formula,
            bias=block.experts.down_bias is not None,
            shared_intermediate_size=0 if shared is None else shared.up_proj.weight.shape[0],
            shared_gate=block.shared_gate is not None,
        ).to(block.experts.down_projs.dtype)
    layer.router.weight.copy_(block.gate)
    for ours, theirs in ((layer.router.bias, block.gate_bias), (layer.router.expert_bias, block.expert_bias)):
        if ours is not None and theirs is not None:
            ours.copy_(theirs)
    for name, tensor in block.experts._asdict().items():
        if tensor is not None:
            getattr(layer.experts, name).copy_(tensor)
    if layer.shared_experts is not None and shared is not None:
        layer.shared_experts.load_state_dict(shared.state_dict(), strict=False)
        if layer.shared_experts.gate is not None and block.shared_gate is not None:
            layer.shared_experts.gate.load_state_dict(block.shared_gate.state_dict())
    if returns_scores:
        layer.register_forward_hook(lambda module, args, y: (y, None))
    return layer
