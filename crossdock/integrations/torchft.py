"""Replica groups under torchft: who takes part in a step, sums over those who do, and live recovery.

Facts about torchft 0.2 that this relies on: its manager decides by majority, through the lighthouse, which groups take
part in a step; a failed sum raises nothing, but makes all ranks of the group vote against the step; a group whose step
is behind fetches the state of one that is not before it begins. Quorums are waited for before the forward pass
(`use_async_quorum=False`), so that a step's samples can be divided over the groups that take part.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp, TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.checkpointing import CheckpointTransport

from crossdock.integrations.catch_up import CatchUpError, RankState, StateServer, fetch_state
from crossdock.parallel import GroupPlace, GroupsFailed

__all__ = ["HasState", "TorchFTGroups", "Transport"]

_BUCKET_BYTES = 32 * 2**20  # Of tensors that are summed in one message.
_IN_FLIGHT = 4  # Messages.
_CONNECT_SECONDS = 30
_QUORUM_SECONDS = 20  # After which a group that waits for others looks whether it was asked to stop.
_PROBE_SECONDS = 5
_OURS = "crossdock"


class HasState(Protocol):
    """What a rank gives to a group that catches up, and takes when its own does."""

    def own(self) -> RankState:
        """All that decides how this rank goes on; `values["step"]` is the last step done. Not collective."""
        ...

    def take(self, state: RankState) -> None:
        """Go on from the state of another group, which fits. Collective among the ranks of this group."""
        ...


class Transport(CheckpointTransport[dict[str, Any]]):
    """torchft's way from rank to rank, over `crossdock.integrations.catch_up`.

    Args:
        host: name or address of this machine.
        own: what this rank has.
        timeout: seconds for a transfer.

    Attributes:
        failure: why the last state that was to be fetched could not be; `None` if it could, or none was.
    """

    def __init__(self, host: str, own: Callable[[], RankState], timeout: float) -> None:
        self.failure: Exception | None = None
        self._own = own
        self._server = StateServer(host, timeout)

    def metadata(self) -> str:
        return self._server.address

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        tensors, values = state_dict["user"][_OURS]
        self._server.offer(step, RankState(tensors, {"torchft": state_dict["torchft"], _OURS: values}))

    def disallow_checkpoint(self) -> None:
        self._server.withdraw()

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        try:
            state = fetch_state(metadata, step, self._own().tensors, timeout.total_seconds())
            if not {"torchft", _OURS} <= state.values.keys():
                raise CatchUpError(f"the state of step {step} lacks counters")
        except Exception as error:
            self.failure = error
            raise
        return {"user": {_OURS: RankState(state.tensors, state.values[_OURS])}, "torchft": state.values["torchft"]}

    def shutdown(self, wait: bool = True) -> None:
        self._server.close()


class TorchFTGroups:
    """`ReplicaGroups` (crossdock.parallel) by torchft's managers, summing over gloo.

    The first `begin_step` makes this group known, so that no other waits for one that is still being built.

    Args:
        place: of this group.
        min_groups: fewer take no step.
        timeout: seconds for a sum, a vote, a transfer.
        state: gives what is caught up, once the model is built.
    """

    def __init__(self, place: GroupPlace, min_groups: int, timeout: int, state: Callable[[], HasState]) -> None:
        # Failures of other groups are told in our words; torchft logs a traceback for each.
        logging.getLogger("torchft").setLevel(logging.CRITICAL)
        self._place, self._min_groups, self._state = place, min_groups, state
        self._timeout = timedelta(seconds=timeout)
        self._sums = ProcessGroupGloo(self._timeout)
        self._manager: Manager | None = None
        self._transport: Transport | None = None
        self._store: TCPStore | None = None
        self._fetched: list[RankState] = []
        self.index, self.count = place.number, 1

    @property
    def number(self) -> int:
        return self._place.number

    @property
    def is_broken(self) -> bool:
        return self._manager is not None and self._manager.errored() is not None

    def begin_step(self) -> bool:
        """See `ReplicaGroups`.

        Raises:
            CatchUpError: on all ranks of this group, where one could not catch up: it must be started again.
            GroupsFailed: on all ranks, where the lighthouse is not to be reached.
        """
        self._fetched.clear()
        problem: GroupsFailed | None = None
        waits, step, failure = False, 0.0, None
        try:
            manager, transport = self._join()
            transport.failure = None
            manager.start_quorum()
            step, failure = float(manager.current_step()), transport.failure
        except GroupsFailed:
            raise
        except (RuntimeError, TimeoutError, OSError) as error:
            # A rank of this group that is gone is told by the sum below, on all others.
            waits = self._lighthouse_answers()
            problem = None if waits else self._dark(error)
        # A rank that has caught up beside one that has not would train on with weights of two steps.
        seen = torch.tensor([problem is not None, waits, failure is not None, step, step * step], dtype=torch.float64)
        dist.all_reduce(seen)
        problems, waiting, failures, steps, squares = seen.tolist()
        if problems:
            raise problem or self._dark("another rank of this group says so")
        if waiting:
            self._leave()
            return False
        if failures or squares * dist.get_world_size() != steps * steps:
            why = failure or "another of its ranks could not"
            raise CatchUpError(f"replica group {self.number} could not catch up: {why}")
        for state in self._fetched:
            self._state().take(state)
        self._fetched.clear()
        assert self._manager is not None
        index = self._manager.participating_rank()
        assert index is not None, "every group of a quorum takes part"
        self.index, self.count = index, self._manager.num_participants()
        return True

    def _lighthouse_answers(self) -> bool:
        host, _, port = self._place.lighthouse.removeprefix("http://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()
        except OSError:
            return False
        return True

    def sum_(self, *tensors: Tensor) -> None:
        manager = self._manager
        if manager is None or self.count == 1:
            return
        pending: deque[tuple[Any, Tensor, list[Tensor]]] = deque()
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).cpu()
            pending.append((manager.allreduce(flat, reduce_op=ReduceOp.SUM), flat, bucket))  # type: ignore[arg-type]
            if len(pending) == _IN_FLIGHT:
                _finish(*pending.popleft())
        while pending:
            _finish(*pending.popleft())

    def commit(self) -> bool:
        assert self._manager is not None, "a step begins before it ends"
        committed = self._manager.should_commit()
        if not committed:
            # A group whose sums were right after all must not wait here for this one in the next.
            self._sums.abort(errored=False)
        return committed

    def settle(self) -> bool:
        if self._manager is None:
            return True
        self.sum_(torch.zeros(1))
        broken = torch.tensor(float(self.is_broken))
        dist.all_reduce(broken)
        if broken:
            self.commit()  # In vain, which has the groups meet anew.
        return not broken

    def close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        """Be no member any more, until the next `begin_step`."""
        self.index, self.count = self._place.number, 1
        if self._manager is not None:
            self._manager.shutdown(wait=False)
            self._manager = None

    def _join(self) -> tuple[Manager, Transport]:
        if self._manager is not None and self._transport is not None:
            return self._manager, self._transport
        host, seconds = self._place.host, self._timeout.total_seconds()
        state = self._state()
        self._transport = Transport(host, state.own, seconds)
        port = self._open_store(host)
        self._manager = manager = Manager(
            self._sums,
            None,
            None,
            min_replica_size=self._min_groups,
            use_async_quorum=False,
            timeout=self._timeout,
            quorum_timeout=timedelta(seconds=min(seconds, _QUORUM_SECONDS)),
            connect_timeout=timedelta(seconds=min(seconds, _CONNECT_SECONDS)),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            store_addr=host,
            store_port=port,
            lighthouse_addr=self._place.lighthouse,
            # Groups are sorted by it.
            replica_id=f"{_OURS}{self.number:05d}",
            hostname=host,
            checkpoint_transport=self._transport,
            init_sync=False,
        )
        # What is fetched is taken over by `begin_step`, when all ranks of this group have it.
        manager.register_state_dict_fn(_OURS, self._fetched.append, state.own)
        manager.load_state_dict({"step": state.own().values["step"], "batches_committed": 0})
        return manager, self._transport

    def _open_store(self, host: str) -> int:
        """Where the ranks of this group, and those of others, meet: on this machine's address alone. Collective.

        One of our own: torchrun's is bound to all addresses, known by one that other machines may not reach, and
        remembers what ranks before these have left there.
        """
        port = torch.zeros(1, dtype=torch.int64)
        # Without a lighthouse the first rank's manager fails, for which the others' would wait.
        if dist.get_rank() == 0 and self._lighthouse_answers():
            listening = socket.create_server((host, 0))
            port[0] = listening.getsockname()[1]
            self._store = TCPStore(
                host,
                int(port),
                is_master=True,
                wait_for_workers=False,
                timeout=self._timeout,
                master_listen_fd=listening.detach(),
            )
        dist.broadcast(port, src=0)
        if not port:
            raise self._dark("nothing answers there")
        return int(port)

    def _dark(self, why: object) -> GroupsFailed:
        return GroupsFailed(
            f"replica group {self.number} cannot reach the lighthouse at {self._place.lighthouse} ({why})"
        )


def _finish(work: Any, flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Wait for a sum, and take it over."""
    work.wait()
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` by dtype and device, in order, so many at a time as are summed together."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in group:
            if bucket and size + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket
