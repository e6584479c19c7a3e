"""Plain all-to-all: each token travels once to every rank that owns at least one of its slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from crossdock.comm import UNTOUCHED, Pending, Splits, Wire, attach_exchange, exchange
from crossdock.dispatch.agreement import Agreement
from crossdock.dispatch.checks import check_results
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.needs import needed_ranks
from crossdock.dispatch.nodes import Nodes
from crossdock.dispatch.traffic import Needs, Traffic, TrafficMeter

__all__ = ["AllToAllDispatcher", "AllToAllHandle"]


class AllToAllHandle(NamedTuple):
    """Which token each sent row is, `token [S]` int64, sorted by (destination rank, token); the exchange's splits; `T`
    and `H`; what the tokens need."""

    token: Tensor
    splits: Splits
    num_tokens: int
    hidden_size: int
    needs: Needs


class AllToAllDispatcher:
    """Three collectives to dispatch (row counts; ids with weights; tokens), one to combine; backward one, then two.

    Ids and weights travel bit by bit in one byte buffer: int16 where `slots_per_rank` allows, else int32, and the
    weights' own dtype.

    Args:
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        nodes: of the ranks, for `traffic`; one if `None`.
        wire: what rows look like while they travel.
        chunks: parts that a rank's tokens are dispatched in, each by a call.
        debug_checks: look at ids on a GPU too, where it costs a sync.
        whole: the ranks that hold the experts, where `group` is one hop between some of them.
    """

    ordered = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        nodes: Nodes | None = None,
        *,
        wire: Wire = UNTOUCHED,
        chunks: int = 1,
        debug_checks: bool = False,
        whole: dist.ProcessGroup | None = None,
    ) -> None:
        self.group_name, self.num_ranks = group.group_name, group.size()
        self.rank = group.rank()
        self.wire = wire
        self.meter = TrafficMeter(group, nodes)
        self.agreement = Agreement(
            group,
            slots_per_rank,
            wire,
            chunks=chunks,
            check_ids=debug_checks,
            whole=whole,
            tally=self.meter.metadata,
        )
        self.slots_per_rank = slots_per_rank
        self.id_dtype = torch.int16 if slots_per_rank <= torch.iinfo(torch.int16).max else torch.int32

    @property
    def traffic(self) -> Traffic:
        return self.meter.traffic

    def dispatch(
        self, x: Tensor, slot_ids: Tensor, weights: Tensor, own_tokens: slice | None = None
    ) -> Pending[Dispatched]:
        """As every dispatcher's.

        Args:
            own_tokens: on the hop within a node, those of this rank. The others have entered the node here, and could
                have done so at any rank that they need.
        """
        self.agreement.check(x, slot_ids, weights)
        needed = needed_ranks(slot_ids, self.slots_per_rank, self.num_ranks)
        destination, token = self.agreement.pairs(needed)
        splits, _ = self.agreement.exchange_counts(needed.sum(dim=0), x, slot_ids, weights)
        rows = sum(splits.send) - splits.send[self.rank]
        if own_tokens is not None:
            entered = len(x) - (own_tokens.stop - own_tokens.start)
            rows = sum(splits.send) - entered - needed[own_tokens, self.rank].count_nonzero()
        handle = AllToAllHandle(token, splits, len(x), x.shape[1], self.meter.needs(needed, rows))

        row_ids = slot_ids[token] - (destination * self.slots_per_rank)[:, None]
        own = (row_ids >= 0) & (row_ids < self.slots_per_rank)
        row_ids = row_ids.masked_fill(~own, -1).to(self.id_dtype)
        row_weights = weights[token].masked_fill(~own, 0)
        packed = _pack(row_ids, row_weights.detach())
        routes = exchange(packed, splits, self.group_name, tally=self.meter.metadata)
        spread: Any = _Spread.apply(x, token, self.agreement.parts(splits.send))
        tokens = exchange(spread, splits, self.group_name, self.wire, self.meter.rows(handle.needs))

        def finish() -> Dispatched:
            ids, received_weights = _unpack(routes.wait(), slot_ids.shape[1], self.id_dtype, weights.dtype)
            received_weights = attach_exchange(
                row_weights, received_weights, splits, self.group_name, self.meter.metadata
            )
            return Dispatched(tokens.wait(), ids.long(), received_weights, handle)

        return Pending(finish)

    def refuse(self, device: torch.device, cause: BaseException | None = None) -> None:
        self.agreement.refuse(device, cause=cause)

    def combine(self, y: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        token, splits, num_tokens, hidden_size, needs = handle
        check_results(y, sum(splits.recv), hidden_size)
        rows = exchange(y, splits.reversed, self.group_name, self.wire.back, self.meter.rows(needs))
        parts = self.agreement.parts(splits.send)
        return Pending(lambda: _Gather.apply(rows.wait(), token, parts, num_tokens))  # type: ignore[arg-type]


def _pack(ids: Tensor, weights: Tensor) -> Tensor:
    """`ids [S, K]` and `weights [S, K]` as one `[S, bytes]` uint8 tensor."""
    return torch.cat([ids.contiguous().view(torch.uint8), weights.contiguous().view(torch.uint8)], dim=1)


def _unpack(packed: Tensor, top_k: int, id_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    id_bytes = top_k * id_dtype.itemsize
    ids, weights = packed[:, :id_bytes], packed[:, id_bytes:]
    # A view as a wider type needs storage that starts at a multiple of its size. `contiguous` does not promise that: a
    # slice of a single row is contiguous as it stands.
    ids, weights = (part.clone(memory_format=torch.contiguous_format) for part in (ids, weights))
    return ids.view(id_dtype), weights.view(weight_dtype)


def _sum_per_token(rows: Tensor, token: Tensor, rows_per_rank: list[int], num_tokens: int) -> Tensor:
    """Sum `rows [S, H]` of one token in rank order, in fp32 (float64 stays), rounded once: `[num_tokens, H]`.

    A rank's rows belong to distinct tokens, so that adding rank by rank is deterministic on every device.
    """
    accumulator_dtype = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(num_tokens, rows.shape[1], dtype=accumulator_dtype, device=rows.device)
    for rank_rows, rank_tokens in zip(rows.split(rows_per_rank), token.split(rows_per_rank), strict=True):
        total.index_add_(0, rank_tokens, rank_rows.to(accumulator_dtype))
    return total.to(rows.dtype)


class _Spread(Function):
    """`x [T, H]` to one row per (rank, token) pair, `[S, H]`; the backward pass sums as `_Gather` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, rows_per_rank: list[int]) -> Tensor:
        # A plain attribute: recompute would make a saved tensor again.
        ctx.token, ctx.rows_per_rank, ctx.num_tokens = token, rows_per_rank, len(x)
        return x[token]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _sum_per_token(grads[0], ctx.token, ctx.rows_per_rank, ctx.num_tokens), None, None


class _Gather(Function):
    """Rows `[S, H]` to their sum per token `[T, H]`; the backward pass spreads."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, rows_per_rank: list[int], num_tokens: int) -> Tensor:
        ctx.token = token
        return _sum_per_token(rows, token, rows_per_rank, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.token], None, None, None
