"""A double of the library DeepEP: its contract over torch.distributed, with every argument checked.

`Double()` has `ElasticBuffer`, `Buffer` and `Config`, with the names, defaults and assertions of DeepEP 2.1. What an
asynchronous exchange returns holds garbage until its event is waited for, rows of `ElasticBuffer` arrive in another
order each time, and what the real library leaves unwritten is NaN.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Double"]

E4M3 = torch.float8_e4m3fn


def _check(holds: Any, what: str) -> None:
    assert holds, f"DeepEP's contract: {what}"


class EventOverlap:
    """Fills in the results when it is waited for."""

    def __init__(self, double: Double, fill: Callable[[], None] | None) -> None:
        self._double, self._fill = double, fill
        if fill is not None:
            double.outstanding += 1

    def current_stream_wait(self) -> None:
        _check(self._fill is not None, "an event is waited for once, and only that of an asynchronous call")
        assert self._fill is not None
        self._fill()
        self._fill = None
        self._double.outstanding -= 1


class Config:
    """Chunk sizes; `Buffer`'s."""

    def __init__(self, num_sms: int, nvl_send: int, nvl_recv: int, rdma_send: int = 6, rdma_recv: int = 128) -> None:
        _check(num_sms % 2 == 0, "an even number of SMs")
        _check(0 < nvl_send < nvl_recv, "chunks that the receiver has room for")
        self._num_sms, self._nvl_recv, self._rdma_recv = num_sms, nvl_recv, rdma_recv
        self._nvl_send = nvl_send

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self._num_sms // 2 * min(num_ranks, 8) * self._nvl_recv * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        _check(num_ranks > 8, "built without NVSHMEM: no RDMA sizes")
        return self._num_sms // 2 * num_ranks // 8 * self._rdma_recv * hidden_bytes * 2


class EPHandle:
    """`ElasticBuffer`'s handle: attributes, tensors among them."""

    topk_idx: Tensor

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Double:
    """The module `deep_ep`.

    Args:
        dtypes: of tokens; the real library takes bfloat16 alone, others allow comparisons with fewer roundings.
        elastic: whether there is `ElasticBuffer`.
        plain: whether `Buffer` has `get_dispatch_layout`.

    Attributes:
        calls: how often each method was called.
        buffers: every buffer made, in order.
        outstanding: asynchronous calls whose event has not been waited for.
        alive: handles that something still refers to.
        num_sms: of each call that has them.
        chunks: of each call of `Buffer`, by name of the method.
    """

    __version__ = "2.1.0"

    def __init__(
        self, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,), *, elastic: bool = True, plain: bool = True
    ) -> None:
        self.dtypes = dtypes
        self.calls: Counter[str] = Counter()
        self.buffers: list[_Base] = []
        self.outstanding = 0
        self.num_sms: set[int] = set()
        self.chunks: set[tuple[str, int]] = set()
        # Recompute restores torch's own generator, and would see the same order.
        self.arrivals = torch.Generator().manual_seed(0)
        self._layouts: list[weakref.ref[Tensor]] = []
        self.Config = Config
        if elastic:
            self.ElasticBuffer: Any = type("ElasticBuffer", (_ElasticBuffer,), {"double": self})
        if plain:
            self.Buffer: Any = type("Buffer", (_Buffer,), {"double": self})
        else:
            self.Buffer = type("Buffer", (), {})

    @property
    def alive(self) -> int:
        return sum(layout() is not None for layout in self._layouts)

    def made_handle(self, layout: Tensor) -> None:
        self._layouts.append(weakref.ref(layout))


