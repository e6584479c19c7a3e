"""Compiles every kernel of `crossdock.kernels.symmetric` for a Hopper GPU, without one; prints a line for each.

Run as a script, outside Triton's interpreter: it decides when a kernel is defined.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
RANKS: dict[str, Any] = {"NUM_RANKS": 8, "NUM_SLOTS": 2}
TILE = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 1024}
FP8_TILE = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 128}
LIMITS = {"LARGEST": 448.0, "SMALLEST_SCALE": 2.0**-126, "LARGEST_FINITE": 3.4e38}
ROUTES = RANKS | {"TOP_K": 8, "BLOCK_K": 8, "BLOCK_ROWS": 64}
LAYOUT = {"TOP_K": 8, "BLOCK_RANKS": 8, "BLOCK": 64}
SIGNALS = {"NUM_SLOTS": 2, "BLOCK_RANKS": 8}

DIVISIBLE = ("hidden", "row_stride", "first_byte", "slot_bytes")
POINTERS = {
    **dict.fromkeys(("row_ptr", "per_block_ptr", "status_ptr", "host_status_ptr"), "*i32"),
    **dict.fromkeys(("weights_ptr", "grads_ptr"), "*fp32"),
    "own_ptr": "*u8",
}


def cases() -> list[tuple[str, str, dict[str, Any], str]]:
    """Module, kernel, constants, and the type of the rows that it is given."""
    from triton import language as tl

    plain, fp8 = {"ELEMENT": tl.int16, "FP8": False}, {"ELEMENT": tl.uint8, "FP8": True}
    sums = {"SUM": tl.float32, "LARGEST": 3.38e38}
    ranks = {"BLOCK_RANKS": 8}
    return [
        ("layout", "_count_kernel", LAYOUT, "*i64"),
        ("layout", "_place_kernel", LAYOUT, "*i64"),
        ("signals", "_open_kernel", SIGNALS | {"NEVER_RELEASED": 65536}, "*i64"),
        ("signals", "_signal_kernel", SIGNALS, "*i64"),
        ("signals", "_signal_kernel", SIGNALS | {"counts_ptr": None}, "*i64"),
        ("signals", "_await_kernel", SIGNALS | {"COMPACT": True}, "*i64"),
        ("signals", "_await_kernel", SIGNALS | {"COMPACT": False}, "*i64"),
        ("rows", "_push_kernel", RANKS | TILE | LIMITS | plain, "*i16"),
        ("rows", "_push_kernel", RANKS | FP8_TILE | LIMITS | fp8, "*bf16"),
        ("rows", "_take_kernel", RANKS | ranks | TILE | plain | {"LARGEST": 3.38e38, "CONVERT": False}, "*i16"),
        ("rows", "_take_kernel", RANKS | ranks | FP8_TILE | fp8 | {"LARGEST": 3.38e38, "CONVERT": True}, "*bf16"),
        ("rows", "_offer_kernel", RANKS | ranks | TILE | LIMITS | plain, "*i16"),
        ("rows", "_offer_kernel", RANKS | ranks | FP8_TILE | LIMITS | fp8, "*bf16"),
        ("rows", "_pull_kernel", RANKS | TILE | sums | plain | {"ELEMENT": tl.bfloat16}, "*bf16"),
        ("rows", "_pull_kernel", RANKS | FP8_TILE | sums | fp8, "*bf16"),
        ("routes", "_push_kernel", ROUTES | {"WEIGHT": tl.float32}, "*i64"),
        ("routes", "_take_kernel", ROUTES | ranks | {"WEIGHT": tl.float32}, "*i64"),
        ("routes", "_offer_kernel", ROUTES | ranks | {"WEIGHT": tl.float32}, "*fp32"),
        ("routes", "_pull_kernel", ROUTES | {"WEIGHT": tl.float32}, "*i64"),
    ]


def compile_case(module: str, name: str, constants: dict[str, Any], rows: str) -> Any:
    """The compiled kernel, with arguments divisible by 16 where a launch of these sizes has them."""
    kernel = getattr(import_module(f"crossdock.kernels.symmetric.{module}"), name)
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        is_row = argument in ("x_ptr", "y_ptr", "out_ptr", "values_ptr")
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, rows if is_row else "*i64")
        else:
            signature[argument] = "i64" if argument in ("timeout", "slot_bytes") else "i32"
        divisible = signature[argument].startswith("*") or argument in DIVISIBLE
        if divisible and argument not in constants:
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, places, attributes), target=TARGET)


def sizes_of_one(module: str, name: str, constants: dict[str, Any]) -> dict[str, int]:
    """Numbers that are 1 at a launch are constants to the compiler, which types them otherwise."""
    arguments = getattr(import_module(f"crossdock.kernels.symmetric.{module}"), name).arg_names
    variable = [name for name in arguments if name not in constants and not name.endswith("_ptr")]
    return dict.fromkeys((name for name in variable if name not in ("timeout", "slot_bytes")), 1)


def main() -> None:
    for case in cases():
        compiled = compile_case(*case)
        assert compiled.asm["cubin"]
        lines = compiled.asm["ptx"].splitlines()
        accesses = [
            operation + width
            for operation in ("ld", "st")
            for width in (".v4.b32", ".b32", ".b16", ".b8")
            if any(f"{operation}.global{width}" in line for line in lines)
        ]
        compile_case(*case[:2], case[2] | sizes_of_one(*case[:3]), case[3])
        print(*case[:2], *accesses, *(["spills"] if any("st.local" in line for line in lines) else []))


if __name__ == "__main__":
    main()
