"""A MoE model made of a dense one: experts are copies of the dense block, routers are drawn (arXiv 2212.05055)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import CheckpointError, HFCheckpoint, Reader, Stored, views_of
from crossdock.models.families import FAMILIES
from crossdock.models.family import Family, read_hf_config
from crossdock.models.initial import draw_row

__all__ = ["UPCYCLED", "upcycled_config", "upcycled_weights"]


@dataclass(frozen=True)
class _Sibling:
    """The family whose model is a dense one's but for the blocks.

    Attributes:
        family: its name.
        needs: what the dense configuration must say, since the family's model computes nothing else.
        dropped: what it says beside, and the family's has no use for.
        settings: of the family's blocks, from (E, K, the dense block's inner size).
    """

    family: str
    needs: Mapping[str, Any]
    dropped: Sequence[str]
    settings: Callable[[int, int, int], Mapping[str, Any]]


def _qwen3(num_experts: int, top_k: int, size: int) -> Mapping[str, Any]:
    sizes = {"num_experts": num_experts, "num_experts_per_tok": top_k, "moe_intermediate_size": size}
    return sizes | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _mixtral(num_experts: int, top_k: int, size: int) -> Mapping[str, Any]:
    return {"num_local_experts": num_experts, "num_experts_per_tok": top_k}


_BIASES = {"attention_bias": False, "mlp_bias": False}
UPCYCLED: Mapping[str, _Sibling] = MappingProxyType(
    {
        "llama": _Sibling("mixtral", _BIASES, (*_BIASES, "pretraining_tp"), _mixtral),
        "mistral": _Sibling("mixtral", {}, (), _mixtral),
        "qwen3": _Sibling("qwen3", {"use_sliding_window": False}, ("layer_types", "max_window_layers"), _qwen3),
    }
)
"""By the `model_type` of a dense model. All normalise a token's weights: equal experts give what it gives."""

# Of the file, not of the model.
_OF_THE_FILE = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


def upcycled_config(folder: Path, model_type: str, num_experts: int, top_k: int) -> tuple[Family, PreTrainedConfig]:
    """The family and the configuration of the MoE model that the dense one in `folder` becomes.

    Args:
        folder: has a config.json.
        model_type: that it names, of `UPCYCLED`.
        num_experts: `E`, of each layer.
        top_k: `K`, experts per token.

    Raises:
        ValueError: where the dense configuration asks for what the family does not compute.
    """
    sibling = UPCYCLED[model_type]
    dense = read_hf_config(folder)
    family = FAMILIES[sibling.family]
    for name, value in sibling.needs.items():
        if getattr(dense, name) != value:
            raise ValueError(
                f"its config.json has {name} {getattr(dense, name)!r}; {family.model_type} has {value!r} alone"
            )
    fields = {name: value for name, value in dense.to_dict().items() if name not in (*_OF_THE_FILE, *sibling.dropped)}
    settings = sibling.settings(num_experts, top_k, dense.intermediate_size)
    config = CONFIG_MAPPING[family.model_type](**fields, **settings)
    for name, value in fields.items():
        if getattr(config, name, None) != value:
            raise ValueError(f"its config.json has {name} {value!r}, which {family.model_type} does not know")
    return family, config


def upcycled_weights(dense: HFCheckpoint, model: PreTrainedModel, family: Family, seed: int) -> HFCheckpoint:
    """The MoE model's weights, read from the dense one's.

    Args:
        dense: the dense model's.
        model: the MoE model, on the meta device.
        family: of the MoE model.
        seed: of the routers, from N(0, initializer_range^2) as for a new model.

    Raises:
        CheckpointError: for weights that are missing, unexpected or misshapen.
    """
    tensors: dict[str, Stored] = {}
    used: set[str] = set()
    keys = family.keys(model)
    for name, expert, view in views_of(model, keys):
        module = name.rpartition(".experts.")[0]
        for part in keys.parts(name, expert, view.shape):
            if name.endswith(".router.weight"):
                like = f"{name.removesuffix('.router.weight')}.gate_proj.weight"
                if like in dense.tensors:
                    shape, std = tuple(view.shape), model.config.initializer_range
                    tensors[part.name] = _Drawn(shape, dense.tensors[like].dtype, seed, name, std)
                continue
            theirs = part.name
            if expert is not None:
                matrix = "down" if part.columns is None else "up" if part.columns.start else "gate"
                theirs = f"{module}.{matrix}_proj.weight"
            if theirs not in dense.tensors:
                raise CheckpointError(f"weights in {dense.folder} do not fit the model: {theirs} is missing")
            tensors[part.name] = dense.tensors[theirs]
            used.add(theirs)
    # What is left is checked too: the dense model must have nothing that the other one has not.
    left = {name: stored for name, stored in dense.tensors.items() if name not in used and name not in tensors}
    HFCheckpoint(dense.folder, tensors | left).check(model, keys)
    return HFCheckpoint(dense.folder, tensors)


class _Drawn(Stored):
    """A router's weight `[E, H]`, row by row as `initialise_weights` draws it."""

    def __init__(self, shape: tuple[int, ...], dtype: str, seed: int, name: str, std: float) -> None:
        self.shape, self.dtype = shape, dtype
        self._row = lambda row: draw_row(shape[1:], seed, name, row) * std

    def read(self, files: Reader, bounds: Sequence[tuple[int, int]]) -> Tensor:
        (first, last), columns = bounds
        return torch.stack([self._row(row) for row in range(first, last)])[:, slice(*columns)]
