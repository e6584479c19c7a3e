"""What several families share: names in checkpoints, how blocks lie, how routers decide."""

from __future__ import annotations

from typing import Any

from crossdock.checkpoint import HFKeys
from crossdock.experts import ExpertParams
from crossdock.models.family import Block, formula_of
from crossdock.routing import RouterConfig

__all__ = ["MIXTRAL_KEYS", "QWEN_KEYS", "SHARED_KEYS", "gated_block", "sigmoid_router", "softmax_router"]

_GATE = (".mlp.router.weight", ".mlp.gate.weight")

QWEN_KEYS = HFKeys(renamed=(_GATE,))
SHARED_KEYS = HFKeys(
    renamed=(
        _GATE,
        (".mlp.shared_experts.gate.weight", ".mlp.shared_expert_gate.weight"),
        (".mlp.shared_experts.", ".mlp.shared_expert."),
    )
)
MIXTRAL_KEYS = HFKeys(
    renamed=(
        (".mlp.router.weight", ".block_sparse_moe.gate.weight"),
        (".mlp.router.expert_bias", ".block_sparse_moe.e_score_correction_bias"),
        (".mlp.experts.", ".block_sparse_moe.experts."),
    ),
    gate="{}.w1.weight",
    up="{}.w3.weight",
    down="{}.w2.weight",
)


def gated_block(block: Any, config: Any, router: RouterConfig, **more: Any) -> Block:
    """A block with `gate` and `experts`, whose `gate_up_proj` is `[E, 2I, H]` and `down_proj` `[E, H, I]`; views.

    Args:
        block: transformers'.
        config: the model's.
        router: how it decides.
        more: what else the block has, of `Block`.
    """
    experts = ExpertParams(block.experts.gate_up_proj.mT, block.experts.down_proj.mT)
    return Block(router, block.gate.weight, experts, formula_of(config.hidden_act), **more)


def softmax_router(config: Any) -> RouterConfig:
    """Softmax before top-k, without groups; weights are normalised where the configuration says so."""
    return RouterConfig(config.num_experts, config.num_experts_per_tok, norm_topk_prob=config.norm_topk_prob)


def sigmoid_router(config: Any) -> RouterConfig:
    """DeepSeek-V3's: sigmoid, an expert bias, the best groups by their two largest scores."""
    return RouterConfig(
        config.n_routed_experts,
        config.num_experts_per_tok,
        "sigmoid",
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
        expert_bias=True,
        n_group=config.n_group,
        topk_group=config.topk_group,
    )
