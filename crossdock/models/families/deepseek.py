"""DeepSeek-V2 and V3: group-limited routing, shared experts (arXiv 2405.04434, 2412.19437)."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from crossdock.models.families.parts import QWEN_KEYS, gated_block, sigmoid_router
from crossdock.models.family import GATED, Block, Family
from crossdock.parallel import Region
from crossdock.routing import RouterConfig

__all__ = ["DEEPSEEK_V3_KEYS", "DeepseekV2", "DeepseekV3"]

DEEPSEEK_V3_KEYS = replace(
    QWEN_KEYS,
    renamed=(*QWEN_KEYS.renamed, (".mlp.router.expert_bias", ".mlp.gate.e_score_correction_bias")),
    expert_bias=True,
)


LATENT_ATTENTION = Region(columns=("q_proj", "q_b_proj", "kv_b_proj"), rows=("o_proj",))
"""What makes heads of a compressed vector is split; what compresses is whole on every rank."""


class DeepseekV2(Family):
    """Adapter of the family `deepseek_v2`: softmax, groups by their largest score."""

    name = "deepseek_v2"
    model_type = "deepseek_v2"
    block = "DeepseekV2Moe"
    norm = "DeepseekV2RMSNorm"
    tensor_regions = MappingProxyType({"self_attn": LATENT_ATTENTION, "mlp": GATED})
    hf_keys = QWEN_KEYS

    def router(self, config: Any) -> RouterConfig:
        """How a block's router decides."""
        limited = config.topk_method == "group_limited_greedy"
        return RouterConfig(
            config.n_routed_experts,
            config.num_experts_per_tok,
            norm_topk_prob=False,
            routed_scaling_factor=config.routed_scaling_factor,
            n_group=config.n_group if limited else 1,
            topk_group=config.topk_group if limited else 1,
            group_score="max",
        )

    def read_block(self, block: Any, config: Any) -> Block:
        return gated_block(
            block,
            config,
            self.router(config),
            expert_bias=getattr(block.gate, "e_score_correction_bias", None),
            shared=block.shared_experts,
        )


class DeepseekV3(DeepseekV2):
    """Adapter of the family `deepseek_v3`: sigmoid and an expert bias."""

    name = "deepseek_v3"
    model_type = "deepseek_v3"
    block = "DeepseekV3MoE"
    norm = "DeepseekV3RMSNorm"
    hf_keys = DEEPSEEK_V3_KEYS

    def router(self, config: Any) -> RouterConfig:
        return sigmoid_router(config)
