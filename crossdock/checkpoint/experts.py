"""Names and views of parameters by logical expert, so that a checkpoint does not know where experts lived."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from crossdock.experts import UnpackedExperts
from crossdock.lora import base_of
from crossdock.moe import moe_layers
from crossdock.parallel import as_shards, plain_name, stages_of
from crossdock.placement import EMPTY

__all__ = ["ExpertRows", "expert_rows"]


class ExpertRows:
    """The experts' parameters of a model: which rows of which parameter are which logical experts.

    Experts that are modules have a name for each anyway; only those on other ranks are missing here.

    Args:
        model: on any layout.

    Attributes:
        unpacked: names of the parameters of this rank's experts that are modules.
        elsewhere: names and shapes of the parameters of such experts on other ranks.
        buffers_elsewhere: names of their buffers that belong in a checkpoint.
        of_other_stages: names and shapes, row by row, of the parameters that other pipeline stages have.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {}
        self.unpacked: set[str] = set()
        self.elsewhere: dict[str, torch.Size] = {}
        self.buffers_elsewhere: list[str] = []
        for layer_name, layer in moe_layers(model).items():
            experts = layer.experts
            self._layers |= dict.fromkeys(experts.slot_parameters().values(), layer)
            if isinstance(experts, UnpackedExperts):
                prefix = plain_name(f"{layer_name}.experts.")
                own = {prefix + plain_name(name) for name, _ in experts.named_parameters()}
                shapes = {prefix + name: shape for name, shape in experts.shapes.items()}
                self.unpacked |= own
                self.elsewhere |= {name: shape for name, shape in shapes.items() if name not in own}
                held = {plain_name(name) for name, _ in experts.named_buffers()}
                self.buffers_elsewhere += [prefix + name for name in experts.buffers_stored if name not in held]
        self.of_other_stages: dict[str, torch.Size] = {}
        stages = stages_of(model)
        for prefix, module in {}.items() if stages is None else stages.elsewhere.items():
            self._add_stage(prefix, module)

    def _add_stage(self, prefix: str, module: nn.Module) -> None:
        """Name what a module has that another stage holds."""
        rows = ExpertRows(module)
        for name, parameter in base_of(module).items():
            shape = parameter.shape[1:] if rows.is_expert(parameter) else parameter.shape
            names = rows.all_names(f"{prefix}.{name}", parameter, parameter)
            self.of_other_stages |= dict.fromkeys(names, shape)
            # What an optimizer has of the parameter as a whole: a count of steps.
            self.of_other_stages.setdefault(f"{prefix}.{name}", torch.Size())
        persistent = module.state_dict().keys()
        self.buffers_elsewhere += [f"{prefix}.{name}" for name, _ in module.named_buffers() if name in persistent]

    def is_expert(self, parameter: nn.Parameter) -> bool:
        """Whether `split` gives a parameter row by row."""
        return parameter in self._layers

    def experts_of(self, parameter: nn.Parameter, tensor: Tensor) -> tuple[int, ...] | None:
        """The logical expert, or `EMPTY`, of each row that this rank has of `tensor`; `None` for what has no rows."""
        layer = self._layers.get(parameter)
        return None if layer is None or tensor.ndim == 0 else layer.local_expert_ids

    def weights_changed(self) -> None:
        """Tell the layers that their parameters have new values."""
        for layer in self._layers.values():
            layer.weights_changed()

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
    yield from as_shards(tensor.to_local().unbind(), mesh, (Shard(0),), shape)
