"""What happens to gradients between a backward pass and the optimizer: reductions, the norm, clipping."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from crossdock.parallel.groups import OneGroup, ReplicaGroups
from crossdock.parallel.mesh import GradientReduction, Meshes
from crossdock.parallel.norm import clip_grad_norm_
from crossdock.parallel.replicas import ExpertReplicas, ReplicaTraffic
from crossdock.parallel.shards import local_part
from crossdock.parallel.tensor import partial_parameters

__all__ = ["GradientManager"]


class GradientManager:
    """Has the gradients of a step's micro-batches reduced no more often than need be.

    FSDP reduces over the ranks that share parameters: with each micro-batch, or, with `reduction = "step"`, once, for
    the memory of whole gradients. Once per step in any case, replicas are summed, those of dense parameters by FSDP
    (HSDP), those of experts by `ExpertReplicas`; and gradients that are terms of a sum over `tp`. Make one after FSDP
    has been applied; then, in each step,

        for index, batch in enumerate(batches):
            gradients.before_backward(is_last=index == len(batches) - 1)
            loss(batch).backward()
        norm = gradients.clip(max_norm)

    Args:
        model: with `apply_fsdp` applied.
        meshes: the same.
        reduction: when FSDP reduces.
        sparse: whether experts without tokens are left out among replicas.
        groups: further copies of the model, over which `clip` sums all gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        meshes: Meshes,
        *,
        reduction: GradientReduction = "micro_batch",
        sparse: bool = True,
        groups: ReplicaGroups | None = None,
    ) -> None:
        self._model = model
        self._groups = groups or OneGroup()
        self._reduction = reduction
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._replicas: ExpertReplicas | None = None
        self._stages = meshes.size("pp")
        self._tp = meshes["tp"].get_group() if meshes.size("tp") > 1 else None
        if meshes.size("ep_replicate") > 1:
            self._replicas = ExpertReplicas(model, meshes, sparse=sparse)

    @property
    def replica_traffic(self) -> ReplicaTraffic | None:
        """Of the experts in the step that `clip` ended; `None` without replicas."""
        return None if self._replicas is None else self._replicas.traffic

    def before_backward(self, *, is_last: bool) -> None:
        """Say before each backward pass whether it is the step's last one."""
        if self._replicas is not None:
            self._replicas.is_last = is_last
        for module in self._modules:
            if self._reduction == "step":
                module.set_requires_gradient_sync(is_last, recurse=False)
            elif self._replicas is not None:
                module.set_requires_all_reduce(is_last, recurse=False)

    def hold(self, *, reshards: bool = False) -> None:
        """Before the many backward passes of a `Pipeline`: reductions wait for `reduce`, and so does what is gathered.

        A stage's backward passes may be split in two, the second of which FSDP does not see.

        Args:
            reshards: gathered parameters are freed after each pass none the less, for memory.
        """
        self._set_reducing(False, reshards=reshards)
        for module in self._modules:
            module.set_reshard_after_forward(reshards, recurse=False)

    def reduce(self) -> None:
        """After the last of these backward passes: reduce all gradients, the last block's first. Collective."""
        self._set_reducing(True, reshards=True)
        # As torch's own pipeline stages do for a stage that is one FSDP module: it has no public name.
        root: Any = fully_shard.state(self._model)  # type: ignore[attr-defined]
        for state in reversed(root._state_ctx.all_states):
            # torch 2.11 and 2.12 have one group per module.
            for group in reversed(getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]):
                if group is not None:
                    group.post_backward()
        root._root_post_backward_final_callback()

    def _set_reducing(self, reduces: bool, *, reshards: bool) -> None:
        """Whether a backward pass from here on reduces gradients, and frees what was gathered for it."""
        self._model.set_is_last_backward(reduces)  # type: ignore[operator]
        if self._replicas is not None:
            self._replicas.is_last = reduces
        for module in self._modules:
            module.set_reshard_after_backward(reshards, recurse=False)
            module.set_requires_gradient_sync(reduces, recurse=False)

    def clip(self, max_norm: float) -> Tensor:
        """After the last backward pass: wait for the reductions, then `clip_grad_norm_`. Collective."""
        if self._replicas is not None:
            self._replicas.finish()
        if self._tp is not None:
            _sum_partial(self._model, self._tp)
        gradients = (parameter.grad for parameter in self._model.parameters())
        self._groups.sum_(*(local_part(gradient) for gradient in gradients if gradient is not None))
        return clip_grad_norm_(self._model.parameters(), max_norm, stages=self._stages)


@torch.no_grad()
def _sum_partial(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum over `tp` the gradients that are terms of a sum, in one collective for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in partial_parameters(model):
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )
