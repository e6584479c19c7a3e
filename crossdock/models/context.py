"""Attention of transformers' models where ranks share sequences: whole sequences for a part of the heads."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from crossdock.parallel import ContextMethod, SequenceContext, local_part, transformer_blocks

__all__ = ["CONTEXT_ATTENTION", "UnknownAttention", "accept_context_parallel", "mask_documents"]

CONTEXT_ATTENTION = "crossdock_context"
"""The name under which transformers finds `context_attention`."""

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class UnknownAttention(ValueError):
    """What a model does over positions, of which a rank that has a part of them would compute something else."""


def accept_context_parallel(model: PreTrainedModel, method: ContextMethod = "ulysses") -> PreTrainedModel:
    """Let `model` take a rank's part of every sequence, in place, once `apply_cp` or `parallelize` names the ranks.

    Every rank calls it with its own positions (`SequenceContext`) of `input_ids` `[B, S/R]` and whatever else has
    them, and gets logits for these. `position_ids` count in the whole sequence; where they start again in a row, its
    documents do not see each other. `attention_mask` may be `[B, S/R]` too, or that of whole sequences, made already.
    A cache and `labels`, which transformers would shift within the part, are refused.

    Args:
        model: of transformers, with its attention chosen: `sdpa`, `eager`, or one that is registered with a mask; not
            made parallel yet.
        method: `ring` is for plainly causal attention by `sdpa`: without windows, documents, padding and sinks.

    Raises:
        UnknownAttention: for layers that do more over positions than attend, or attention that cannot be split.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation == "flex_attention" or implementation not in (*AttentionInterface().valid_keys(), "eager"):
        raise UnknownAttention(f"attention {implementation!r}; use sdpa or eager")
    if method == "ring":
        _check_ring(config, implementation)
    if getattr(config, "attn_temperature_tuning", False):
        raise UnknownAttention("attn_temperature_tuning, which scales queries by where they are among the rank's own")
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    attentions = [module for block in transformer_blocks(model) for module in _attentions(block, sorted(others))]
    own_config = copy.deepcopy(model.config)
    own_config.get_text_config()._attn_implementation = CONTEXT_ATTENTION
    for module in attentions:
        module.sequence_context = SequenceContext(module.config.num_attention_heads, method)
        module.attention_of_heads = _attention(module, implementation)
    model.sequence_context = SequenceContext(config.num_attention_heads, method)
    configs = {id(model.config): own_config, id(config): own_config.get_text_config()}
    holders: list[Any] = [module for module in model.modules() if id(getattr(module, "config", None)) in configs]
    for module in holders:
        module.config = configs[id(module.config)]
    AttentionInterface.register(CONTEXT_ATTENTION, context_attention)

    def hand_over(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (), _of_whole_sequences(module, config, dict(zip(names, args, strict=False)) | kwargs)

    names = list(inspect.signature(model.forward).parameters)
    # Before a hook of `mask_documents`, which knows the part alone.
    model.register_forward_pre_hook(hand_over, with_kwargs=True, prepend=True)
    return model


def context_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention that the model had, of this rank's heads over whole sequences.

    Args:
        query: `[B, heads, S/R, D]`.
        key, value: `[B, key heads, S/R, D]`, the sizes of the two may differ.
        attention_mask: `[B, 1, S, S]`, or `None`, as the model's own attention takes it for whole sequences.

    Returns:
        `[B, S/R, heads, D]`; and no attention weights.
    """
    attention: Any = module
    context: SequenceContext = attention.sequence_context
    kwargs.pop("position_ids", None)  # Of the part; the mask has told already what they say.
    if context.method == "ring" and context.size > 1:
        if attention_mask is not None or kwargs.get("s_aux") is not None or kwargs.get("dropout"):
            raise ValueError("ring attention (cp) is plainly causal: without documents, padding, sinks and dropout")
        return context.ring(query, key, value, kwargs["scaling"]), None
    query, key, value = context.to_heads(query, key, value)
    replaced: dict[str, Any] = {"num_key_value_groups": query.shape[1] // key.shape[1]}
    if kwargs.get("s_aux") is not None:
        replaced["sinks"] = kwargs["s_aux"] = context.own_heads(local_part(kwargs["s_aux"]))
    output, _ = attention.attention_of_heads(_OwnHeads(module, replaced), query, key, value, attention_mask, **kwargs)
    return context.to_positions(output), None


class _OwnHeads:
    """An attention module for the functions that compute its attention, with what it holds for each head cut down."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._module, name)


def mask_documents(model: PreTrainedModel) -> None:
    """Let documents not see each other where `position_ids` start again, in a model whose own code does not look."""

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        position_ids = kwargs.get("position_ids")
        known = kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None
        if position_ids is not None and not known:
            masks = _masks(module, module.config.get_text_config(), len(_input(kwargs)), position_ids)
            kwargs = kwargs | {"attention_mask": masks}
        return args, kwargs

    model.register_forward_pre_hook(mask, with_kwargs=True)


def _attentions(block: nn.Module, others: list[str]) -> Iterator[Any]:
    """The modules of a block that attend; all of its mixing of positions is theirs."""
    found = [module for module in block.modules() if getattr(module, "is_causal", None) is True]
    beside = [name for module in block.modules() for name in _mixers(module, module in found)]
    if beside or others or not found:
        what = beside[0] if beside else type(block).__name__ + ("" if found else " without attention")
        raise UnknownAttention(f"{', '.join(others)} ({what})" if others else what)
    yield from found


def _check_ring(config: Any, implementation: str) -> None:
    """Refuse attention that torch's ring attention would not compute."""
    if implementation != "sdpa":
        raise UnknownAttention(f"attention {implementation!r} in a ring; use sdpa")
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None):
            raise UnknownAttention(f"{name} in a ring, which is plainly causal; use ulysses")
    if getattr(config, "kv_lora_rank", None):
        raise UnknownAttention("keys and values of different sizes in a ring; use ulysses")


