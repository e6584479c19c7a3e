"""Names and views of parameters by logical expert, so that a checkpoint does not know where experts lived."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from crossdock.moe import moe_layers
from crossdock.parallel import plain_name
from crossdock.placement import EMPTY

__all__ = ["ExpertRows"]


class ExpertRows:
    """The experts' parameters of a model: which rows of which parameter are which logical experts.

    Args:
        model: on any layout.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            parameter: layer for layer in moe_layers(model).values() for parameter in layer.experts.parameters()
        }

    def split(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """`tensor`, laid out as `parameter` is, under the names it has in a checkpoint.

        A dense parameter keeps its name. An expert's rows are `name.e` for each logical expert `e` of this rank:
        views of `tensor`, sharded over the ranks that share the expert, or plain where one rank has it whole.
        """
        layer = self._layers.get(parameter)
        if layer is None:
            yield plain_name(name), tensor
            return
        for slot, expert in enumerate(layer.local_expert_ids):
            if expert != EMPTY:
                yield f"{plain_name(name)}.{expert}", _row(tensor, slot)

    def all_names(self, name: str, parameter: nn.Parameter) -> list[str]:
        """What `split` yields over all ranks together."""
        layer = self._layers.get(parameter)
        experts = [] if layer is None else range(layer.num_experts)
        return [f"{plain_name(name)}.{expert}" for expert in experts] or [plain_name(name)]


def _row(tensor: Tensor, slot: int) -> Tensor:
    """Row `slot` of this rank's part of an expert tensor `[P/R, A, B]`: `[A, B]`, sharded over rows or whole."""
    if not isinstance(tensor, DTensor):
        return tensor[slot]
    row = tensor.to_local()[slot]
    names = tensor.device_mesh.mesh_dim_names or ()
    sharded = [name for name, placement in zip(names, tensor.placements, strict=True) if placement == Shard(1)]
    if not sharded:
        return row
    mesh = tensor.device_mesh[sharded[0]] if tensor.device_mesh.ndim > 1 else tensor.device_mesh
    shape = tensor.shape[1:]
    return DTensor.from_local(row, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
