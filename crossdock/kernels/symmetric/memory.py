"""What the kernels of this package take for memory: a table of addresses, a ring of slots in it, rows in a slot.

Every rank has one buffer of the same size, and a table of where all of them begin, as it sees them itself. A buffer
holds signals, which peers write, and then `num_slots` slots, which exchanges use in turn: exchange number `t`, its
ticket, has slot `t % num_slots`. A slot has room for the worst case, one row per (token, rank) pair: the rows of source
rank `s` are `s * capacity .. (s + 1) * capacity - 1`, of which its tokens take the first, in their order. Numbers that
change from one exchange to the next are in device memory, so that a CUDA graph can be replayed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossdock.kernels.quantize import FP8_GROUP
from crossdock.kernels.runtime import INTERPRETED, cdiv, jit, tl

__all__ = [
    "Ring",
    "RowLayout",
    "Status",
    "Window",
    "as_pointer",
    "as_words",
    "kernels_run",
    "next_power_of_two",
    "triton_dtype",
]

_ALIGNMENT = 128
_SIGNAL_BYTES = 8


@dataclass(frozen=True)
class Window:
    """The buffers of all ranks, as one of them sees them.

    Attributes:
        addresses: `[R]` int64 on the device: where each rank's buffer begins, at a multiple of 16.
        own: `[bytes]` uint8, this rank's.
        rank: this one.
        keep: what must live as long as the addresses.
    """

    addresses: Tensor
    own: Tensor
    rank: int
    keep: object = None

    @property
    def num_ranks(self) -> int:
        return len(self.addresses)


@dataclass(frozen=True)
class Status:
    """Whether a kernel has given up waiting.

    0, or `1 + rank` of the first that it waited for in vain; `2^16` more where it waited for that rank to be done with
    a slot. It stays: later kernels wait no more, write nothing to peers, and sums are NaN.

    Attributes:
        on_device: `[1]` int32.
        on_host: `[1]` int32 that the host can read without a sync: pinned where there is a GPU.
    """

    on_device: Tensor
    on_host: Tensor

    @property
    def code(self) -> int:
        """As the host sees it now: no operation of torch, and so no sync, and none that a capture or a mode sees."""
        return ctypes.c_int32.from_address(self.on_host.data_ptr()).value

    @classmethod
    def fresh(cls, device: torch.device) -> Status:
        on_device = torch.zeros(1, dtype=torch.int32, device=device)
        on_host = torch.zeros(1, dtype=torch.int32, pin_memory=True) if on_device.is_cuda else on_device
        return cls(on_device, on_host)


@dataclass(frozen=True)
class Ring:
    """Signals and slots of one rank's buffer, in bytes from its beginning.

    `arrived [num_slots, R]` int64: `ticket << 32 | rows` once a source's rows of an exchange are there.
    `released [num_slots, R]` int64: the ticket, once a rank reads nothing more of that exchange, anywhere. Tickets
    start at 1; `2^31` exchanges are more than a run has.
    """

    num_ranks: int
    num_slots: int
    slot_bytes: int

    @property
    def released_byte(self) -> int:
        return self.num_slots * self.num_ranks * _SIGNAL_BYTES

    @property
    def first_byte(self) -> int:
        """Where slot 0 begins."""
        return _aligned(2 * self.released_byte)

    @property
    def num_bytes(self) -> int:
        return self.first_byte + self.num_slots * self.slot_bytes

    def slot_of(self, ticket: int) -> int:
        """Where the slot of an exchange begins."""
        return self.first_byte + ticket % self.num_slots * self.slot_bytes


@dataclass(frozen=True)
class RowLayout:
    """The rows of a slot: values, and behind all of them the ids and weights of their routes.

    Attributes:
        num_ranks: `R`.
        capacity: rows of each source rank.
        hidden_size: `H`.
        top_k: `K`.
        wire: the dtype that values are stored in. `float8_e4m3fn` has a scale for each 128 of them, at the row's end.
        weights: the dtype of weights; ids are int32.
    """

    num_ranks: int
    capacity: int
    hidden_size: int
    top_k: int
    wire: torch.dtype
    weights: torch.dtype = torch.float32
    is_fp8: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_fp8", self.wire == torch.float8_e4m3fn)

    @property
    def num_rows(self) -> int:
        return self.num_ranks * self.capacity

    @property
    def scales_byte(self) -> int:
        """Where in a row the scales begin."""
        return cdiv(self.hidden_size, 4) * 4

    @property
    def row_bytes(self) -> int:
        """From one row to the next: a multiple of 16, for loads and stores of that size."""
        used = self.hidden_size * self.wire.itemsize
        if self.is_fp8:
            used = self.scales_byte + 4 * cdiv(self.hidden_size, FP8_GROUP)
        return cdiv(used, 16) * 16

    @property
    def ids_byte(self) -> int:
        return _aligned(self.num_rows * self.row_bytes)

    @property
    def weights_byte(self) -> int:
        return self.ids_byte + _aligned(4 * self.num_rows * self.top_k)

    @property
    def slot_bytes(self) -> int:
        return self.weights_byte + _aligned(self.weights.itemsize * self.num_rows * self.top_k)


def _aligned(num_bytes: int) -> int:
    return cdiv(num_bytes, _ALIGNMENT) * _ALIGNMENT


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(values: Tensor) -> Tensor:
    """The same bits as integers: kernels copy those without looking at them, NaN's payload included."""
    return values.view(_WORDS[values.dtype.itemsize])


def triton_dtype(dtype: torch.dtype):
    """Triton's name of a dtype."""
    return {
        torch.uint8: tl.uint8,
        torch.int16: tl.int16,
        torch.int32: tl.int32,
        torch.int64: tl.int64,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float64: tl.float64,
    }[dtype]


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def kernels_run(device: torch.device) -> bool:
    """Whether kernels can follow addresses of memory on `device`."""
    return tl is not None and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


@jit
def as_pointer(address, ELEMENT: tl.constexpr):
    """In a kernel: an address, or a pointer to something else, as a pointer to values of a dtype."""
    return address.to(tl.pointer_type(ELEMENT), bitcast=True)  # pyright: ignore[reportArgumentType]
