"""What a rank has of a parameter, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["as_shard", "as_shards", "local_part", "local_with_offsets"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_with_offsets(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part, and where it starts in the whole, in each dimension."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offsets)


def as_shard(local: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size) -> DTensor:
    """`local` as a rank's part of a DTensor of `shape`: a view, on whatever device `local` is.

    `DTensor.from_local` would copy what FSDP has offloaded to the mesh's device, so that writing to it were lost.
    """
    return as_shards((local,), mesh, placements, shape)[0]


def as_shards(
    parts: Sequence[Tensor], mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size
) -> list[DTensor]:
    """`as_shard` of tensors that are alike, in less time: they share what says how they are laid out."""
    stride = tuple(torch.empty(shape, device="meta").stride())
    spec = DTensorSpec(mesh, placements, TensorMeta(shape, stride, parts[0].dtype))
    return [DTensor(local, spec, requires_grad=False) for local in parts]  # type: ignore[call-arg]
