"""What happens to gradients between a backward pass and the optimizer: reductions, the norm, clipping."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from crossdock.parallel.mesh import GradientReduction, Meshes
from crossdock.parallel.norm import clip_grad_norm_
from crossdock.parallel.replicas import ExpertReplicas, ReplicaTraffic

__all__ = ["GradientManager"]


class GradientManager:
    """Has the gradients of a step's micro-batches reduced no more often than need be.

    FSDP reduces over the ranks that share parameters: with each micro-batch, or, with `reduction = "step"`, once, for
    the memory of whole gradients. Replicas are summed once per step in any case: those of dense parameters by FSDP
    (HSDP), those of experts by `ExpertReplicas`. Make one after FSDP has been applied; then, in each step,

        for index, batch in enumerate(batches):
            gradients.before_backward(is_last=index == len(batches) - 1)
            loss(batch).backward()
        norm = gradients.clip(max_norm)

    Args:
        model: with `apply_fsdp` applied.
        meshes: the same.
        reduction: when FSDP reduces.
        sparse: whether experts without tokens are left out among replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        meshes: Meshes,
        *,
        reduction: GradientReduction = "micro_batch",
        sparse: bool = True,
    ) -> None:
        self._model = model
        self._reduction = reduction
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._replicas: ExpertReplicas | None = None
        if meshes["ep_replicate"].size() > 1:
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

    def clip(self, max_norm: float) -> Tensor:
        """After the last backward pass: wait for the reductions, then `clip_grad_norm_`. Collective."""
        if self._replicas is not None:
            self._replicas.finish()
        return clip_grad_norm_(self._model.parameters(), max_norm)
