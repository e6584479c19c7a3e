"""Names and views of parameters by logical expert, so that a checkpoint does not know where experts lived."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from crossdock.moe import moe_layers
from crossdock.parallel import as_shard, plain_name
from crossdock.placement import EMPTY

__all__ = ["ExpertRows", "expert_rows"]


class ExpertRows:
    """The experts' parameters of a model: which rows of which parameter are which logical experts.

    Args:
        model: on any layout.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            parameter: layer for layer in moe_layers(model).values() for parameter in layer.experts.parameters()
        }

    def is_expert(self, parameter: nn.Parameter) -> bool:
        """Whether `split` gives a parameter row by row."""
        return parameter in self._layers

    def split(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> dict[str, Tensor]:
        """`tensor` under the names it has in a checkpoint.

        A dense parameter keeps its name, and so does a scalar (an optimizer's count of steps). An expert's rows are
        `name.e` for each logical expert `e` of this rank: views of `tensor`, sharded over the ranks that share the
        expert, or plain where one rank has it whole.

        Args:
            name: of `parameter` in the model.
            parameter: an expert's or any other.
            tensor: the parameter itself or a state of the optimizer, laid out as `parameter` is; or a scalar.
        """
        layer = self._layers.get(parameter)
        if layer is None or tensor.ndim == 0:
            return {plain_name(name): tensor}
        rows = zip(layer.local_expert_ids, expert_rows(tensor), strict=True)
        return {f"{plain_name(name)}.{expert}": row for expert, row in rows if expert != EMPTY}

    def all_names(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> list[str]:
        """The names that `split` gives on all ranks together."""
        layer = self._layers.get(parameter)
        if layer is None or tensor.ndim == 0:
            return [plain_name(name)]
        return [f"{plain_name(name)}.{expert}" for expert in range(layer.num_experts)]


def expert_rows(tensor: Tensor) -> Iterator[Tensor]:
    """The rows of this rank's part of an expert tensor `[P/R, A, B]`: each `[A, B]`, sharded over `A` or whole."""
    if not isinstance(tensor, DTensor):
        yield from tensor
        return
    mesh, shape = tensor.device_mesh, tensor.shape[1:]
    names = mesh.mesh_dim_names or ()
    sharded = [name for name, placement in zip(names, tensor.placements, strict=True) if placement == Shard(1)]
    if not sharded:
        yield from tensor.to_local()
        return
    mesh = mesh[sharded[0]] if mesh.ndim > 1 else mesh
    for row in tensor.to_local():
        yield as_shard(row, mesh, (Shard(0),), shape)
