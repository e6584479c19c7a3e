"""Permute and unpermute beside the product with their 0/1 matrix in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossdock.kernels import counting_sort_reference, permute, permute_reference, unpermute, unpermute_reference
from tests.kernels.saving import kept_tensors


def _sorted(slot_ids: Tensor, num_slots: int, cut: bool = False) -> tuple[Tensor, Tensor]:
    order, counts, row_of_route = counting_sort_reference(slot_ids, num_slots)
    return (order[: int(counts.sum())] if cut else order), row_of_route


_IDS = torch.randint(-1, 6, (21, 3), generator=torch.Generator().manual_seed(0))
# order [M], row_of_route [U, K].
CASES: dict[str, tuple[Tensor, Tensor]] = {
    "rows of no route last": _sorted(_IDS, 6),
    "real routes only": _sorted(_IDS, 6, cut=True),
    "rows of no route between": (torch.tensor([1, -1, 3, -1, -1, 0]), torch.tensor([[5, 0], [-1, 2], [-1, -1]])),
    "one expert has all": _sorted(torch.zeros(9, 1, dtype=torch.int64), 4),
    "no route": _sorted(torch.full((5, 2), -1), 4),
    "no row": _sorted(torch.full((5, 2), -1), 4, cut=True),
    "no token": _sorted(torch.empty(0, 2, dtype=torch.int64), 4),
}
cases = pytest.mark.parametrize(("order", "row_of_route"), CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
FUNCTIONS = {"kernels": (permute, unpermute), "references": (permute_reference, unpermute_reference)}


def matrix(order: Tensor, row_of_route: Tensor) -> Tensor:
    """`[M, U]`: 1 where the row is one of the token's."""
    ones = torch.zeros(len(order), len(row_of_route), dtype=torch.float64)
    for token, rows in enumerate(row_of_route.tolist()):
        for row in rows:
            if row >= 0:
                ones[row, token] = 1
    return ones


def draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device, dtype).requires_grad_()


def assert_rounded_once(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Where all is in fp32 until the end, the error is half a unit in the last place of `dtype`."""
    assert got.dtype == dtype
    half_unit = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.detach().cpu().double(), wanted, rtol=half_unit * (1 + 1e-3), atol=1e-6)


@cases
@dtypes
@pytest.mark.parametrize("hidden", [1, 256, 300])
def test_both_and_their_gradients_are_the_products_with_the_matrix(
    order: Tensor, row_of_route: Tensor, dtype: torch.dtype, hidden: int, device: torch.device
) -> None:
    ones = matrix(order, row_of_route)
    where = (order.to(device), row_of_route.to(device))
    tokens, rows = (draw(n, hidden, dtype, device) for n in (len(row_of_route), len(order)))
    exact_tokens, exact_rows = (tensor.detach().cpu().double() for tensor in (tokens, rows))
    permuted = permute(tokens, *where)
    assert_rounded_once(permuted, ones @ exact_tokens, dtype)
    assert_rounded_once(torch.autograd.grad(permuted, tokens, rows)[0], ones.T @ exact_rows, dtype)
    summed = unpermute(rows, *where)
    assert_rounded_once(summed, ones.T @ exact_rows, dtype)
    assert_rounded_once(torch.autograd.grad(summed, rows, tokens)[0], ones @ exact_tokens, dtype)


@cases
def test_kernels_and_references_give_the_same_bits(order: Tensor, row_of_route: Tensor, device: torch.device) -> None:
    where = (order.to(device), row_of_route.to(device))
    tokens, rows = (draw(n, 70, torch.bfloat16, device) for n in (len(row_of_route), len(order)))
    assert torch.equal(permute(tokens, *where), permute_reference(tokens, *where))
    assert torch.equal(unpermute(rows, *where), unpermute_reference(rows, *where))


@pytest.mark.parametrize(("forth", "back"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_rows_of_no_route_are_zero_and_what_they_hold_is_never_read(forth, back, device: torch.device) -> None:
    order, row_of_route = (tensor.to(device) for tensor in CASES["rows of no route between"])
    permuted = forth(torch.ones(3, 40, device=device), order, row_of_route)
    assert permuted.sum(1).tolist() == [40, 0, 40, 0, 0, 40]
    permuted[order < 0] = float("nan")
    assert back(permuted, order, row_of_route).sum(1).tolist() == [80, 40, 0]


def test_the_indices_alone_are_kept(device: torch.device) -> None:
    where = tuple(tensor.to(device) for tensor in CASES["real routes only"])
    with kept_tensors() as kept:
        unpermute(permute(draw(21, 8, torch.float32, device), *where), *where)
    assert set(kept) == {tensor.data_ptr() for tensor in where}


def test_gradients_of_float64_are_exact() -> None:
    where = CASES["rows of no route between"]
    for function, rows in ((permute, 3), (unpermute, 6)):
        values = draw(rows, 4, torch.float64, torch.device("cpu"))
        assert torch.autograd.gradcheck(lambda x, function=function: function(x, *where), values)


def test_wrong_shapes_are_refused() -> None:
    order, row_of_route = CASES["rows of no route between"]
    for function, length in ((permute, 3), (unpermute, 6)):
        for arguments, name in (
            ((torch.ones(length + 1, 4), order, row_of_route), r"must be \["),
            ((torch.ones(length), order, row_of_route), r"must be \["),
            ((torch.ones(length, 4), order[None], row_of_route), "order"),
            ((torch.ones(length, 4), order, row_of_route[0]), "row_of_route"),
        ):
            with pytest.raises(ValueError, match=name):
                function(*arguments)
