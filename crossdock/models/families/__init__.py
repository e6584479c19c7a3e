"""The model families that there is an adapter for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from crossdock.models.families.deepseek import DeepseekV2, DeepseekV3
from crossdock.models.families.glm4 import Glm4
from crossdock.models.families.gpt_oss import GptOss
from crossdock.models.families.llama4 import Llama4
from crossdock.models.families.minimax import MiniMaxM2
from crossdock.models.families.mixtral import Mixtral
from crossdock.models.families.olmoe import Olmoe
from crossdock.models.families.qwen2 import Qwen2
from crossdock.models.families.qwen3 import Qwen3
from crossdock.models.families.qwen3_next import Qwen3Next
from crossdock.models.family import Family
from crossdock.models.generic import Generic

__all__ = ["FAMILIES"]

_ALL: tuple[Family, ...] = (
    DeepseekV2(),
    DeepseekV3(),
    Glm4(),
    GptOss(),
    Llama4(),
    MiniMaxM2(),
    Mixtral(),
    Olmoe(),
    Qwen2(),
    Qwen3(),
    Qwen3Next(),
    Generic(),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})
"""Each family by its name in `model.name`."""
