"""Routers of other families decide as transformers' own do: the same experts, the same weights."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from crossdock.routing import Router, RouterConfig

T, H, E, K = 400, 24, 16, 4
# Where transformers writes a family's sizes under several names.
_CONFIG = {
    "hidden_size": H,
    "num_experts": E,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "topk_method": "group_limited_greedy",
}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "expert_bias": True, **_GROUPS}
# family: (module of transformers, class of the router, what differs from `_CONFIG`, our settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Qwen2-MoE": ("qwen2_moe", "Qwen2MoeTopKRouter", {"norm_topk_prob": False}, {"norm_topk_prob": False}),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeTopKRouter", {}, {}),
    "OLMoE": ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, {"norm_topk_prob": False}),
    "Mixtral": ("mixtral", "MixtralTopKRouter", {}, {}),
    "DeepSeek-V2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {},
        {"group_score": "max", "norm_topk_prob": False, **_GROUPS},
    ),
    "DeepSeek-V2, greedy": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"topk_method": "greedy"},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3TopkRouter", {}, _SIGMOID),
    "DeepSeek-V3, unnormalised": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"norm_topk_prob": False},
        {"norm_topk_prob": False, **_SIGMOID},
    ),
    "GLM-4-MoE": ("glm4_moe", "Glm4MoeTopkRouter", {"n_routed_experts": E}, _SIGMOID),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {}, {"softmax_over": "chosen", "bias": True}),
}


def _peer(module: str, name: str, **config: Any) -> Any:
    """transformers' router with random weights and, where it has them, biases."""
    models = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    peer = getattr(models, name)(SimpleNamespace(**config))
    for tensor in (*peer.parameters(), *peer.buffers()):
        nn.init.normal_(tensor.data, std=0.5)
    return peer


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str) -> None:
    module, name, differs, settings = FAMILIES[family]
    torch.manual_seed(0)
    peer = _peer(module, name, **_CONFIG | differs)
    router = Router(H, RouterConfig(E, K, **settings))
    with torch.no_grad():
        router.weight.copy_(peer.weight)
        if router.bias is not None:
            router.bias.copy_(peer.bias)
        if router.expert_bias is not None:
            router.expert_bias.copy_(peer.e_score_correction_bias)
    x = torch.randn(T, H)
    routing = router(x)
    _, weights, expert_ids = peer(x)
    # Some of them leave a token's experts in any order.
    ours, theirs = routing.expert_ids.sort(dim=1), expert_ids.sort(dim=1)
    assert torch.equal(ours.values, theirs.values)
    torch.testing.assert_close(
        routing.weights.gather(1, ours.indices), weights.gather(1, theirs.indices), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("capacity_factor", [0.48, 1.0, 100.0])
def test_equals_switch_transformers_with_capacity(capacity_factor: float) -> None:
    torch.manual_seed(0)
    capacity = round(T / E * capacity_factor)  # Switch rounds down, we round up: both are whole here
    models = importlib.import_module("transformers.models.switch_transformers.modeling_switch_transformers")
    peer = models.SwitchTransformersTop1Router(
        SimpleNamespace(
            num_experts=E,
            expert_capacity=capacity,
            hidden_size=H,
            router_bias=False,
            router_jitter_noise=0.0,
            router_ignore_padding_tokens=False,
            router_dtype="float32",
        )
    )
    config = RouterConfig(E, 1, norm_topk_prob=False, capacity_factor=capacity_factor, drop_policy="position")
    router = Router(H, config)
    with torch.no_grad():
        router.weight.copy_(peer.classifier.weight)
    x = torch.randn(T, H)
    routing = router(x)
    one_hot, weights, _ = peer(x[None])
    kept = one_hot[0].bool().any(dim=-1)
    assert torch.equal(routing.expert_ids[:, 0], torch.where(kept, one_hot[0].argmax(dim=-1), -1))
    torch.testing.assert_close(routing.weights[:, 0], weights[0, :, 0] * kept, rtol=1e-6, atol=0)
    assert routing.dropped is not None
    assert int(routing.dropped) == int((~kept).sum())
    assert (capacity_factor == 100.0) == bool(kept.all())
