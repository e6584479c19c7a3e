"""Kernels compile for a Hopper GPU, where there is none too, and use what it has."""

from __future__ import annotations

import pytest

from tests.kernels.hopper import SHARED_BYTES, Compiled, compile_for_hopper

pytest.importorskip("triton", reason="needs Triton: pip install triton")

LAUNCHES = "tests.kernels.launches"
PRODUCTS = {"_up_kernel", "_multiply_kernel", "_down_grad_kernel", "_outer_kernel"}


def fits(kernel: Compiled, spilled_bytes: int = 0) -> bool:
    """Its registers and shared memory are there."""
    return kernel.spilled_bytes <= spilled_bytes and kernel.shared_bytes <= SHARED_BYTES


def test_products_run_on_tensor_cores_with_operands_on_their_way() -> None:
    kernels = [kernel for kernel in compile_for_hopper(LAUNCHES, "usual_experts") if kernel.name in PRODUCTS]
    assert {kernel.name for kernel in kernels} == PRODUCTS
    for kernel in kernels:
        by_warpgroup, by_warp = kernel.tensor_cores
        assert by_warpgroup, kernel
        assert not by_warp, kernel
        assert fits(kernel), kernel
        # Matrices come by the copy engine, rows that are taken from tokens by 16-byte copies.
        assert (kernel.bulk_copies > 0) == (kernel.name != "_outer_kernel"), kernel
        assert (kernel.async_copies > 0) == (kernel.name != "_multiply_kernel"), kernel


@pytest.mark.slow
def test_default_tiles_fit_whatever_the_experts() -> None:
    kernels = compile_for_hopper(LAUNCHES, "default_tiles")
    assert {kernel.name for kernel in kernels} >= PRODUCTS
    assert [kernel for kernel in kernels if not fits(kernel, spilled_bytes=16)] == []


@pytest.mark.slow
def test_every_candidate_fits() -> None:
    kernels = [kernel for kernel in compile_for_hopper(LAUNCHES, "all_tiles") if kernel.name in PRODUCTS]
    assert len({str(kernel.constants) for kernel in kernels}) > 50
    assert [kernel for kernel in kernels if not fits(kernel, spilled_bytes=64)] == []


@pytest.mark.slow
def test_what_is_elementwise_compiles() -> None:
    kernels = compile_for_hopper(LAUNCHES, "elementwise")
    assert len({kernel.name for kernel in kernels}) == 9
    assert all(fits(kernel) for kernel in kernels)


@pytest.mark.slow
def test_one_of_everything_compiles() -> None:
    assert len({kernel.name for kernel in compile_for_hopper(LAUNCHES, "least_sizes")}) >= 10
