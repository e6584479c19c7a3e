"""Each grouped kernel beside its reference in float64, with tails, idle slots, rows of nobody and poisoned outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.kernels import (
    KERNELS,
    ROW_BUCKETS,
    Gating,
    Tiles,
    TileTable,
    bucket_of,
    candidates,
    counting_sort,
    default_tiles,
    invert_order,
    invert_order_reference,
)
from crossdock.kernels.grouped import (
    RowValues,
    SlotMatrices,
    SlotRows,
    down_gradient,
    down_gradient_reference,
    multiply,
    multiply_reference,
    outer,
    outer_reference,
    row_tiles,
    row_tiles_reference,
    up_projection,
    up_projection_reference,
)

TILES = Tiles(32, 32, 32, 4, 2)
TOP_K, HIDDEN, INNER = 3, 80, 48
# Relative norm of the difference from float64.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
# Rows of each slot: tails, nobody's, more than a tile, exactly a tile; the last routes are none.
COUNTS = {"uneven": [5, 0, 70, 32, 1], "one slot": [90], "idle": [0, 0, 0], "idle at the ends": [0, 40, 0]}

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
transposed = pytest.mark.parametrize("transposed", [False, True], ids=["rows together", "columns together"])
biased = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])

_deterministic: Any = torch.utils.deterministic


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every tensor that torch allocates without a value is NaN."""
    enabled, fill = torch.are_deterministic_algorithms_enabled(), _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled)
    _deterministic.fill_uninitialized_memory = fill


