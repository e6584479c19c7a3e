"""DeepEP's two APIs, one class each: exchanges that are started and end with their event."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.kernels import quantize_fp8

__all__ = ["Buffers", "DeepEPOptions", "ElasticBuffers", "PlainBuffers", "Received", "Template"]

# Beyond one NVLink domain of this size, `Buffer` needs room for RDMA; below, to ask for its size can fail.
_NVLINK_RANKS = 8
# Tokens that a channel of `Buffer` has room for, in the library's own configurations of one domain.
_NVLINK_ROOM = 256


@dataclass(frozen=True)
class DeepEPOptions:
    """How DeepEP is used; the same on all ranks."""

    api: Literal["auto", "elastic", "buffer"] = "auto"
    """`elastic`: `ElasticBuffer`; `buffer`: the older `Buffer`; `auto`: the first of them that there is."""
    num_sms: int = 0
    """SMs that an exchange may take, even; 0: the library's choice."""
    fp8_dispatch: bool = False
    """Send tokens in FP8 (e4m3, a scale for each 128 values); results and gradients stay in bf16."""
    expand: bool = False
    """Let rows arrive once per route, sorted by slot. Needs `ElasticBuffer`."""
    max_tokens_per_rank: int = 0
    """Room for so many tokens per rank from the start; a buffer that is too small is followed by a larger one."""
    dispatch_chunk: int = 0
    """Tokens that `Buffer` sends at a time over NVLink, to experts; 0: the library's choice."""
    combine_chunk: int = 0
    """Likewise, on their way back."""

    def __post_init__(self) -> None:
        if self.num_sms < 0 or self.num_sms % 2:
            raise ValueError(f"num_sms = {self.num_sms} must be even, or 0 for the library's choice")
        if self.max_tokens_per_rank < 0:
            raise ValueError(f"max_tokens_per_rank = {self.max_tokens_per_rank} must be 0 or more")
        if self.expand and self.api == "buffer":
            raise ValueError("expand needs api = 'elastic': DeepEP's Buffer has no expand mode")
        for name in ("dispatch_chunk", "combine_chunk"):
            if not 0 <= getattr(self, name) < _NVLINK_ROOM:
                raise ValueError(f"{name} = {getattr(self, name)} must be below {_NVLINK_ROOM}, or 0")
        if self.has_chunks and (self.expand or self.api == "elastic"):
            raise ValueError(
                "dispatch_chunk and combine_chunk need api = 'buffer': DeepEP's ElasticBuffer has no chunks"
            )

    @property
    def has_chunks(self) -> bool:
        """Whether a size of chunks is set, which `Buffer` alone has."""
        return bool(self.dispatch_chunk or self.combine_chunk)


class Template(NamedTuple):
    """A handle of the library without its tensors, and the buffer and settings that made it.

    The tensors travel apart from it, through autograd's saved tensors: under recompute, rows may arrive in another
    order than before, and the backward pass must use the handle of the rows that it has.
    """

    buffer: Any
    num_tokens: int
    num_sms: int
    rest: Any
    names: tuple[Any, ...]

    def handle(self, layout: Sequence[Tensor]) -> Any:
        """The library's handle, its tensors put back."""
        tensors = dict(zip(self.names, layout, strict=True))
        if isinstance(self.rest, tuple):
            return tuple(tensors.get(index, value) for index, value in enumerate(self.rest))
        handle = copy.copy(self.rest)
        vars(handle).update(tensors)
        return handle


class Received(NamedTuple):
    """What `Buffers.dispatch` started; tensors are not to be read before the event.

    `tokens [U, H]`, `scales [U, H / 128]` (or `[U, 0]`), `slot_ids [U, K']` int64, `weights [U, K']`, `tokens_per_slot
    [P/R]` int64, `layout`: the handle's tensors, which `template` lacks.
    """

    tokens: Tensor
    scales: Tensor
    slot_ids: Tensor
    weights: Tensor
    tokens_per_slot: Tensor
    layout: list[Tensor]
    template: Template
    event: Any


class _Room(NamedTuple):
    """What a buffer has room for."""

    tokens: int
    hidden: int
    top_k: int

    def covers(self, other: _Room) -> bool:
        return all(mine >= needed for mine, needed in zip(self, other, strict=True))


