"""Mixtral: softmax over all, the weights of the chosen normalised (arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

from crossdock.models.families.parts import MIXTRAL_KEYS, gated_block
from crossdock.models.family import Block, Family
from crossdock.routing import RouterConfig

__all__ = ["Mixtral"]


class Mixtral(Family):
    """Adapter of the family `mixtral`. Jitter reaches the router alone; in transformers it reaches the experts too."""

    name = "mixtral"
    model_type = "mixtral"
    block = "MixtralSparseMoeBlock"
    norm = "MixtralRMSNorm"
    hf_keys = MIXTRAL_KEYS

    def read_block(self, block: Any, config: Any) -> Block:
        router = RouterConfig(
            config.num_local_experts, config.num_experts_per_tok, input_jitter=config.router_jitter_noise
        )
        return gated_block(block, config, router)
