"""Tensor parallelism: matrices split over `tp`, and what enters and leaves the modules that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from crossdock.comm import enter_parts, gather_parts, join_parts, scatter_terms, sum_terms, take_part
from crossdock.moe import MoE, moe_layers
from crossdock.parallel.blocks import transformer_blocks
from crossdock.parallel.mesh import Meshes
from crossdock.parallel.shards import local_part
from crossdock.parallel.stages import stages_of
from crossdock.parallel.vocabulary import VocabularyEmbedding, VocabularyHead, VocabularySplit

__all__ = ["Region", "TensorPlan", "apply_tp", "partial_parameters"]

_PARTIAL = "crossdock_partial_over_tp"


class Region(NamedTuple):
    """A module of a block whose matrices are split: each rank computes a term of its output.

    Names are of linear modules within it; those that a model has not are passed over.

    Attributes:
        columns: split by their outputs.
        rows: split by their inputs; what follows them sums the ranks' terms.
        key_values: split by their outputs, which are key or value heads: where there are fewer than ranks, each rank
            computes the one that it needs.
        per_head: parameters of the module itself with a value for each query head.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    key_values: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorPlan:
    """What of a model is split over `tp`.

    Attributes:
        num_heads, num_key_value_heads: of attention.
        regions: by name in a transformer block.
        whole: names in a block of modules that mix tokens and that every rank computes whole.
    """

    num_heads: int
    num_key_value_heads: int
    regions: Mapping[str, Region] = field(default_factory=dict)
    whole: tuple[str, ...] = ()


class ShardedLinear(nn.Linear):
    """A linear module with a part of its outputs, or of its inputs: then its output is a term of a sum."""

    adds_bias = True

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else local_part(self.bias)
        if bias is not None and not self.adds_bias:
            bias = bias * 0  # Of the terms of a sum, one has it; its gradient stays in the graph.
        return F.linear(input, local_part(self.weight), bias)


class RepeatedHead(nn.Linear):
    """A linear module of which a rank computes one head, `head [D]` of all its outputs."""

    head = slice(0, 0)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[self.head], None if self.bias is None else self.bias[self.head])


def apply_tp(model: nn.Module, meshes: Meshes, plan: TensorPlan | None, *, sequence_parallel: bool = True) -> nn.Module:
    """Split attention, dense and shared-expert MLPs, embeddings and head of `model` over `tp`, in place.

    Does nothing where `tp` is 1. Before EP and FSDP. A token enters a MoE layer on exactly one rank of `tp`.

    Args:
        model: on the meta device, or with the same values on all ranks. A transformer block takes and gives
            `[B, S, H]`.
        meshes: from `ParallelDims.build_mesh`.
        plan: what is split.
        sequence_parallel: between the split modules, each rank has a part of every sequence: less memory, and norms
            are computed once. Else all ranks have the same.

    Raises:
        ValueError: for a model that does not divide, or without a plan.
    """
    if meshes.size("tp") == 1:
        return model
    if plan is None:
        raise ValueError("tensor parallelism needs a tensor_plan that says what is split")
    mesh = meshes["tp"]
    group = mesh.get_group()
    split = _Split(mesh, group, sequence_parallel)
    blocks = transformer_blocks(model)
    if sequence_parallel:
        _mark(model)
        stages = stages_of(model)
        if stages is None or stages.has_first:
            blocks[0].register_forward_pre_hook(_first(lambda x: take_part(x, 1, group)), with_kwargs=True)
    for block in blocks:
        for name, region in plan.regions.items():
            module = _child(block, name)
            if module is not None and not isinstance(module, MoE):
                split.region(module, region, plan)
        for name in plan.whole:
            if (module := _child(block, name)) is not None:
                split.whole(module)
    for layer in moe_layers(model).values():
        if not isinstance(layer, MoE):
            raise ValueError("tensor parallelism needs MoE layers with a router of ours")
        split.moe(layer)
    split.vocabulary(model)
    return model