def draw(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def rows_of(counts: list[int], device: torch.device) -> SlotRows:
    """So many routes per slot, of tokens in no order, then routes that are none."""
    real = sum(counts)
    num_routes = -(-(real + 7) // TOP_K) * TOP_K
    order = torch.full((num_routes,), -1)
    order[:real] = torch.randperm(num_routes)[:real]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return SlotRows(order.to(device), ends.to(device), TOP_K)


def matrices_of(num_slots: int, height: int, width: int, *, transposed: bool, **options: Any) -> SlotMatrices:
    matrices = draw(num_slots, height, width, **options) * height**-0.5
    return SlotMatrices.of(matrices.mT.contiguous().mT if transposed else matrices)


def exact(*values: Any) -> list[Any]:
    """Floating tensors in float64, on the CPU; all else as it is, on the CPU."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu().double() if value.is_floating_point() else value.cpu()
        if isinstance(value, (SlotMatrices, SlotRows, RowValues)):
            return type(value)(*(convert(part) for part in value))
        return value

    return [convert(value) for value in values]


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, real: int | None = None) -> None:
    """Of the first `real` rows."""
    got, wanted = got.cpu().double()[:real], wanted[:real]
    assert got.isfinite().all()
    assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@counts
@pytest.mark.parametrize("block_rows", [16, 64])
def test_tiles_cover_each_slots_rows(counts: list[int], block_rows: int, device: torch.device) -> None:
    rows = rows_of(counts, device)
    ours, wanted = row_tiles(rows, block_rows), row_tiles_reference(rows, block_rows)
    count = int(wanted.num_tiles)
    assert int(ours.num_tiles) == count <= ours.max_tiles
    assert torch.equal(ours.slot[:count], wanted.slot[:count])
    assert torch.equal(ours.row[:count], wanted.row[:count])


def test_many_slots_have_tiles_in_order(device: torch.device) -> None:
    rows = rows_of(torch.randint(0, 300, (37,)).tolist(), device)
    ours, wanted = row_tiles(rows, 16), row_tiles_reference(rows, 16)
    count = int(wanted.num_tiles)
    assert int(ours.num_tiles) == count
    assert torch.equal(ours.row[:count], wanted.row[:count])
    assert torch.equal(ours.slot[:count], wanted.slot[:count])


@dtypes
@counts
@transposed
@biased
@pytest.mark.parametrize(
    ("gating", "gather"),
    [(Gating(), True), (Gating(), False), (Gating("quick_gelu", True, 7.0, 1.0), True), (Gating(gated=False), True)],
    ids=["silu", "rows as they are", "gpt-oss", "ungated"],
)
def test_up_projection(
    dtype: torch.dtype,
    counts: list[int],
    transposed: bool,
    bias: bool,
    gating: Gating,
    gather: bool,
    device: torch.device,
) -> None:
    rows, options = rows_of(counts, device), {"device": device, "dtype": dtype}
    num_tokens, width = len(rows.order) // TOP_K, INNER * (2 if gating.gated else 1)
    tokens = draw(num_tokens if gather else len(rows.order), HIDDEN, **options)
    matrices = matrices_of(len(counts), HIDDEN, width, transposed=transposed, **options)
    added = draw(len(counts), width, **options) if bias else None
    weights = torch.rand(num_tokens, TOP_K, device=device) if gather else None
    given = (tokens, matrices, added, weights, rows, gating)
    tiled = row_tiles(rows, TILES.rows)
    ours = up_projection(*given, TILES, tiled, gather=gather)
    wanted = up_projection_reference(*exact(*given), gather=gather)
    for got, reference in zip(ours, wanted, strict=True):
        assert got.dtype == dtype
        assert_near(got, reference, dtype, sum(counts))


@dtypes
@counts
@transposed
@biased
def test_multiply(dtype: torch.dtype, counts: list[int], transposed: bool, bias: bool, device: torch.device) -> None:
    rows, options = rows_of(counts, device), {"device": device, "dtype": dtype}
    values = draw(len(rows.order), INNER, **options)
    matrices = matrices_of(len(counts), INNER, HIDDEN, transposed=transposed, **options)
    added = draw(len(counts), HIDDEN, **options) if bias else None
    for weights in (torch.rand(len(rows.order) // TOP_K, TOP_K, device=device), None):
        given = (values, matrices, added, weights, rows)
        ours = multiply(*given, TILES, row_tiles(rows, TILES.rows))
        assert_near(ours, multiply_reference(*exact(*given)), dtype, sum(counts))


@dtypes
@counts
@transposed
@pytest.mark.parametrize("gating", [Gating(), Gating("quick_gelu", True, 0.5, 1.0), Gating(gated=False)], ids=str)
def test_down_gradient(
    dtype: torch.dtype, counts: list[int], transposed: bool, gating: Gating, device: torch.device
) -> None:
    rows, options = rows_of(counts, device), {"device": device, "dtype": dtype}
    num_tokens = len(rows.order) // TOP_K
    grad_y = draw(num_tokens, HIDDEN, **options)
    matrices = matrices_of(len(counts), HIDDEN, INNER, transposed=transposed, **options)
    pre = draw(len(rows.order), INNER * (2 if gating.gated else 1), **options)
    for weights in (torch.rand(num_tokens, TOP_K, device=device), None):
        given = (grad_y, matrices, weights, pre, rows, gating)
        ours = down_gradient(*given, TILES, row_tiles(rows, TILES.rows))
        for got, wanted in zip(ours, down_gradient_reference(*exact(*given)), strict=True):
            assert_near(got, wanted, dtype, sum(counts))


@dtypes
@counts
@pytest.mark.parametrize("gathered", ["left", "right", "none"])
def test_outer(dtype: torch.dtype, counts: list[int], gathered: str, device: torch.device) -> None:
    """Rows of nobody are NaN: 0 times that would be NaN too."""
    rows, options = rows_of(counts, device), {"device": device, "dtype": dtype}
    sides: list[RowValues] = []
    for side, width in (("left", INNER), ("right", HIDDEN)):
        gather = side == gathered
        values = draw(len(rows.order) // (TOP_K if gather else 1), width, **options)
        if not gather:
            values[sum(counts) :] = torch.nan
        sides.append(RowValues(values, gather))
    left, right = sides
    ours, wanted = outer(left, right, rows, TILES), outer_reference(*exact(left, right, rows))
    assert_near(ours, wanted, dtype)
    for slot, count in enumerate(counts):
        assert count or not ours[slot].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_computes_the_same(kernel: str, device: torch.device) -> None:
    """At a size that is no multiple of any tile."""
    rows, options = rows_of([130, 0, 20], device), {"device": device, "dtype": torch.bfloat16}
    pre, grad_y = draw(len(rows.order), 2 * INNER, **options), draw(len(rows.order) // TOP_K, HIDDEN, **options)
    weights = torch.rand(len(grad_y), TOP_K, device=device)
    up, down = (matrices_of(3, *shape, transposed=False, **options) for shape in ((HIDDEN, 2 * INNER), (INNER, HIDDEN)))
    h = draw(len(rows.order), INNER, **options)
    calls: dict[str, Callable[[Tiles], Tensor]] = {
        "up": lambda tiles: up_projection(
            grad_y, up, None, weights, rows, Gating(), tiles, row_tiles(rows, tiles.rows), gather=True
        )[1][:150],
        "down": lambda tiles: multiply(h, down, None, None, rows, tiles, row_tiles(rows, tiles.rows))[:150],
        "down_grad": lambda tiles: down_gradient(
            grad_y, down.mT, weights, pre, rows, Gating(), tiles, row_tiles(rows, tiles.rows)
        ).pre[:150],
        "up_grad": lambda tiles: multiply(pre, up.mT, None, None, rows, tiles, row_tiles(rows, tiles.rows))[:150],
        "up_weight_grad": lambda tiles: outer(RowValues(grad_y, True), RowValues(pre), rows, tiles),
        "down_weight_grad": lambda tiles: outer(RowValues(h), RowValues(grad_y, True), rows, tiles),
    }
    wanted = calls[kernel](TILES)
    for tiles in {each for bucket in ROW_BUCKETS for each in candidates(kernel, bucket)}:
        got = calls[kernel](tiles)
        assert (got - wanted).norm() <= 5e-3 * wanted.norm(), tiles


@pytest.mark.parametrize("num_routes", [0, 5, 3000])
def test_an_order_is_inverted(num_routes: int, device: torch.device) -> None:
    order = counting_sort(torch.randint(-1, 4, (num_routes, 1)).to(device), 4).order
    for invert in (invert_order, invert_order_reference):
        rows = invert(order, num_routes)
        assert rows.shape == (num_routes,)
        assert torch.equal(rows >= 0, torch.isin(torch.arange(num_routes).to(device), order))
        assert torch.equal(order[rows[rows >= 0]], (rows >= 0).nonzero().squeeze(1))


def test_tiles_are_chosen_by_rows_per_slot() -> None:
    assert [bucket_of(rows) for rows in (0, 16, 17, 300, 10**6)] == [16, 16, 64, 1024, 4096]
    own = Tiles(64, 64, 64, 4, 2)
    table = TileTable({("up", 64): own})
    assert table.choose("up", 40, 2) == own
    assert table.choose("up", 400, 2) == default_tiles("up", 400, 2)
    assert table.choose("down", 40, 2) == default_tiles("down", 40, 2)
    assert TileTable.from_json(table.to_json()).choose("up", 40, 2) == own
    assert TileTable.from_ints(table.to_ints()).choose("up", 40, 2) == own


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sideways": {"64": [64, 64, 64, 4, 2, 0]}}, "'sideways'.*up, down"),
        ({"up": {"65": [64, 64, 64, 4, 2, 0]}}, "65 rows per slot"),
        ({"up": {"64": [60, 64, 64, 4, 2, 0]}}, "rows = 60"),
        ({"up": {"64": [64, 64, 64, 3, 2, 0]}}, "num_warps = 3"),
        ({"up": {"64": [64, 64]}}, "no table of tiles"),
        ({"up": 3}, "no table of tiles"),
        ([], "no table of tiles"),
    ],
)
def test_a_table_that_cannot_be_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileTable.from_json(table)


def test_a_single_slot_may_have_any_stride(device: torch.device) -> None:
    rows = rows_of([40], device)
    values = draw(len(rows.order), HIDDEN, device=device, dtype=torch.float32)
    stored = draw(1, HIDDEN, INNER, device=device, dtype=torch.float32)
    strange = stored.as_strided(stored.shape, (1, INNER, 1))
    assert strange.is_contiguous()
    given = None, None, rows, TILES, row_tiles(rows, TILES.rows)
    assert torch.equal(
        multiply(values, SlotMatrices.of(strange), *given)[:40], multiply(values, SlotMatrices.of(stored), *given)[:40]
    )
