"""GLM-4-MoE: DeepSeek-V3's blocks behind grouped-query attention (arXiv 2508.06471)."""

from __future__ import annotations

from types import MappingProxyType

from crossdock.models.families.deepseek import DeepseekV3
from crossdock.models.family import GATED, GROUPED_QUERIES

__all__ = ["Glm4"]


class Glm4(DeepseekV3):
    """Adapter of the family `glm4`."""

    name = "glm4"
    model_type = "glm4_moe"
    block = "Glm4MoeMoE"
    norm = "Glm4MoeRMSNorm"
    tensor_regions = MappingProxyType({"self_attn": GROUPED_QUERIES, "mlp": GATED})
