"""What ranks tell one another before rows travel: how many there are, of what kind, and whether all can go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm import Splits, Tally, Wire, exchange_counts
from crossdock.dispatch.checks import check_inputs

__all__ = ["Agreement", "RankFailure", "RankMismatch"]


class RankFailure(RuntimeError):
    """Another rank cannot dispatch.

    Attributes:
        rank: its place in the group that holds the experts.
    """

    def __init__(self, rank: int, global_rank: int, num_ranks: int) -> None:
        super().__init__(
            f"rank {rank} of the {num_ranks} that hold the experts (global rank {global_rank}) has failed and raised "
            "an error of its own; this rank raises to not wait for it"
        )
        self.rank = rank


class RankMismatch(ValueError):
    """Ranks call `dispatch` with tensors that do not go together."""


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIRES = ("same", "bf16", "fp16", "fp8")


class _Signature(NamedTuple):
    """What must be alike on all ranks. As two integers it travels with the counts, without a copy to the device."""

    hidden_size: int
    top_k: int
    slots_per_rank: int
    chunks: int
    dtype: torch.dtype
    weights_dtype: torch.dtype
    wire: Wire

    def pack(self) -> tuple[int, int]:
        kinds = (
            self.chunks,
            _DTYPES.index(self.dtype),
            _DTYPES.index(self.weights_dtype),
            _WIRES.index(self.wire.dtype),
            int(self.wire.both),
            self.top_k,
        )
        return self.hidden_size * _MOST_SLOTS + self.slots_per_rank, _pack(kinds, _KINDS)

    @classmethod
    def unpack(cls, sizes: int, kinds: int) -> _Signature:
        hidden_size, slots_per_rank = divmod(sizes, _MOST_SLOTS)
        chunks, dtype, weights_dtype, wire, both, top_k = _unpack(kinds, _KINDS)
        return cls(
            hidden_size,
            top_k,
            slots_per_rank,
            chunks,
            _DTYPES[dtype],
            _DTYPES[weights_dtype],
            Wire(_WIRES[wire], bool(both)),
        )

    def __str__(self) -> str:
        directions = " both ways" if self.wire.both else ""
        return (
            f"x [T, {self.hidden_size}] {self.dtype}, slot_ids [T, {self.top_k}], weights {self.weights_dtype}, "
            f"{self.slots_per_rank} slots per rank, wire {self.wire.dtype}{directions}, {self.chunks} chunks"
        )


# So many values each: of the sizes 62 bits in all, of the kinds 60.
_MOST_SLOTS = 2**30
_KINDS = (2**32, 4, 4, 8, 2, 2**20)


def _pack(digits: Sequence[int], sizes: Sequence[int]) -> int:
    packed = 0
    for digit, size in zip(digits, sizes, strict=True):
        packed = packed * size + digit
    return packed


def _unpack(packed: int, sizes: Sequence[int]) -> list[int]:
    digits = []
    for size in reversed(sizes):
        packed, digit = divmod(packed, size)
        digits.append(digit)
    return digits[::-1]


class Agreement:
    """The exchange of counts of one dispatcher, by which a rank that cannot go on tells the others as well.

    A negative count stands for a failure: `-1 - r`, where rank `r` failed. Every rank gets a count from every other, so
    all of them raise, and none has begun an exchange that another will not join.

    Args:
        group: the ranks that exchange rows.
        slots_per_rank: `P/R`.
        wire: what rows look like while they travel.
        chunks: parts that a rank's tokens are dispatched in, each by a call.
        check_ids: look at ids on every device; on a CPU, where it costs no sync, they are looked at anyway.
        whole: the ranks that hold the experts, where `group` is one hop between some of them.
        tally: of what is sent.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        wire: Wire,
        *,
        chunks: int = 1,
        check_ids: bool = False,
        whole: dist.ProcessGroup | None = None,
        tally: Tally | None = None,
    ) -> None:
        whole = whole or group
        self.group_name, self.num_ranks = group.group_name, group.size()
        self.slots_per_rank, self.num_slots = slots_per_rank, slots_per_rank * group.size()
        self.wire, self.chunks, self.check_ids, self.tally = wire, chunks, check_ids, tally
        self._device_types = {device.type for device in group._device_types}
        self._whole = dist.get_process_group_ranks(whole)
        self._places = [self._whole.index(rank) for rank in dist.get_process_group_ranks(group)]
        self._place = whole.rank()

    def check(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> None:
        """Raise for arguments of `dispatch` that cannot work, after telling the other ranks. No sync but `check_ids`'.

        Raises:
            ValueError: names the argument.
        """
        try:
            check_inputs(x, slot_ids, weights, self.num_slots if self.check_ids or x.is_cpu else None)
        except Exception:
            self.refuse(*(tensor.device for tensor in (slot_ids, weights, x) if isinstance(tensor, Tensor)))
            raise

    def pairs(self, needed: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct (destination rank, token) pairs of `needed [T, R]`, sorted: two int64 tensors `[S]`. A sync."""
        destination, token = needed.t().nonzero().unbind(1)
        return destination, token

    def parts(self, rows_per_rank: list[int]) -> list[int]:
        """Rows that are added one part after another to their tokens' sums: a rank's rows are of distinct tokens."""
        return rows_per_rank

    def exchange_counts(
        self, send_counts: Tensor, x: Tensor, slot_ids: Tensor, weights: Tensor
    ) -> tuple[Splits, list[int]]:
        """Once per `dispatch`, what ranks need to know of each other.

        Args:
            send_counts: `[R]` int64, rows that this rank sends to each rank.
            x: `[T, H]`, and so on, as `dispatch` has them.

        Returns:
            Those rows and the ones that this rank gets; the tokens `T` of every rank.

        Raises:
            RankFailure: another rank has refused.
            RankMismatch: other ranks have tensors of other sizes or dtypes, or other numbers of slots or chunks; says
                which rank has what.
        """
        own = _Signature(
            x.shape[1], slot_ids.shape[1], self.slots_per_rank, self.chunks, x.dtype, weights.dtype, self.wire
        ).pack()
        splits, (sizes, kinds, tokens) = exchange_counts(send_counts, (*own, len(x)), self.group_name, self.tally)
        signatures = list(zip(sizes, kinds, strict=True))
        failed = [-1 - count for count in splits.recv if count < 0]
        if failed:
            raise RankFailure(failed[0], self._whole[failed[0]], len(self._whole))
        if any(signature != own for signature in signatures):
            each = (
                f"rank {place} (global rank {self._whole[place]}): {_Signature.unpack(*signature)}"
                for place, signature in zip(self._places, signatures, strict=True)
            )
            raise RankMismatch(f"ranks that hold the experts disagree on what they dispatch; {'; '.join(each)}")
        return splits, tokens

    def refuse(self, *devices: torch.device, cause: BaseException | None = None) -> None:
        """Take part in the exchange of counts to say that a rank failed: this one, or the one that `cause` names.

        Args:
            devices: to exchange on, the first that the group can.
            cause: why this rank cannot go on.
        """
        fallback = torch.device("cpu" if "cpu" in self._device_types else min(self._device_types))
        device = next((device for device in devices if device.type in self._device_types), fallback)
        failed = cause.rank if isinstance(cause, RankFailure) else self._place
        counts = torch.full((self.num_ranks,), -1 - failed, device=device)
        exchange_counts(counts, (0, 0, 0), self.group_name, self.tally)
