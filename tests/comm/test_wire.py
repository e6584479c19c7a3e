"""What rows look like while they travel: how far a value moves, what stays, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossdock.comm import Wire, WireDtype
from crossdock.kernels import FP8_GROUP

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 6, 127, 128, 130, 384, 1000)
# Half the distance of neighbouring numbers at 1: 8, 11 and 4 bits of precision.
ROUNDOFF: dict[WireDtype, float] = {"bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4}
WIRES = tuple(ROUNDOFF)


def _rows(num_rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of very different sizes, within fp16's range."""
    torch.manual_seed(seed)
    exponents = torch.randint(-10, 10, (num_rows, size)).double()
    return (torch.randn(num_rows, size, dtype=torch.float64) * exponents.exp2()).to(dtype)


def _travel(wire: Wire, rows: Tensor) -> Tensor:
    received = wire.decode(wire.encode(rows), rows.shape[1], rows.dtype)
    assert (received.shape, received.dtype) == (rows.shape, rows.dtype)
    return received


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIRES)
def test_a_value_moves_by_half_a_unit_in_the_last_place_at_most(name: WireDtype, dtype: torch.dtype) -> None:
    """`fp8`: e4m3 has normal numbers from 2^-6 and 2^-9 between those below; the largest of a group is scaled to more
    than 224. So the error is at most 2^-4 of the value, or 2^-10 / 224 of the group's largest."""
    for size in SIZES:
        for num_rows in (0, 1, 9):
            rows = _rows(num_rows, size, dtype)
            error = (_travel(Wire(name), rows).double() - rows.double()).abs()
            bound = ROUNDOFF[name] * rows.double().abs()
            if name == "fp8":
                padded = torch.nn.functional.pad(rows.double().abs(), (0, -size % FP8_GROUP))
                largest = padded.view(num_rows, padded.shape[1] // FP8_GROUP, FP8_GROUP).amax(dim=-1)
                bound = bound.maximum(2**-10 / 224 * largest.repeat_interleave(FP8_GROUP, dim=1)[:, :size])
            elif name == "fp16":
                bound = bound.clamp_min(2**-25)  # half the distance of its subnormal numbers
            assert (error <= bound).all(), f"{size} values"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIRES)
def test_what_has_travelled_travels_again_unchanged(name: WireDtype, dtype: torch.dtype) -> None:
    for size in SIZES:
        once = _travel(Wire(name), _rows(50, size, dtype))
        assert torch.equal(_travel(Wire(name), once), once)


def test_bytes_of_a_row() -> None:
    """Of `fp8` one byte a value, up to a multiple of 4, and 4 for each group of 128."""
    for dtype in DTYPES:
        for size in SIZES:
            rows, plain = _rows(3, size, dtype), size * dtype.itemsize
            sizes = {"same": plain, "bf16": 2 * size, "fp16": 2 * size}
            sizes["fp8"] = -(-size // 4) * 4 + -(-size // 128) * 4
            for name, expected in sizes.items():
                wire = Wire(name)  # pyright: ignore[reportArgumentType]
                sent = wire.encode(rows)
                assert wire.row_bytes(size, dtype) == min(expected, plain)
                assert sent.numel() * sent.itemsize == 3 * min(expected, plain), f"{name}, {size} of {dtype}"
                placeholder = wire.placeholder(rows)
                assert (placeholder.shape, placeholder.dtype) == (sent.shape, sent.dtype)
                assert (sent is rows) == (expected >= plain)


@pytest.mark.parametrize("name", WIRES)
def test_bad_numbers_stay_bad_and_stay_where_they_are(name: WireDtype) -> None:
    rows = _rows(4, 300, torch.float32)
    clean = _travel(Wire(name), rows)
    rows[0, 5], rows[1, 130], rows[2, 299] = torch.nan, torch.inf, -torch.inf
    bad = ~rows.isfinite()
    received = _travel(Wire(name), rows)
    assert torch.equal(~received.isfinite(), bad)
    # A bad number may have been its group's largest: the others then keep more of their precision, not less.
    assert ((received - rows)[~bad].abs() <= (clean - rows)[~bad].abs().clamp_min(1e-3)).all()


def test_what_is_beyond_the_range_becomes_a_bad_number() -> None:
    assert torch.equal(_travel(Wire("fp16"), torch.tensor([[7e4, -7e4]])), torch.tensor([[torch.inf, -torch.inf]]))
    assert not _travel(Wire("fp8"), torch.full((1, 64), 1e300, dtype=torch.float64)).isfinite().any()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        largest = torch.full((1, 64), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(_travel(Wire("fp8"), largest), largest), "what a value rounds up to is cut off there"


def test_zeros_and_the_smallest_numbers() -> None:
    wire = Wire("fp8")
    assert not _travel(wire, torch.zeros(2, 200)).any()
    rows = torch.zeros(2, 256)
    rows[:, 130] = 3.0
    assert torch.equal(_travel(wire, rows), rows)
    tiny = torch.full((1, 128), 1e-40)
    assert (_travel(wire, tiny) - tiny).abs().max() <= 2**-10 * 2**-126


def test_results_and_gradients_travel_so_on_demand() -> None:
    assert Wire("fp8").back == Wire()
    both = Wire("fp8", both=True)
    assert both.back == both
