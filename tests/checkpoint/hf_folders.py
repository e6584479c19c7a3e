"""Folders in Hugging Face's format, taken apart and put together again in other ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["INDEX", "SINGLE", "differences", "mixed", "read_tensors", "snapshot", "write_shards"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files, and a check that the index, where there is one, tells of each."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in tensors, f"{name} is there twice"
                tensors[name], files[name] = file.get_tensor(name), path.name
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == files
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    else:
        assert set(files.values()) == {SINGLE}
    return tensors


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """Replace the weights in `folder`: `shards` files with an index, or one without; a layer is in several files."""
    for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        path.unlink()
    if shards == 1:
        save_file(dict(tensors), folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == shard}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def mixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """bfloat16 but for the routers, which are fp32; each begins with a negative zero and a subnormal number."""
    cast = {name: tensor if ".mlp.gate." in name else tensor.bfloat16() for name, tensor in tensors.items()}
    for tensor in cast.values():
        tensor.view(-1)[:2] = torch.tensor([-0.0, 1e-40]).to(tensor.dtype)
    return cast


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are not in both with the same dtype, shape and bits."""
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(_bits(ours[name]), _bits(theirs[name]))
    ]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
