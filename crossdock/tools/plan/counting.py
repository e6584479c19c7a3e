"""Counting what a step holds and sends, operation by operation: in a dry run and in a real one by the same rules."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from crossdock.experts import EXPERTS_OPS

__all__ = ["Counted", "Sent", "StepCounter"]

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer state"
BUFFERS, ACTIVATIONS = "communication buffers", "activations"

# A new snapshot of what is held is taken when that has grown by so much.
_GROWN = 1.005


class Sent(NamedTuple):
    """Bytes that this rank sends to others by the calls of one operation over one group.

    Attributes:
        ranks: of the group.
        calls: how often.
        to_ranks: bytes to each of `ranks` where each gets rows of its own, else empty.
        in_ring: bytes to the others where all get, or give, equal parts: passed on from rank to rank.
    """

    ranks: tuple[int, ...]
    calls: int
    to_ranks: tuple[int, ...]
    in_ring: int

    @property
    def total(self) -> int:
        """To other ranks."""
        return sum(self.to_ranks) + self.in_ring


class Counted(NamedTuple):
    """What `StepCounter` has seen.

    Attributes:
        peaks: the most bytes of live tensors in each phase.
        kinds: of each phase, these bytes by kind.
        sent: by (operation, name of the group).
    """

    peaks: Mapping[str, int]
    kinds: Mapping[str, Mapping[str, int]]
    sent: Mapping[tuple[str, str], Sent]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class _Storage:
    """A live storage: its bytes, and what it is for."""

    __slots__ = ("kind", "nbytes", "ref")

    def __init__(self, ref: Any, nbytes: int, kind: str) -> None:
        self.ref, self.nbytes, self.kind = ref, nbytes, kind


class StepCounter(TorchDispatchMode):
    """Within it, bytes of live tensors' storages are added up after every operation, and collectives' bytes.

    A storage counts once, however many tensors share it, as long as any of them lives. FSDP frees and allocates
    storages of tensors that stay: those of `torch.empty` are looked at after every operation. What an operator of ours
    uses within itself is not seen, in either run.

    In a dry run it also says how many routes the experts' operators compute, which no fake tensor tells.

    Args:
        routes: of the rows that a rank has received, how many routes they hold; for fake tensors.
    """

    def __init__(self, routes: Callable[[int, int], int] | None = None) -> None:
        super().__init__()
        self._routes = routes
        self._live: dict[int, _Storage] = {}
        self._resizable: dict[int, _Storage] = {}
        self._total = 0
        self._phase, self._kind = "start", ACTIVATIONS
        self._peaks: dict[str, int] = defaultdict(int)
        self._snapshots: dict[str, tuple[int, list[tuple[_Storage, int]]]] = {}
        self._sent: dict[tuple[str, str], Sent] = {}

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what these are for; those not seen yet count from here on."""
        for tensor in tensors:
            local = _plain(tensor)
            if local is None:
                continue
            key = local.untyped_storage()._cdata
            if key in self._live:
                self._live[key].kind = kind
            else:
                self._add(local, kind)
        self._settle()

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Within it, what is new is for `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def enter(self, phase: str) -> None:
        """What follows is another part of the step."""
        self._phase = phase
        self._settle()

    def begin(self) -> None:
        """The step begins: what peaks were, and what was sent, does not count."""
        self._peaks.clear()
        self._snapshots.clear()
        self._sent.clear()
        self.enter("begin")

    def counted(self) -> Counted:
        """So far."""
        kinds = {}
        for phase, (_, snapshot) in self._snapshots.items():
            by_kind: dict[str, int] = defaultdict(int)
            for storage, nbytes in snapshot:
                by_kind[storage.kind] += nbytes
            # The snapshot may be somewhat older than the peak.
            by_kind[ACTIVATIONS] += self._peaks[phase] - sum(by_kind.values())
            kinds[phase] = dict(by_kind)
        return Counted(dict(self._peaks), kinds, dict(self._sent))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # its local tensors come here next
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # What the host would read of a dry run: every expert had tokens, every id is valid.
            return args[0].dtype.is_floating_point or args[0].dtype == torch.uint8 or 0
        if func in EXPERTS_OPS and isinstance(args[0], FakeTensor):
            result = self._experts(func, *args)
        elif self._routes is not None and _is_known(func, args, kwargs):
            with _disable_current_modes():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        name = f"{func.namespace}.{func._opname}"
        rule = _COLLECTIVES.get(name)
        if rule is not None:
            self._send(name, *rule(args, kwargs))
        kind = BUFFERS if rule is not None or func.namespace == "fsdp" else self._kind
        resizable = name == "aten.empty"
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (local := _plain(tensor)) is not None:
                key = local.untyped_storage()._cdata
                if key not in self._live:
                    storage = self._add(local, kind)
                    if resizable:
                        self._resizable[key] = storage
        self._settle()
        return result

    def _experts(
        self, func: Any, tokens: Tensor, slot_ids: Tensor, weights: Tensor, gate_and_up: Tensor, *_: Any
    ) -> Any:
        """As the operators' own rule for fake tensors, with as many routes as are assumed."""
        static = self._routes is None or "static" in func._opname
        routes = slot_ids.numel() if static or self._routes is None else self._routes(*slot_ids.shape)
        return (
            torch.empty_like(tokens),
            tokens.new_empty(routes, gate_and_up.shape[2]),
            slot_ids.new_empty(routes),
            slot_ids.new_empty(len(gate_and_up)),
        )

    def _add(self, tensor: Tensor, kind: str) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = _Storage(weakref.ref(storage, lambda _: self._gone(key, held)), storage.nbytes(), kind)
        self._live[key] = held
        self._total += held.nbytes
        return held

    def _gone(self, key: int, held: _Storage) -> None:
        self._total -= held.nbytes
        if self._live.get(key) is held:
            del self._live[key]
        if self._resizable.get(key) is held:
            del self._resizable[key]

    def _settle(self) -> None:
        """Look at what may have another size now, and at the total."""
        for held in list(self._resizable.values()):
            storage = held.ref()
            if storage is not None and (nbytes := storage.nbytes()) != held.nbytes:
                self._total += nbytes - held.nbytes
                held.nbytes, held.kind = nbytes, BUFFERS
        phase = self._phase
        if self._total > self._peaks[phase]:
            self._peaks[phase] = self._total
            before = self._snapshots.get(phase)
            if before is None or self._total > before[0] * _GROWN:
                self._snapshots[phase] = self._total, [(held, held.nbytes) for held in self._live.values()]

    def _send(self, name: str, group: dist.ProcessGroup, to_ranks: Sequence[int], in_ring: int) -> None:
        key = name, group.group_name
        own = group.rank()
        to_others = tuple(0 if place == own else nbytes for place, nbytes in enumerate(to_ranks))
        before = self._sent.get(key)
        if before is None:
            self._sent[key] = Sent(tuple(dist.get_process_group_ranks(group)), 1, to_others, in_ring)
            return
        added = tuple(a + b for a, b in zip(before.to_ranks, to_others, strict=True))
        self._sent[key] = Sent(before.ranks, before.calls + 1, added, before.in_ring + in_ring)


def _is_known(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a dry run can really compute it: positions, and what follows from them alone.

    Models look at positions to see whether they need a mask, which they take for granted where these are fake.
    """
    if func._opname == "arange":
        return True
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors)


def _plain(tensor: Tensor) -> Tensor | None:
    """The tensor whose storage counts; none of a meta tensor that stands for nothing."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return None if local.is_meta and not isinstance(local, FakeTensor) else local


def _group(group: Any) -> dist.ProcessGroup:
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


_Rule = Callable[[Sequence[Any], Mapping[str, Any]], tuple[dist.ProcessGroup, Sequence[int], int]]


def _rows(rows: Tensor, send: Sequence[int], group: Any) -> tuple[dist.ProcessGroup, Sequence[int], int]:
    row_bytes = rows.nbytes // max(len(rows), 1) if rows.ndim else rows.itemsize
    return _group(group), [count * row_bytes for count in send], 0


def _gathered(part: Tensor, group: Any) -> tuple[dist.ProcessGroup, Sequence[int], int]:
    group = _group(group)
    return group, (), (group.size() - 1) * part.nbytes


def _reduced(whole: Tensor, group: Any) -> tuple[dist.ProcessGroup, Sequence[int], int]:
    group = _group(group)
    return group, (), (group.size() - 1) * whole.nbytes // group.size()


def _all_reduced(whole: Tensor, group: Any) -> tuple[dist.ProcessGroup, Sequence[int], int]:
    group, _, once = _reduced(whole, group)
    return group, (), 2 * once


def _even(rows: Tensor, group: Any) -> Sequence[int]:
    size = _group(group).size()
    return [len(rows) // size] * size


# What is sent by an operator's arguments.
_COLLECTIVES: Mapping[str, _Rule] = {
    "_c10d_functional.all_to_all_single": lambda a, k: _rows(a[0], a[2], a[3]),
    "_c10d_functional.all_gather_into_tensor": lambda a, k: _gathered(a[0], a[2]),
    "_c10d_functional.reduce_scatter_tensor": lambda a, k: _reduced(a[0], a[3]),
    "_c10d_functional.all_reduce": lambda a, k: _all_reduced(a[0], a[2]),
    "c10d._allgather_base_": lambda a, k: _gathered(a[1], a[2]),
    "c10d._reduce_scatter_base_": lambda a, k: _reduced(a[1], a[2]),
    "c10d.allgather_": lambda a, k: _gathered(a[1][0], a[2]),
    "c10d.allreduce_": lambda a, k: _all_reduced(a[0][0], a[1]),
    "c10d.send": lambda a, k: (_group(a[1]), (), sum(tensor.nbytes for tensor in a[0])),
    "c10d.alltoall_base_": lambda a, k: _rows(a[1], a[4] or _even(a[1], a[2]), a[2]),
}
