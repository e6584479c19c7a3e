"""What a model is made of, by kinds of block: parameters and operations, read off the model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from crossdock.config import Config, ConfigError
from crossdock.lora import LoRAError, add_lora
from crossdock.models import FAMILIES, build_model, resolve_hf_config
from crossdock.moe import moe_layers
from crossdock.parallel import transformer_blocks

__all__ = ["BlockFacts", "ModelFacts", "UnknownModel", "plan_model", "read_model"]


class UnknownModel(ConfigError):
    """A model whose configuration does not say what a plan needs to know."""


@dataclass(frozen=True)
class BlockFacts:
    """One kind of transformer block; counts are of parameters.

    Attributes:
        count: blocks of this kind.
        matrices: dense ones with two dimensions or more but the router's; tensor parallelism splits these.
        rest: norms, biases, routers.
        slot: of one expert; 0 without experts.
        products: parameters that a token is multiplied by, but experts.
        first: the number of the first block of this kind.
        frozen, frozen_slot, frozen_products: of `dense`, `slot` and `products` those that are not trained.
    """

    count: int
    matrices: int
    rest: int
    slot: int
    products: int
    first: int
    frozen: int = 0
    frozen_slot: int = 0
    frozen_products: int = 0

    @property
    def dense(self) -> int:
        return self.matrices + self.rest


@dataclass(frozen=True)
class ModelFacts:
    """A whole model.

    Attributes:
        kinds: of blocks, in the order of their first ones.
        kind_of: of each block, its place in `kinds`.
        embedding, head: parameters of each; `head` 0 where they are one.
        ends_rest: the final norm's.
        num_experts, top_k: `E` and `K`.
        hidden_size, intermediate_size, shared_size: `H`, `I`, and that of experts that every token passes.
        num_heads, num_key_value_heads, head_dim: of attention.
        vocab_size: `V`.
        trains_ends: whether embedding, norm and head are trained.
    """

    kinds: tuple[BlockFacts, ...]
    kind_of: tuple[int, ...]
    embedding: int
    head: int
    ends_rest: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    trains_ends: bool = True

    @property
    def num_layers(self) -> int:
        return len(self.kind_of)

    @property
    def num_moe_layers(self) -> int:
        return sum(kind.count for kind in self.kinds if kind.slot)

    @property
    def num_parameters(self) -> int:
        blocks = sum(kind.count * (kind.dense + kind.slot * self.num_experts) for kind in self.kinds)
        return blocks + self.embedding + self.head + self.ends_rest

    @property
    def expert_parameters(self) -> int:
        return sum(kind.count * kind.slot * self.num_experts for kind in self.kinds)

    @property
    def active_parameters(self) -> int:
        """Of a token: without the experts that it does not go to."""
        return self.num_parameters - sum(k.count * k.slot * (self.num_experts - self.top_k) for k in self.kinds)

    def block_flops(self, kind: BlockFacts, seq_len: int) -> tuple[float, float]:
        """Of a token in one block, forward and backward: without experts, and in experts.

        As `crossdock.train.flops` counts: `6 N`, and `12 A D S / 2` for causal attention.
        """
        attention = 12 * self.num_heads * self.head_dim * seq_len / 2
        return 6 * kind.products + attention, 6 * kind.slot * self.top_k

    def frozen_flops(self, kind: BlockFacts) -> tuple[float, float]:
        """Of these, what products for gradients of weights that are not trained would take, and nobody computes."""
        return 2 * kind.frozen_products, 2 * kind.frozen_slot * self.top_k

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of a token, forward and backward."""
        blocks = sum(kind.count * sum(self.block_flops(kind, seq_len)) for kind in self.kinds)
        return blocks + 6 * (self.head or self.embedding)


def plan_model(config: Config) -> PreTrainedModel:
    """The model of a run, whole, on the meta device: with its adapters, and what is frozen.

    Raises:
        ConfigError: for adapters that it cannot have.
    """
    training = config.training
    model = build_model(
        FAMILIES[config.model.name],
        resolve_hf_config(config.run_model),
        config.moe,
        torch.float64 if training.dtype == "float64" else torch.float32,
        attn_implementation="sdpa",  # of the same parameters, and here everywhere
        force_load_balance=training.debug_moe_force_load_balance,
    )
    for layer in moe_layers(model).values():
        if layer.router is not None:
            layer.router.requires_grad_(not training.freeze_router)
        layer.experts.requires_grad_(not training.freeze_experts)
    if config.lora.rank:
        try:
            add_lora(model, config.lora, FAMILIES[config.model.name].attention)
        except LoRAError as error:
            raise ConfigError(f"lora.{error.field}", error.value, error.valid) from None
    return model


def read_model(model: PreTrainedModel) -> ModelFacts:
    """The facts of a model from `plan_model`.

    Raises:
        UnknownModel: where its configuration has no number of heads or tokens, as the family names these.
    """
    blocks = transformer_blocks(model)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(_signature(block), []).append(index)
    facts = [_block_facts(blocks[indices[0]], indices) for indices in kinds.values()]
    place = {index: number for number, indices in enumerate(kinds.values()) for index in indices}
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    embedding = model.get_input_embeddings().get_parameter("weight")
    output: Any = model.get_output_embeddings()
    head = 0 if output is None or output.weight is embedding else output.weight.numel()
    ends = {id(p): p.numel() for p in model.parameters() if id(p) not in in_blocks}
    layer = next(iter(moe_layers(model).values()))
    text: Any = model.config.get_text_config()
    for name in ("num_attention_heads", "vocab_size", "hidden_size"):
        if not isinstance(getattr(text, name, None), int):
            valid = f"a plan needs {name}, which the configuration of a {text.model_type} has not"
            raise UnknownModel("model.hf_assets_path", model.config.name_or_path, valid)
    heads = text.num_attention_heads
    rows = layer.experts.slot_parameters()
    return ModelFacts(
        kinds=tuple(facts),
        kind_of=tuple(place[index] for index in range(len(blocks))),
        embedding=embedding.numel(),
        head=head,
        ends_rest=sum(ends.values()) - embedding.numel() - head,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        hidden_size=layer.hidden_size,
        intermediate_size=rows["down_projs"].shape[1],
        num_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        trains_ends=embedding.requires_grad,
    )


def _signature(block: nn.Module) -> tuple[Any, ...]:
    layer_type = getattr(block, "attention_type", None) or getattr(block, "layer_type", None)
    return layer_type, *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _block_facts(block: nn.Module, indices: list[int]) -> BlockFacts:
    layers = list(moe_layers(block).values())
    experts = {id(p): p for layer in layers for p in layer.experts.slot_parameters().values()}
    routers = {id(p) for layer in layers if layer.router is not None for p in layer.router.parameters()}
    dense = [p for p in block.parameters() if id(p) not in experts]
    matrices = sum(p.numel() for p in dense if p.ndim > 1 and id(p) not in routers)
    products = sum(p.numel() for p in dense if p.ndim > 1)
    slot = sum(p.numel() // p.shape[0] for p in experts.values())
    frozen = [p for p in dense if not p.requires_grad]
    return BlockFacts(
        len(indices),
        matrices,
        sum(p.numel() for p in dense) - matrices,
        slot,
        products,
        indices[0],
        sum(p.numel() for p in frozen),
        sum(p.numel() // p.shape[0] for p in experts.values() if not p.requires_grad),
        sum(p.numel() for p in frozen if p.ndim > 1),
    )
