"""The counting sort beside Python's own stable sort and the experts' `sort_routes`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossdock.experts.routes import sort_routes
from crossdock.kernels import RouteOrder, counting_sort, counting_sort_reference


def _random(tokens: int, top_k: int, slots: int) -> Tensor:
    return torch.randint(-1, slots, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))


# slot_ids [U, K], number of slots. A block has 128 routes.
CASES: dict[str, tuple[Tensor, int]] = {
    "one block": (_random(16, 8, 5), 5),
    "no multiple of a block": (_random(67, 4, 7), 7),
    "one route": (torch.tensor([[2]]), 4),
    "more slots than routes": (_random(10, 2, 40), 300),
    "all to one": (torch.full((150, 2), 3), 6),
    "first and last slot alone": (torch.tensor([0, 5]).repeat(100, 1), 6),
    "no routes": (torch.full((50, 3), -1), 4),
    "no tokens": (torch.empty(0, 4, dtype=torch.int64), 4),
    "no slots": (torch.full((3, 2), -1), 0),
    "descending": (torch.arange(199, -1, -1).view(100, 2) // 3, 67),
    "int32": (_random(40, 4, 9).int(), 9),
    "transposed": (_random(60, 4, 9).t(), 9),
}
cases = pytest.mark.parametrize(("slot_ids", "num_slots"), CASES.values(), ids=CASES)


def check(result: RouteOrder, slot_ids: Tensor, num_slots: int) -> None:
    flat = slot_ids.flatten().tolist()
    real = [route for route, slot in enumerate(flat) if slot >= 0]
    wanted = sorted(real, key=lambda route: flat[route])
    assert result.order.tolist() == wanted + [-1] * (len(flat) - len(wanted))
    assert result.counts.tolist() == [flat.count(slot) for slot in range(num_slots)]
    rows = {route: row for row, route in enumerate(wanted)}
    assert result.row_of_route.shape == slot_ids.shape
    assert result.row_of_route.flatten().tolist() == [rows.get(route, -1) for route in range(len(flat))]
    assert {tensor.dtype for tensor in result} == {torch.int64}


@cases
def test_routes_are_sorted_stably_and_counted(slot_ids: Tensor, num_slots: int, device: torch.device) -> None:
    check(counting_sort(slot_ids.to(device), num_slots), slot_ids, num_slots)


@cases
def test_the_reference_too(slot_ids: Tensor, num_slots: int) -> None:
    check(counting_sort_reference(slot_ids, num_slots), slot_ids, num_slots)


@cases
def test_order_and_counts_are_those_of_the_experts(slot_ids: Tensor, num_slots: int, device: torch.device) -> None:
    route, counts = sort_routes(slot_ids.long(), num_slots)
    result = counting_sort(slot_ids.to(device), num_slots)
    assert torch.equal(result.order[result.order >= 0].cpu(), route)
    assert torch.equal(result.counts.cpu(), counts)


def test_an_id_of_no_slot_is_no_route(device: torch.device) -> None:
    slot_ids = torch.tensor([[0, 4], [2**32, 1], [-7, 3]])
    for result in (counting_sort(slot_ids.to(device), 4), counting_sort_reference(slot_ids, 4)):
        check(result, torch.tensor([[0, -1], [-1, 1], [-1, 3]]), 4)
