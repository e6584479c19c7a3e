"""Rows of experts' parameters on their way to ranks that compute them as well, outside of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes

from crossdock.comm import Pending, Splits, exchange
from crossdock.experts import GroupedExperts
from crossdock.placement import EMPTY, Placement

__all__ = ["RowExchange", "at_least_one", "gathered_rows"]


@dataclass(frozen=True)
class RowExchange:
    """Which rows go where.

    Attributes:
        group_name: of the ranks that hold the experts.
        sent: this rank's rows that travel, in the order of the ranks that they go to.
        splits: how many to and from each rank.
        slots: for each row that arrives, in the order of the ranks that they come from, the foreign slot it is for.
        num_slots: foreign slots of this rank, some of which none may arrive for.
    """

    group_name: str
    sent: tuple[int, ...]
    splits: Splits
    slots: tuple[int, ...]
    num_slots: int
    _indices: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, wanted: Sequence[Sequence[int]], placement: Placement, group: dist.ProcessGroup) -> RowExchange:
        """From the primaries of `placement` to the foreign slots that want them.

        Args:
            wanted: the logical expert of each foreign slot of each rank, `-1` for none; `R` times as many.
            placement: of the primaries.
            group: its ranks.
        """
        own = group.rank()
        send: list[list[int]] = [[] for _ in wanted]
        receive: list[list[tuple[int, int]]] = [[] for _ in wanted]
        for rank, experts in enumerate(wanted):
            for slot, expert in enumerate(experts):
                if expert == EMPTY:
                    continue
                source, row = divmod(placement.expert_to_row[expert], placement.rows_per_rank)
                if source == own:
                    send[rank].append(row)
                if rank == own:
                    receive[source].append((row, slot))
        # Both ends in one order: by row.
        sent = tuple(row for rows in send for row in sorted(rows))
        slots = tuple(slot for arriving in receive for _, slot in sorted(arriving))
        splits = Splits([len(rows) for rows in send], [len(arriving) for arriving in receive])
        return cls(group.group_name, sent, splits, slots, len(wanted[own]))

    def fetch(self, rows: Mapping[str, Tensor]) -> Pending[dict[str, Tensor]]:
        """Start to move the values of `rows`, by name `[P/R, ...]`; the result has those that arrive, in that order.

        Selective recompute neither sees it nor keeps them; training may use what evaluation has fetched.
        """
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            travelling = {
                name: exchange(self.taken(row.detach()), self.splits, self.group_name) for name, row in rows.items()
            }

        def finish() -> dict[str, Tensor]:
            with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
                return {name: pending.wait() for name, pending in travelling.items()}

        return Pending(finish)

    def give_back(self, gradients: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other way: gradients of what arrived, summed for this rank's rows, each as the one in `like`."""
        back = self.splits.reversed
        travelling = {name: exchange(gradient, back, self.group_name) for name, gradient in gradients.items()}
        summed = {}
        for name, pending in travelling.items():
            received = pending.wait()
            sent, _ = self._on(received.device)
            summed[name] = torch.zeros_like(like[name]).index_add_(0, sent, received)
        return summed

    def taken(self, row: Tensor) -> Tensor:
        """Of all rows of a parameter, those that travel."""
        return row.index_select(0, self._on(row.device)[0])

    def arrivals(self, slot_ids: Tensor) -> Tensor:
        """Foreign slots as numbers of the rows that arrive; `-1` for a slot that none arrives for, and for `-1`."""
        return self._on(slot_ids.device)[1][slot_ids]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows that travel; the arrival of each slot, and of `-1`, which takes the last entry."""
        if device not in self._indices:
            arrival = [-1] * (self.num_slots + 1)
            for number, slot in enumerate(self.slots):
                arrival[slot] = number
            with torch.inference_mode(False):
                self._indices[device] = (
                    torch.tensor(self.sent, dtype=torch.int64, device=device),
                    torch.tensor(arrival, dtype=torch.int64, device=device),
                )
        return self._indices[device]


def gathered_rows(experts: GroupedExperts) -> dict[str, Tensor] | None:
    """This rank's rows of each parameter by name; `None` while FSDP has not gathered them."""
    for parameter in experts.parameters():
        if isinstance(parameter, DTensor) and Shard(1) in parameter.placements:
            return None
    return experts.local_rows()


def at_least_one(rows: Tensor) -> Tensor:
    """Backends compute with one row or more; where none has arrived, with zeros, which no token asks for."""
    return rows if len(rows) else torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
