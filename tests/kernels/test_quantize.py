"""FP8 quantisation beside torch's own conversion, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossdock.kernels import FP8_GROUP, dequantize_fp8, quantize_fp8, quantize_fp8_reference

# Shapes `[..., D]`: 16 rows and 128 values are a block.
SHAPES = [(16, 128), (5, 300), (3, 7, 129), (1,), (1, 1), (0, 256), (4, 0)]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Magnitudes from far below the smallest e4m3 number of the group's scale to its largest."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 10 ** (6 * torch.rand(shape, generator=generator) - 5)).to(dtype)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    values, wanted_values = (pair[0].cpu().to(torch.float32) for pair in (got, wanted))
    torch.testing.assert_close(values, wanted_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit()[~values.isnan()], wanted_values.signbit()[~values.isnan()])
    assert torch.equal(got[1].cpu(), wanted[1].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_scales_are_those_of_torchs_conversion(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x = draw(shape, dtype)
    values, scales = quantize_fp8(x.to(device))
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (*shape[:-1], -(-shape[-1] // FP8_GROUP))
    assert_same((values, scales), quantize_fp8_reference(x))


def test_every_bfloat16_number_in_range_is_rounded_as_torch_does(device: torch.device) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() <= 448]
    # With 448 in each group, the scale is 1.
    groups = torch.nn.functional.pad(numbers, (0, -len(numbers) % 127)).view(-1, 127)
    groups = torch.cat([groups, torch.full((len(groups), 1), 448, dtype=torch.bfloat16)], dim=1)
    values, scales = quantize_fp8(groups.to(device))
    assert (scales == 1).all()
    assert_same((values, scales), (groups.float().to(torch.float8_e4m3fn), torch.ones(len(groups), 1)))


def test_ties_go_to_the_even_number(device: torch.device) -> None:
    x = torch.tensor([[448, 17, 19, 1.0625, 1.1875, 2**-10, 3 * 2**-10, 15.5 * 2**-10, -17]])
    assert quantize_fp8(x.to(device))[0].float().tolist() == [[448, 16, 20, 1, 1.25, 0, 2**-8, 2**-6, -16]]


@pytest.mark.parametrize("width", [128, 200])
def test_what_comes_back_is_within_half_a_step(width: int, device: torch.device) -> None:
    x = draw((40, width), torch.float32).to(device)
    values, scales = quantize_fp8(x)
    back = dequantize_fp8(values, scales, torch.float32)
    step = scales.repeat_interleave(FP8_GROUP, dim=1)[:, :width] * 2**-9
    assert ((back - x).abs() <= torch.maximum(x.abs() * 2**-4, step / 2) * (1 + 1e-5)).all()
    assert dequantize_fp8(values, scales, torch.bfloat16).dtype == torch.bfloat16


def test_zeros_tiny_and_largest_numbers_stay_finite(device: torch.device) -> None:
    largest = torch.finfo(torch.float32).max  # rounding up leaves the range
    x = torch.zeros(5, 128)
    x[1], x[2], x[3], x[4, ::2] = 1e-38, 1e-45, -largest, largest
    result = quantize_fp8(x.to(device))
    assert_same(result, quantize_fp8_reference(x))
    back = dequantize_fp8(*result, torch.float32).cpu()
    assert back.isfinite().all()
    assert (back[0] == 0).all()
    torch.testing.assert_close(back[3:], x[3:], rtol=2**-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_rounds_up_beyond_the_range_is_the_largest_number(dtype: torch.dtype, device: torch.device) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = torch.full((1, 128), largest, dtype=dtype)
    x[0, ::2] *= -1
    x[0, 5] = float("nan")
    back = dequantize_fp8(*quantize_fp8(x.to(device)), dtype).cpu()
    assert torch.equal(back.isnan(), x.isnan())
    assert torch.equal(back.nan_to_num(), x.nan_to_num())
    again = dequantize_fp8(*quantize_fp8(back.to(device)), dtype).cpu()
    assert torch.equal(again.nan_to_num(), back.nan_to_num())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, from the interpreter
def test_nan_and_infinity_are_nan_in_their_places(device: torch.device) -> None:
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = float("nan"), float("-inf")
    for result in (quantize_fp8(x.to(device)), quantize_fp8_reference(x)):
        back = dequantize_fp8(*result, torch.float32).isnan()
        assert back[0].nonzero().flatten().tolist() == [3]
        assert back[1].nonzero().flatten().tolist() == [200]


def test_quantizing_again_changes_nothing(device: torch.device) -> None:
    once = dequantize_fp8(*quantize_fp8(draw((20, 300), torch.float32).to(device)), torch.bfloat16)
    assert torch.equal(dequantize_fp8(*quantize_fp8(once), torch.bfloat16), once)


def test_strided_rows_and_float64(device: torch.device) -> None:
    x = draw((6, 512), torch.float32)
    wanted = quantize_fp8_reference(x[:, 100:400])
    assert_same(quantize_fp8(x.to(device)[:, 100:400]), wanted)
    assert_same(quantize_fp8(x.t().contiguous().t().to(device)[:, 100:400]), wanted)
    assert_same(quantize_fp8(x[:, 100:400].double().to(device)), wanted)