class Buffers:
    """One API of the library on one group: exchanges that are started and end with their event.

    A rank without tokens sends one without routes instead: the library's own tests never send none.

    Args:
        library: the module `deep_ep`.
        group: the expert-parallel ranks.
        options: the same on all ranks.

    Attributes:
        takes_chunks: whether it sends in chunks, whose sizes can be set.
    """

    takes_chunks: ClassVar[bool] = False

    def __init__(self, library: Any, group: dist.ProcessGroup, options: DeepEPOptions) -> None:
        self.library, self.group, self.options = library, group, options
        self.made: list[tuple[_Room, Any]] = []

    @staticmethod
    def check_ranks(library: Any, num_ranks: int) -> None:
        """Raises ValueError where this API does not run on so many ranks."""

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor, slots_per_rank: int, most_tokens: int) -> Received:
        """Send `x [T, H]` to the ranks of its `slot_ids [T, K]` (global, -1 is no route) with `weights [T, K]`.

        Args:
            x: in the dtype that the library takes.
            slot_ids: int64.
            weights: fp32.
            slots_per_rank: `P/R`.
            most_tokens: of any rank, the same on all of them: too small a buffer makes all of them make a new one.
        """
        num_tokens, (hidden, top_k) = len(x), (x.shape[1], slot_ids.shape[1])
        if not num_tokens:
            x, slot_ids, weights = (
                x.new_zeros(1, hidden),
                slot_ids.new_full((1, top_k), -1),
                weights.new_zeros(1, top_k),
            )
        buffer, room = self._buffer(_Room(max(most_tokens, 1, self.options.max_tokens_per_rank), hidden, top_k))
        sent = quantize_fp8(x) if self.options.fp8_dispatch else x.contiguous()
        rows, ids, row_weights, per_slot, handle, num_sms, event = self._start(
            buffer, room, sent, slot_ids.contiguous(), weights.contiguous(), self.group.size() * slots_per_rank
        )
        tokens, scales = rows if isinstance(rows, tuple) else (rows, x.new_empty(len(rows), 0))
        counts = torch.tensor(per_slot, dtype=torch.int64, device=x.device)
        if self.options.expand:
            slots = torch.arange(slots_per_rank, device=x.device)
            ids = slots.repeat_interleave(counts, output_size=sum(per_slot))[:, None]
            row_weights = row_weights[:, None]
        layout, template = _take_apart(handle, buffer, num_tokens, num_sms)
        return Received(tokens, scales, ids, row_weights, counts, layout, template, event)

    def dispatch_again(self, rows: Tensor, template: Template, layout: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Send `rows [T, H]` where the handle's tokens went: what arrives `[U, H]`, in the same order; the event."""
        rows = rows.contiguous() if len(rows) else rows.new_zeros(1, rows.shape[1])
        return self._start_again(template.buffer, rows, template.handle(layout), template.num_sms)

    def combine(
        self, y: Tensor, weights: Tensor | None, template: Template, layout: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Send `y [U, H]` back and sum per token: `[T, H]`; `weights [U, K']` likewise, `[T, K]`; the event."""
        if weights is not None:
            weights = (weights[:, 0] if self.options.expand else weights).contiguous()
        handle = template.handle(layout)
        out, out_weights, event = self._start_back(template.buffer, y.contiguous(), handle, weights, template.num_sms)
        return out[: template.num_tokens], None if out_weights is None else out_weights[: template.num_tokens], event

    def destroy(self) -> None:
        """Free the buffers, oldest first. Collective."""
        while self.made:
            _, buffer = self.made.pop(0)
            buffer.destroy()

    def _buffer(self, need: _Room) -> tuple[Any, _Room]:
        """The newest buffer, or a new one. All ranks ask for the same room, so that all make one or none does."""
        if not self.made or not self.made[-1][0].covers(need):
            # The former ones stay, since handles refer to them; twice the tokens keeps them few and small.
            room = need if not self.made else _Room(2 * need.tokens, *map(max, need[1:], self.made[-1][0][1:]))
            self.made.append((room, self._make(room)))
        room, buffer = self.made[-1]
        return buffer, room

    def _make(self, room: _Room) -> Any:
        raise NotImplementedError

    def _start(
        self, buffer: Any, room: _Room, x: Any, slot_ids: Tensor, weights: Tensor, num_slots: int
    ) -> tuple[Any, Any, Any, list[int], Any, int, Any]:
        raise NotImplementedError

    def _start_again(self, buffer: Any, rows: Tensor, handle: Any, num_sms: int) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _start_back(
        self, buffer: Any, y: Tensor, handle: Any, weights: Tensor | None, num_sms: int
    ) -> tuple[Tensor, Tensor | None, Any]:
        raise NotImplementedError


class ElasticBuffers(Buffers):
    """`ElasticBuffer`."""

    def _make(self, room: _Room) -> Any:
        # Sized for bf16 with FP8 as well: the gradients of results are dispatched in bf16.
        return self.library.ElasticBuffer(
            self.group,
            num_max_tokens_per_rank=room.tokens,
            hidden=room.hidden,
            num_topk=room.top_k,
            use_fp8_dispatch=False,
            explicitly_destroy=True,
        )

    def _start(
        self, buffer: Any, room: _Room, x: Any, slot_ids: Tensor, weights: Tensor, num_slots: int
    ) -> tuple[Any, Any, Any, list[int], Any, int, Any]:
        num_sms = self.options.num_sms or buffer.get_theoretical_num_sms(num_slots, slot_ids.shape[1])
        rows, ids, row_weights, handle, event = buffer.dispatch(
            x,
            topk_idx=slot_ids,
            topk_weights=weights,
            num_experts=num_slots,
            num_max_tokens_per_rank=room.tokens,
            expert_alignment=1,
            num_sms=num_sms,
            async_with_compute_stream=True,
            do_cpu_sync=True,
            do_expand=self.options.expand,
        )
        return rows, ids, row_weights, list(handle.num_recv_tokens_per_expert_list), handle, num_sms, event

    def _start_again(self, buffer: Any, rows: Tensor, handle: Any, num_sms: int) -> tuple[Tensor, Any]:
        arriving, _, _, _, event = buffer.dispatch(
            rows, handle=handle, num_sms=num_sms, async_with_compute_stream=True, do_expand=self.options.expand
        )
        return arriving, event

    def _start_back(
        self, buffer: Any, y: Tensor, handle: Any, weights: Tensor | None, num_sms: int
    ) -> tuple[Tensor, Tensor | None, Any]:
        return buffer.combine(y, handle=handle, topk_weights=weights, num_sms=num_sms, async_with_compute_stream=True)


class PlainBuffers(Buffers):
    """`Buffer`; its size depends on `H` alone."""

    takes_chunks = True

    def __init__(self, library: Any, group: dist.ProcessGroup, options: DeepEPOptions) -> None:
        super().__init__(library, group, options)
        if options.num_sms:
            library.Buffer.set_num_sms(options.num_sms)
        self.check_ranks(library, group.size())
        self.dispatch_config = library.Buffer.get_dispatch_config(group.size())
        self.combine_config = library.Buffer.get_combine_config(group.size())
        if options.has_chunks and group.size() > _NVLINK_RANKS:
            raise ValueError(
                f"dispatcher 'deepep': dispatch_chunk and combine_chunk are for {_NVLINK_RANKS} ranks at most, one "
                f"NVLink domain, not for {group.size()}"
            )
        sms = options.num_sms or library.Buffer.num_sms
        if options.dispatch_chunk:
            self.dispatch_config = library.Config(sms, options.dispatch_chunk, _NVLINK_ROOM)
        if options.combine_chunk:
            self.combine_config = library.Config(sms, options.combine_chunk, _NVLINK_ROOM)

    @staticmethod
    def check_ranks(library: Any, num_ranks: int) -> None:
        try:
            library.Buffer.get_dispatch_config(num_ranks)
            library.Buffer.get_combine_config(num_ranks)
        except AssertionError as error:
            raise ValueError(f"DeepEP's Buffer does not run on {num_ranks} ranks ({error}); use 'alltoall'") from error

    def _make(self, room: _Room) -> Any:
        configs, row_bytes, ranks = (self.dispatch_config, self.combine_config), 2 * room.hidden, self.group.size()
        nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
        rdma = 0
        if ranks > _NVLINK_RANKS:
            rdma = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
        return self.library.Buffer(self.group, nvlink, rdma, explicitly_destroy=True)

    def _buffer(self, need: _Room) -> tuple[Any, _Room]:
        return super()._buffer(_Room(0, need.hidden, 0))

    def _start(
        self, buffer: Any, room: _Room, x: Any, slot_ids: Tensor, weights: Tensor, num_slots: int
    ) -> tuple[Any, Any, Any, list[int], Any, int, Any]:
        per_rank, per_rdma_rank, per_slot, in_rank, _ = buffer.get_dispatch_layout(slot_ids, num_slots)
        rows, ids, row_weights, own_per_slot, handle, event = buffer.dispatch(
            x,
            topk_idx=slot_ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_slot,
            expert_alignment=1,
            config=self.dispatch_config,
            async_finish=True,
        )
        return rows, ids, row_weights, list(own_per_slot), handle, 0, event

    def _start_again(self, buffer: Any, rows: Tensor, handle: Any, num_sms: int) -> tuple[Tensor, Any]:
        # A handle knows the channels, and so the SMs, of the configuration that made it.
        arriving, *_, event = buffer.dispatch(rows, handle=handle, config=self.dispatch_config, async_finish=True)
        return arriving, event

    def _start_back(
        self, buffer: Any, y: Tensor, handle: Any, weights: Tensor | None, num_sms: int
    ) -> tuple[Tensor, Tensor | None, Any]:
        return buffer.combine(y, handle, topk_weights=weights, config=self.combine_config, async_finish=True)


def _take_apart(handle: Any, buffer: Any, num_tokens: int, num_sms: int) -> tuple[list[Tensor], Template]:
    """The tensors of a handle, and the rest: `Buffer` gives a tuple, `ElasticBuffer` an object with attributes."""
    parts = dict(enumerate(handle)) if isinstance(handle, tuple) else vars(handle)
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    rest = {name: None if name in tensors else value for name, value in parts.items()}
    if isinstance(handle, tuple):
        kept: Any = tuple(rest.values())
    else:
        kept = copy.copy(handle)
        vars(kept).update(rest)
    return list(tensors.values()), Template(buffer, num_tokens, num_sms, kept, tuple(tensors))