def _mixers(module: nn.Module, attends: bool) -> Iterator[str]:
    """Names of what mixes positions in a module, or may do so in one that attends, beside projections and norms."""
    for child in module.children():
        if isinstance(child, nn.Conv1d):
            yield type(module).__name__
        elif attends and not isinstance(child, nn.Linear) and any(weight.ndim > 1 for weight in child.parameters()):
            yield type(child).__name__


def _attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The function of transformers that computes the attention of `module`."""
    if implementation != "eager":
        return AttentionInterface()[implementation]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnknownAttention(f"attention of {type(module).__name__}, which takes none of other names")
    return eager


def _of_whole_sequences(model: PreTrainedModel, config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass of a part, with the masks of whole sequences and positions in them."""
    context: Any = model.sequence_context
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ValueError("ranks share sequences (cp), without a cache: use_cache=False, or generate with cp 1")
    if kwargs.get("labels") is not None:
        raise ValueError(
            "ranks share sequences (cp), whose labels transformers would shift within each rank's part: compute the "
            "loss from the logits, with labels that were shifted before they were cut"
        )
    own = _input(kwargs)
    batch, length = own.shape[:2]
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        whole = torch.arange(length * context.size, device=own.device)[None]
        position_ids = whole[:, context.rank * length : (context.rank + 1) * length]
    else:
        whole = context.whole(position_ids)
    masks = kwargs.get("attention_mask")
    if masks is None or (isinstance(masks, Tensor) and masks.ndim == 2):
        padding = None if masks is None else context.whole(masks.long())
        if "flash" in config._attn_implementation and (padding is not None or bool((whole.diff() != 1).any())):
            raise ValueError("ranks share sequences (cp): flash attention would not see ends of documents, use sdpa")
        masks = _masks(model, config, batch, whole, padding)
    return kwargs | {"position_ids": position_ids, "attention_mask": masks, "use_cache": False}


def _input(kwargs: dict[str, Any]) -> Tensor:
    """`[B, S, ...]`."""
    own = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if own is None:
        raise ValueError("input_ids or inputs_embeds must be given")
    return own


def _masks(model: Any, config: Any, batch: int, position_ids: Tensor, padding: Tensor | None = None) -> Any:
    """What the model's own code would make of `position_ids` `[B, S]` and `padding` `[B, S]`, 1 where there is none.

    `None` where attention is plainly causal and its implementation needs no mask for that.
    """
    # A pipeline stage may have no embedding.
    weight: Any = getattr(model.get_input_embeddings(), "weight", None)
    dtype = next(model.parameters()).dtype if weight is None else weight.dtype
    sizes = position_ids.new_empty(batch, position_ids.shape[-1], 0, dtype=dtype)
    # What `generate` calls, too, which some models have their own of.
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return create(config, sizes, padding, None, position_ids=position_ids)
