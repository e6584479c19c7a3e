"""The sum of experts' gradients over `ep_replicate`: begun while the backward pass goes on, without idle experts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.experts import UnpackedExperts
from crossdock.moe import moe_layers
from crossdock.parallel.mesh import Meshes
from crossdock.parallel.shards import local_part
from crossdock.routed_experts import RoutedExperts

__all__ = ["ExpertReplicas", "ReplicaTraffic"]


class ReplicaTraffic(NamedTuple):
    """What the sums over `ep_replicate` of one step have cost a rank.

    Attributes:
        sent: bytes of gradients that were summed.
        skipped: bytes of the experts that no rank had tokens for.
        overlapped: seconds that sums were under way before the backward pass had ended.
        waited: seconds from then to the last one's end.
    """

    sent: int = 0
    skipped: int = 0
    overlapped: float = 0.0
    waited: float = 0.0


class _Gradient(NamedTuple):
    """A parameter of a layer, with a row for each of its experts, or of one `expert` alone."""

    parameter: nn.Parameter
    layer: RoutedExperts
    expert: int | None = None

    @property
    def experts(self) -> tuple[int, ...]:
        """The logical expert of each row, as of now; of one expert, a single one for all rows."""
        return self.layer.local_expert_ids if self.expert is None else (self.expert,)


class _Sum(NamedTuple):
    """A sum that is under way: where it goes, and when it began and ended."""

    work: dist.Work
    gradient: Tensor
    rows: Tensor | None
    values: Tensor
    began: float
    ended: list[float]


class ExpertReplicas:
    """Sums what the ranks of `ep_replicate` have of the experts' gradients, layer by layer, as they become ready.

    For each layer the ranks agree first which experts had tokens anywhere (one all-reduce of `E` bytes, which has the
    time of the next layer's backward pass to arrive); the gradient of any other is zero on all of them and stays here.
    Between two ranks the sum is that of the dense form, bit by bit; among more, to rounding: where a value lies in a
    message decides the order of its terms.

    Args:
        model: with FSDP applied.
        meshes: of `apply_fsdp`.
        sparse: false sums all experts.

    Attributes:
        is_last: whether the backward pass that comes is the step's last one, after which gradients are summed.
        traffic: of the step that `finish` ended.
    """

    def __init__(self, model: nn.Module, meshes: Meshes, *, sparse: bool = True) -> None:
        self.sparse = sparse
        self.is_last = True
        self.traffic = ReplicaTraffic()
        self._sent = self._skipped = 0
        self._group = meshes["ep_replicate"].get_group()
        self._stage = meshes.stage
        self._layers = [layer for layer in moe_layers(model).values() if _is_trained(layer)]
        for layer in moe_layers(model).values():
            layer.sums_replicas = True
        self._gradients = [_gradients_of(layer) for layer in self._layers]
        self._missing = [len(gradients) for gradients in self._gradients]
        self._next = len(self._layers)  # Layers are ready from the last to the first.
        self._agreements: list[tuple[int, Tensor, dist.Work | None]] = []
        self._sums: list[_Sum] = []
        for index, gradients in enumerate(self._gradients):
            for gradient in gradients:
                gradient.parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._is_ready(index))

    def finish(self) -> None:
        """After the step's last backward pass: wait until all sums are there. Collective."""
        self._agree(0)
        while self._agreements:
            self._begin_sums()
        ended = time.perf_counter()
        for pending in self._sums:
            pending.work.wait()
            if pending.rows is not None:
                pending.gradient.index_copy_(0, pending.rows, pending.values)
        now = time.perf_counter()
        overlapped = [min([*pending.ended, ended]) - pending.began for pending in self._sums]
        waited = now - ended if self._sums else 0.0
        self.traffic = ReplicaTraffic(self._sent, self._skipped, sum(overlapped), waited)
        self._sums, self._sent, self._skipped = [], 0, 0
        self._missing = [len(gradients) for gradients in self._gradients]
        self._next = len(self._layers)

    def _is_ready(self, index: int) -> None:
        """A parameter of a layer has its gradient."""
        if not self.is_last:
            return
        self._missing[index] -= 1
        if not self._missing[index]:
            self._agree(index)
            if len(self._agreements) > 1:
                self._begin_sums()

    def _agree(self, index: int) -> None:
        """Ask all ranks which experts had tokens, for the layers from `index` on: in one order on all of them.

        A rank without experts of its own in a layer, which nothing tells that it is ready, answers with the next one.
        """
        while self._next > index:
            self._next -= 1
            counts = self._layers[self._next].load.tokens_per_expert
            touched = (counts > 0).to(torch.uint8)
            work = None
            if self.sparse:
                work = dist.all_reduce(touched, dist.ReduceOp.MAX, group=self._stage, async_op=True)
            self._agreements.append((self._next, touched, work))

    def _begin_sums(self) -> None:
        """Begin those of the layer that the ranks agreed on first."""
        index, touched, work = self._agreements.pop(0)
        if work is not None:
            work.wait()
        busy = touched.tolist() if self.sparse else [1] * len(touched)
        for gradient in self._gradients[index]:
            if gradient.parameter.grad is not None:
                self._begin_sum(gradient, busy)

    def _begin_sum(self, gradient: _Gradient, busy: Sequence[int]) -> None:
        assert gradient.parameter.grad is not None
        local = local_part(gradient.parameter.grad)
        rows = [row for row, expert in enumerate(gradient.experts) if expert >= 0 and busy[expert]]
        row_bytes = local.nbytes // len(gradient.experts)
        self._sent += row_bytes * len(rows)
        self._skipped += row_bytes * (len(gradient.experts) - len(rows))
        if not rows:
            return
        index = None
        if len(rows) < len(gradient.experts) and gradient.expert is None:
            index = torch.tensor(rows, device=local.device)
        values = local if index is None else local.index_select(0, index)
        began, ended = time.perf_counter(), list[float]()
        work = dist.all_reduce(values, group=self._group, async_op=True)
        assert work is not None
        work.get_future().add_done_callback(lambda _: ended.append(time.perf_counter()))
        self._sums.append(_Sum(work, local, index, values, began, ended))


def _is_trained(layer: RoutedExperts) -> bool:
    """Whether any rank has something to sum: one without experts of its own cannot see that they are frozen."""
    parameters = list(layer.experts.parameters())
    return any(parameter.requires_grad for parameter in parameters) or not parameters


def _gradients_of(layer: RoutedExperts) -> list[_Gradient]:
    experts = layer.experts
    if isinstance(experts, UnpackedExperts):
        return [
            _Gradient(parameter, layer, int(expert))
            for expert, module in experts.items()
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
    return [_Gradient(parameter, layer) for parameter in experts.slot_parameters().values() if parameter.requires_grad]