def _data(tensor: Any, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> None:
    _check(
        isinstance(tensor, Tensor) and tensor.dtype in dtypes,
        f"one of {dtypes}, not {getattr(tensor, 'dtype', tensor)}",
    )
    _check(tensor.is_contiguous(), "contiguous")
    _check(tensor.device.type == "cpu", "on the device of the group")
    _check(not tensor.requires_grad, "no graph goes through the library")
    _check(tensor.dim() == len(shape), f"{len(shape)} dimensions, not {tensor.dim()}")
    _check(all(a in (None, b) for a, b in zip(shape, tensor.shape, strict=True)), f"{shape}, not {tuple(tensor.shape)}")


class _Base:
    """What both APIs have in common: rows to ranks and back, in (rank, token) order."""

    double: Double

    def __init__(self, group: dist.ProcessGroup, explicitly_destroy: bool) -> None:
        self.group, self.num_ranks, self.rank = group, group.size(), group.rank()
        self.explicitly_destroy, self.destroyed = explicitly_destroy, False
        self.number = len(self.double.buffers)
        self.double.buffers.append(self)
        dist.barrier(group)

    def destroy(self) -> None:
        _check(self.explicitly_destroy, "destroy() needs explicitly_destroy")
        _check(not self.destroyed, "a buffer is destroyed once")
        dist.barrier(self.group)
        self.destroyed = True

    def begin(self, name: str) -> None:
        _check(not self.destroyed, "a buffer is not used after destroy()")
        self.double.calls[name] += 1

    def tokens(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """`x`, checked, and its scales."""
        if isinstance(x, tuple):
            values, scales = x
            _data(values, (E4M3,), None, None)
            _data(scales, (torch.float32,), len(values), values.shape[1] // 128)
        else:
            values, scales = x, None
            _data(values, self.double.dtypes, None, None)
        _check(len(values) > 0, "a rank sends a token at least: the library's tests never send none")
        _check(values.shape[1] % 256 == 0, "a multiple of 256")
        return values, scales

    def routes(self, topk_idx: Any, topk_weights: Any, num_tokens: int, num_experts: int) -> None:
        _data(topk_idx, (torch.int64,), num_tokens, None)
        _data(topk_weights, self.weight_dtypes, num_tokens, topk_idx.shape[1])
        _check(0 < topk_idx.shape[1] <= 32, "K <= 32")
        _check(num_experts % self.num_ranks == 0 and num_experts <= 2048, "experts divide over the ranks, 2048 at most")
        _check(num_experts // self.num_ranks <= 256, "256 experts per rank at most")
        if topk_idx.numel():
            _check(int(topk_idx.min()) >= -1 and int(topk_idx.max()) < num_experts, "ids are -1 or of an expert")

    @property
    def weight_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.float64) if torch.float64 in self.double.dtypes else (torch.float32,)

    def send(self, rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
        width = rows.itemsize * math.prod(rows.shape[1:])
        received = torch.empty(sum(recv), width, dtype=torch.uint8)
        sent = rows.contiguous().view(-1).view(torch.uint8).view(len(rows), width)
        dist.all_to_all_single(received, sent, recv, send, group=self.group)
        return received.view(-1).view(rows.dtype).view(sum(recv), *rows.shape[1:])

    def finish(self, asynchronous: bool, *results: Tensor | None) -> tuple[list[Any], EventOverlap]:
        """What is returned: garbage now, and the results when the event is waited for; or the results at once."""
        if not asynchronous:
            return list(results), EventOverlap(self.double, None)
        returned = [None if result is None else _garbage(result) for result in results]

        def fill() -> None:
            with _disable_current_modes(), torch.no_grad():
                for place, result in zip(returned, results, strict=True):
                    if place is not None and result is not None:
                        place.data.copy_(result)

        return returned, EventOverlap(self.double, fill)

    def sum_back(self, rows: Tensor, weights: Tensor | None, in_rank: Tensor, recv: list[int]) -> tuple[Tensor, Any]:
        """`rows [U, H]` in (source rank, token) order, back and summed in rank order and fp32; weights likewise."""
        token, send = _rows(in_rank)
        wide = torch.promote_types(rows.dtype, torch.float32)
        out = torch.zeros(len(in_rank), rows.shape[1], dtype=wide)
        returned = self.send(rows, recv, send)
        for part, place in zip(returned.split(send), token.split(send), strict=True):
            out[place] += part.to(wide)
        if weights is None:
            return out.to(rows.dtype), None
        out_weights = torch.zeros(len(in_rank), weights.shape[1], dtype=weights.dtype)
        out_weights.index_add_(0, token, self.send(weights, recv, send))
        return out.to(rows.dtype), out_weights


def _garbage(like: Tensor) -> Tensor:
    if like.dtype == E4M3:
        return torch.full(like.shape, torch.nan).to(E4M3)
    return torch.full_like(like, torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max)


def _rows(in_rank: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens of `in_rank [T, R]` in (rank, token) order, and how many go to each rank."""
    return in_rank.t().nonzero()[:, 1], in_rank.sum(dim=0).tolist()


def _in_rank(topk_idx: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    ranks = torch.where(topk_idx < 0, num_ranks, topk_idx // (num_experts // num_ranks))
    return torch.zeros(len(topk_idx), num_ranks + 1, dtype=torch.bool).scatter_(1, ranks, True)[:, :num_ranks]


class _ElasticBuffer(_Base):
    """`ElasticBuffer`; on a single NVLink domain."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        explicitly_destroy: bool = False,
    ) -> None:
        sizes = (num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, sizes, group=group)
        _check(len(set(gathered)) == 1, f"all ranks make the same buffer, not {gathered}")
        _check(num_max_tokens_per_rank > 0 and hidden > 0 and num_topk > 0 and num_bytes is None, "a size")
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = sizes[:3]
        self.row_bytes = hidden * 9 // 8 if use_fp8_dispatch else max(d.itemsize for d in self.double.dtypes) * hidden
        super().__init__(group, explicitly_destroy)

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        _check(num_experts % self.num_ranks == 0, "experts divide over the ranks")
        return 6

    def dispatch(
        self,
        x: Any,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
    ) -> tuple[Any, ...]:
        self.begin("dispatch" if handle is None else "cached dispatch")
        _check(previous_event is None or allocate_on_comm_stream, "previous_event needs allocate_on_comm_stream")
        _check(cumulative_local_expert_recv_stats is None, "no statistics in these tests")
        values, scales = self.tokens(x)
        row_bytes = values.shape[1] * values.dtype.itemsize + (0 if scales is None else 4 * scales.shape[1])
        _check(row_bytes <= self.row_bytes, "rows that the buffer has room for")
        self.double.num_sms.add(num_sms)
        if handle is not None:
            _check(topk_idx is None and topk_weights is None, "no routes with a handle")
            _check(num_sms > 0, "num_sms is given with a handle")
            _check(not do_cpu_sync, "no CPU sync with a handle")
            self.owns(handle, do_expand)
            _check(len(values) == len(handle.topk_idx), "as many tokens as the handle's")
            return self._again(values, scales, handle, async_with_compute_stream)
        _check(num_experts is not None and topk_idx is not None, "routes without a handle")
        assert num_experts is not None
        assert topk_idx is not None
        self.routes(topk_idx, topk_weights, len(values), num_experts)
        assert topk_weights is not None
        most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        _check(len(values) <= most <= self.num_max_tokens_per_rank, "tokens that the buffer has room for")
        _check(topk_idx.shape[1] <= self.num_topk, "the top-k that the buffer has room for")
        _check(expert_alignment in (None, 1) and do_cpu_sync is not False, "exact numbers in these tests")
        local = num_experts // self.num_ranks
        token, send = _rows(_in_rank(topk_idx, num_experts, self.num_ranks))
        own_counts = torch.tensor(send)
        counts = torch.empty_like(own_counts)
        dist.all_to_all_single(counts, own_counts, group=self.group)
        recv = counts.tolist()
        ids = self.send(topk_idx[token], send, recv) - self.rank * local
        own = (ids >= 0) & (ids < local)
        ids = ids.masked_fill(~own, -1)
        weights = self.send(topk_weights[token], send, recv).masked_fill(~own, torch.nan)
        source = torch.arange(self.num_ranks).repeat_interleave(counts) * most
        source += self.send(token, send, recv)
        order = torch.randperm(len(source), generator=self.double.arrivals)
        ids, weights = ids[order], weights[order]
        metadata = torch.full((len(source), 2 + ids.shape[1]), -1, dtype=torch.int32)
        metadata[:, 0] = source[order]
        if do_expand:
            route = torch.cat([((ids == slot).flatten().nonzero()[:, 0]).flip(0) for slot in range(local)])
            metadata[route // ids.shape[1], 2 + route % ids.shape[1]] = torch.arange(len(route), dtype=torch.int32)
        made = EPHandle(
            buffer_number=self.number,
            do_expand=do_expand,
            num_experts=num_experts,
            expert_alignment=1,
            num_max_tokens_per_rank=most,
            num_sms=num_sms,
            topk_idx=topk_idx.clone(),
            psum_num_recv_tokens_per_scaleup_rank=counts.cumsum(0).int(),
            num_recv_tokens_per_expert_list=[int((ids == slot).sum()) for slot in range(local)],
            recv_src_metadata=metadata,
            token_metadata_at_forward=None,
            num_recv_tokens=len(source),
        )
        self.double.made_handle(metadata)
        rows, row_scales = self._arrive(values, scales, made)
        if do_expand:
            flat = torch.empty(int((metadata[:, 2:] >= 0).sum()), dtype=weights.dtype)
            flat[metadata[:, 2:][own[order]].long()] = weights[own[order]]
            results, event = self.finish(async_with_compute_stream, rows, row_scales, None, flat)
        else:
            results, event = self.finish(async_with_compute_stream, rows, row_scales, ids, weights)
        rows, row_scales, ids, weights = results
        return rows if row_scales is None else (rows, row_scales), ids, weights, made, event

    def _again(self, values: Tensor, scales: Tensor | None, handle: EPHandle, asynchronous: bool) -> tuple[Any, ...]:
        rows, row_scales = self._arrive(values, scales, handle)
        (rows, row_scales), event = self.finish(asynchronous, rows, row_scales)
        return rows if row_scales is None else (rows, row_scales), None, None, handle, event

    def _arrive(self, values: Tensor, scales: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """Rows in the handle's order, expanded where it is."""
        token, send = _rows(_in_rank(handle.topk_idx, handle.num_experts, self.num_ranks))
        recv, place = self._received(handle)
        received = [None if part is None else self.send(part[token], send, recv)[place] for part in (values, scales)]
        if handle.do_expand:
            slots = handle.recv_src_metadata[:, 2:]
            row, k = (slots >= 0).nonzero(as_tuple=True)
            source = torch.empty(len(row), dtype=torch.int64)
            source[slots[row, k].long()] = row
            received = [None if part is None else part[source] for part in received]
        rows, row_scales = received
        assert rows is not None
        return rows, row_scales

    def _received(self, handle: Any) -> tuple[list[int], Tensor]:
        """Rows from each rank, and of each row its place in (source rank, token) order."""
        source = handle.recv_src_metadata[:, 0]
        ends = handle.psum_num_recv_tokens_per_scaleup_rank
        return ends.diff(prepend=ends.new_zeros(1)).tolist(), source.argsort().argsort()

    def owns(self, handle: Any, do_expand: bool) -> None:
        _check(isinstance(handle, EPHandle), "a handle of ElasticBuffer")
        _check(handle.buffer_number == self.number, "a handle is used with the buffer that made it")
        _check(handle.do_expand == do_expand, "do_expand as in the dispatch that made the handle")

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self.begin("combine" if topk_weights is None else "combine with weights")
        self.owns(handle, handle.do_expand)
        self.double.num_sms.add(num_sms)
        slots = handle.recv_src_metadata[:, 2:]
        own = slots >= 0
        num_rows = int(own.sum()) if handle.do_expand else len(slots)
        _data(x, self.double.dtypes, num_rows, self.hidden)
        recv, place = self._received(handle)
        weights = topk_weights
        rows = x
        if handle.do_expand:
            wide = torch.promote_types(x.dtype, torch.float32)
            row, k = own.nonzero(as_tuple=True)
            rows = torch.zeros(len(slots), x.shape[1], dtype=wide)
            rows = rows.index_add(0, row, x[slots[row, k].long()].to(wide)).to(x.dtype)
            if topk_weights is not None:
                _data(topk_weights, self.weight_dtypes, num_rows)
                weights = torch.zeros(slots.shape, dtype=topk_weights.dtype)
                weights[row, k] = topk_weights[slots[row, k].long()]
        elif topk_weights is not None:
            _data(topk_weights, self.weight_dtypes, num_rows, slots.shape[1])
        in_order = place.argsort()
        in_rank = _in_rank(handle.topk_idx, handle.num_experts, self.num_ranks)
        weights = None if weights is None else weights[in_order]
        out, out_weights = self.sum_back(rows[in_order], weights, in_rank, recv)
        if out_weights is not None:
            out_weights = out_weights.masked_fill(handle.topk_idx < 0, torch.nan)
        results, event = self.finish(async_with_compute_stream, out, out_weights)
        return *results, event


class _Buffer(_Base):
    """`Buffer` within one NVLink domain."""

    num_sms = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        _check(num_nvl_bytes > 0 and num_rdma_bytes == 0, "bytes for NVLink alone")
        self.num_nvl_bytes = num_nvl_bytes
        super().__init__(group, explicitly_destroy)

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        _check(new_num_sms % 2 == 0, "the SM count must be even")
        cls.num_sms = new_num_sms

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(cls.num_sms, 6, 256, 6, 128)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(cls.num_sms, 4, 256, 6, 128)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self.begin("layout")
        _data(topk_idx, (torch.int64,), None, None)
        in_rank = _in_rank(topk_idx, num_experts, self.num_ranks)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(dim=0).int(), None, per_expert, in_rank, EventOverlap(self.double, None)

    def dispatch(
        self,
        x: Any,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self.begin("dispatch" if handle is None else "cached dispatch")
        _check(not allocate_on_comm_stream or (previous_event is not None and async_finish), "stream arguments")
        values, scales = self.tokens(x)
        config = config or self.get_dispatch_config(self.num_ranks)
        self.double.num_sms.add(config._num_sms)
        self.double.chunks.add(("dispatch", config._nvl_send))
        needed = config.get_nvl_buffer_size_hint(values.shape[1] * min(2, values.dtype.itemsize), self.num_ranks)
        _check(needed <= self.num_nvl_bytes, "rows that the buffer has room for")
        if handle is not None:
            _check(topk_idx is None and topk_weights is None, "no routes with a handle")
            recv, in_rank = self.owns(handle, config)
            _check(len(values) == len(in_rank), "as many tokens as the handle's")
            token, send = _rows(in_rank)
            arrived = [None if part is None else self.send(part[token], send, recv) for part in (values, scales)]
            (rows, row_scales), event = self.finish(async_finish, *arrived)
            return rows if row_scales is None else (rows, row_scales), None, None, None, None, event
        for layout, dtype in (
            (num_tokens_per_rank, torch.int32),
            (num_tokens_per_expert, torch.int32),
            (is_token_in_rank, torch.bool),
        ):
            _check(layout is not None and layout.dtype == dtype, "the layout of get_dispatch_layout")
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        num_experts = len(num_tokens_per_expert)
        self.routes(topk_idx, topk_weights, len(values), num_experts)
        assert topk_weights is not None
        _check(
            torch.equal(is_token_in_rank, _in_rank(topk_idx, num_experts, self.num_ranks)), "the layout of these ids"
        )
        local = num_experts // self.num_ranks
        token, send = _rows(is_token_in_rank)
        matrix: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(matrix, send, group=self.group)
        prefix = torch.tensor(matrix, dtype=torch.int32).cumsum(0).int()
        recv = [counts[self.rank] for counts in matrix]
        ids = self.send(topk_idx[token], send, recv) - self.rank * local
        own = (ids >= 0) & (ids < local)
        ids = ids.masked_fill(~own, -1)
        weights = self.send(topk_weights[token], send, recv).masked_fill(~own, 0)
        channels = torch.full((self.num_ranks, config._num_sms // 2), self.number, dtype=torch.int32)
        sources = self.send(token, send, recv).int()
        heads = torch.zeros(len(values), self.num_ranks, dtype=torch.int32)
        made = (prefix, channels, channels.clone(), sources, is_token_in_rank, heads)
        self.double.made_handle(sources)
        arrived = [None if part is None else self.send(part[token], send, recv) for part in (values, scales)]
        (rows, row_scales, *routes), event = self.finish(async_finish, *arrived, ids, weights)
        per_expert = [int((ids == slot).sum()) for slot in range(local)]
        return rows if row_scales is None else (rows, row_scales), *routes, per_expert, made, event

    def owns(self, handle: Any, config: Config) -> tuple[list[int], Tensor]:
        """Rows from each rank, and where this rank's tokens went."""
        _check(isinstance(handle, tuple) and len(handle) == 6, "a handle of Buffer")
        prefix, channels, _, _, in_rank, _ = handle
        _check(channels.shape[1] == config._num_sms // 2, "the SMs of the dispatch that made the handle")
        _check(bool((channels == self.number).all()), "a handle is used with the buffer that made it")
        return prefix[:, self.rank].diff(prepend=prefix.new_zeros(1)).tolist(), in_rank

    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self.begin("combine" if topk_weights is None else "combine with weights")
        config = config or self.get_combine_config(self.num_ranks)
        self.double.chunks.add(("combine", config._nvl_send))
        recv, in_rank = self.owns(handle, config)
        _data(x, self.double.dtypes, sum(recv), None)
        if topk_weights is not None:
            _data(topk_weights, self.weight_dtypes, len(x), None)
        results, event = self.finish(async_finish, *self.sum_back(x, topk_weights, in_rank, recv))
        return *results, event
