"""Qwen3-MoE written down once more, in plain loops of float64, from the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

__all__ = ["qwen3_logits"]


def qwen3_logits(
    tensors: Mapping[str, Tensor], config: Qwen3MoeConfig, input_ids: Tensor, biases: Sequence[Tensor] = ()
) -> Tensor:
    """`input_ids [B, S]` to logits `[B, S, V]` (arXiv 2505.09388; names and layouts as in the published weights).

    `biases`, one `[E]` per MoE layer, are added to the scores where experts are chosen (arXiv 2408.15664).
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x = weights["model.embed_tokens.weight"][input_ids]
    dense = config.mlp_only_layers or []
    bias_of_layer = iter(biases or [torch.zeros(config.num_experts)] * config.num_hidden_layers)
    for index in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        x = x + _attention(layer, config, _norm(x, layer["input_layernorm.weight"], config))
        h = _norm(x, layer["post_attention_layernorm.weight"], config)
        x = x + (_swiglu(layer, "mlp", h) if index in dense else _experts(layer, config, h, next(bias_of_layer)))
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return _norm(x, weights["model.norm.weight"], config) @ head.T


def _norm(x: Tensor, weight: Tensor, config: Qwen3MoeConfig) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def _attention(layer: Mapping[str, Tensor], config: Qwen3MoeConfig, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    size = config.head_dim
    heads = {}
    for kind in "qkv":
        split = (x @ layer[f"self_attn.{kind}_proj.weight"].T).view(batch, length, -1, size)
        if kind != "v":
            split = _rotate(_norm(split, layer[f"self_attn.{kind}_norm.weight"], config), config)
        heads[kind] = split
    outputs = []
    shared_by = config.num_attention_heads // config.num_key_value_heads
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for head in range(config.num_attention_heads):
        q, k, v = heads["q"][:, :, head], heads["k"][:, :, head // shared_by], heads["v"][:, :, head // shared_by]
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(future, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1) @ layer["self_attn.o_proj.weight"].T


def _rotate(x: Tensor, config: Qwen3MoeConfig) -> Tensor:
    """Rotary embedding of `[B, S, heads, D]`: the pairs are (d, d + D/2). The table of angles is fp32 by definition."""
    half = config.head_dim // 2
    theta = (config.rope_parameters or {}).get("rope_theta", 10_000.0)
    frequencies = 1 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _swiglu(layer: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up = (x @ layer[f"{name}.{kind}_proj.weight"].T for kind in ("gate", "up"))
    return (gate * gate.sigmoid() * up) @ layer[f"{name}.down_proj.weight"].T


def _experts(layer: Mapping[str, Tensor], config: Qwen3MoeConfig, x: Tensor, bias: Tensor) -> Tensor:
    scores = (x @ layer["mlp.gate.weight"].T).softmax(-1)
    experts = (scores + bias).topk(config.num_experts_per_tok).indices
    chosen = scores.gather(-1, experts)
    if config.norm_topk_prob:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    output = torch.zeros_like(x)
    for expert in range(config.num_experts):
        share = (chosen * (experts == expert)).sum(-1, keepdim=True)
        output = output + share * _swiglu(layer, f"mlp.experts.{expert}", x)
    return output