def partial_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those whose gradients are terms of a sum over `tp`: held whole by all its ranks, used for a part by each."""
    experts = {parameter for layer in moe_layers(model).values() for parameter in layer.experts.parameters()}
    marked = (module for module in model.modules() if getattr(module, _PARTIAL, False))
    found = (parameter for module in marked for parameter in module.parameters(recurse=False))
    return list(dict.fromkeys(each for each in found if each not in experts and not _is_split(each)))


def _is_split(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(name == "tp" and place.is_shard() for name, place in zip(names, parameter.placements, strict=True))


class _Split(NamedTuple):
    """Changes modules for a rank of `tp`."""

    mesh: DeviceMesh
    group: dist.ProcessGroup
    sequence_parallel: bool

    def region(self, module: nn.Module, region: Region, plan: TensorPlan) -> None:
        _mark(module)
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        repeats = plan.num_key_value_heads < size
        for name in (*region.columns, *(() if repeats else region.key_values)):
            self._linear(module, name, 0)
        for name in region.rows:
            self._linear(module, name, 1)
        for name in region.key_values if repeats else ():
            linear = _child(module, name)
            assert isinstance(linear, nn.Linear)
            head_size = linear.out_features // plan.num_key_value_heads
            repeated = _as(RepeatedHead, linear)
            first = rank * plan.num_key_value_heads // size * head_size
            repeated.head = slice(first, first + head_size)
            _replace(module, name, repeated)
        for name in region.per_head:
            setattr(module, name, self._shard(getattr(module, name), 0))
        if hasattr(module, "num_key_value_groups"):
            # How often transformers' attention repeats key and value heads.
            own = max(plan.num_key_value_heads // size, 1)
            module.num_key_value_groups = plan.num_heads // size // own  # type: ignore[assignment]
        group = self.group
        if self.sequence_parallel:
            self._around(module, lambda x: gather_parts(x, 1, group), lambda y: scatter_terms(y, 1, group))
        else:
            self._around(module, lambda x: enter_parts(x, group), lambda y: sum_terms(y, group))

    def whole(self, module: nn.Module) -> None:
        if self.sequence_parallel:
            for each in module.modules():
                setattr(each, _PARTIAL, False)
            group = self.group
            self._around(module, lambda x: join_parts(x, 1, group), lambda y: take_part(y, 1, group))

    def moe(self, layer: MoE) -> None:
        group = self.group
        _mark(layer)

        def own_padding(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if layer.padding_mask is not None:
                layer.padding_mask = take_part(layer.padding_mask, 1, group)
            return args, kwargs

        layer.register_forward_pre_hook(own_padding, with_kwargs=True)
        if not self.sequence_parallel:
            self._around(layer, lambda x: take_part(x, 1, group), lambda y: join_parts(y, 1, group))
        if layer.shared_experts is not None:
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                self._linear(layer.shared_experts, name, dim)
            self._around(
                layer.shared_experts, lambda x: gather_parts(x, 0, group), lambda y: scatter_terms(y, 0, group)
            )

    def vocabulary(self, model: nn.Module) -> None:
        """Split the embedding of tokens and the head by tokens of the vocabulary; tied ones stay one."""
        split = VocabularySplit(self.group, self.sequence_parallel)
        stages = stages_of(model)
        elsewhere = () if stages is None else stages.elsewhere.values()
        heads = [module for module in model.modules() if isinstance(module, VocabularyHead)]
        size = next((each.weight.shape[0] for each in (*heads, *elsewhere) if isinstance(each, VocabularyHead)), None)
        if size is None:
            raise ValueError("tensor parallelism needs a head of ours (crossdock.models.LossHead)")
        sharded: dict[Tensor, nn.Parameter] = {}
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Embedding and child.num_embeddings == size:
                    weight = sharded.setdefault(child.weight, self._shard(child.weight, 0))
                    setattr(module, name, VocabularyEmbedding.of(child, weight, split))
        for head in heads:
            tied = sharded.get(head.weight)
            head.weight = self._shard(head.weight, 0) if tied is None else tied
            head.split = split

    def _linear(self, module: nn.Module, name: str, dim: int) -> None:
        linear = _child(module, name)
        if linear is None:
            return
        assert isinstance(linear, nn.Linear)
        sharded = _as(ShardedLinear, linear)
        sharded.weight = self._shard(linear.weight, dim)
        if linear.bias is not None:
            if dim == 0:
                sharded.bias = self._shard(linear.bias, 0)
            sharded.adds_bias = dim == 0 or self.mesh.get_local_rank() == 0
        _replace(module, name, sharded)

    def _shard(self, parameter: Tensor, dim: int) -> nn.Parameter:
        """This rank's part of a parameter, as a DTensor."""
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        if parameter.shape[dim] % size:
            raise ValueError(f"dimension {dim} of {list(parameter.shape)} must divide over {size} ranks of tp")
        part = parameter.detach().chunk(size, dim)[rank].clone()
        shard = DTensor.from_local(part, self.mesh, [Shard(dim)], run_check=False)
        return nn.Parameter(shard, requires_grad=parameter.requires_grad)

    def _around(self, module: nn.Module, enter: Callable[[Tensor], Tensor], leave: Callable[[Tensor], Tensor]) -> None:
        """Have `module` take what `enter` makes of its first argument, and give what `leave` makes of its output."""
        module.register_forward_pre_hook(_first(enter), with_kwargs=True)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return (leave(output[0]), *output[1:]) if isinstance(output, tuple) else leave(output)

        # Before what others have made of the output.
        module.register_forward_hook(after, prepend=True)


def _first(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes a module's first argument, or the one that transformers' code names `hidden_states`."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return before


def _mark(module: nn.Module) -> None:
    for each in module.modules():
        setattr(each, _PARTIAL, True)


def _as(kind: Any, linear: nn.Linear) -> Any:
    """A module of `kind` with the parameters of `linear`."""
    with torch.device("meta"):
        made = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    made.weight, made.bias = linear.weight, linear.bias
    made.train(linear.training)
    setattr(made, _PARTIAL, True)
    return made


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        found = dict(module.named_children()).get(part)
        if found is None:
            return None
        module = found
    return module


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        module = module.get_submodule(part)
    setattr(module, last, child)
