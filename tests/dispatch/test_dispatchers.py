"""Tokens travel to their slots and back: exactly, once per rank, in order, in a constant number of collectives.

One run of the workers per world size covers all cases in all dtypes; each test then looks at one property of what
they return, against a computation from all ranks' inputs in this process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.dispatch import Dispatcher, DispatchOptions, LocalDispatcher, build_dispatcher
from crossdock.kernels import runtime
from tests.dispatch.recorder import Recorder
from tests.ranks import RankPool

H = 6
RANKS_PER_NODE = 2
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Sizes and pattern of the routes; `slots` per rank, `0` for 2,048 experts spread over the ranks."""

    top_k: int = 3
    slots: int = 4
    pattern: str = "any"

    def slots_per_rank(self, world_size: int) -> int:
        return self.slots or -(-2048 // world_size)


CASES = {
    "any": Case(),
    "missing routes": Case(pattern="missing"),
    "no tokens on the first rank": Case(pattern="idle source"),
    "tokens on the last rank only": Case(pattern="one source"),
    "no tokens for the last rank": Case(pattern="idle destination"),
    "all tokens to the first rank": Case(pattern="one destination"),
    "no routes": Case(pattern="no routes"),
    "no tokens": Case(pattern="no tokens"),
    "one token per rank": Case(top_k=1, pattern="one token"),
    "one slot per rank": Case(top_k=2, slots=1),
    "all slots": Case(top_k=0),
    "2048 experts": Case(top_k=8, slots=0),
    "ids beyond int16": Case(slots=40_000, pattern="largest ids"),
    "strided": Case(pattern="strided"),
    "bad numbers": Case(pattern="bad numbers"),
}


class Inputs(NamedTuple):
    """`x [T, H]`, `slot_ids [T, K]`, `weights [T, K]` of one rank, and the gradient of its output `[T, H]`."""

    x: Tensor
    slot_ids: Tensor
    weights: Tensor
    grad: Tensor


def _inputs(name: str, dtype: torch.dtype, world_size: int, rank: int) -> Inputs:
    case = CASES[name]
    torch.manual_seed(1000 * list(CASES).index(name) + rank)
    num_tokens = 9 + 4 * rank
    match case.pattern:
        case "idle source":
            num_tokens *= rank != 0
        case "one source":
            num_tokens *= rank == world_size - 1
        case "no tokens":
            num_tokens = 0
        case "one token":
            num_tokens = 1
    slots_per_rank = case.slots_per_rank(world_size)
    num_slots = world_size * slots_per_rank
    top_k = case.top_k or num_slots
    scores = torch.rand(num_tokens, num_slots)
    match case.pattern:
        case "idle destination":
            scores[:, -slots_per_rank:] -= 2
        case "one destination":
            scores[:, :slots_per_rank] += 2
    slot_ids = scores.topk(top_k, dim=1).indices
    match case.pattern:
        case "missing":
            slot_ids[torch.rand(slot_ids.shape) < 0.5] = -1
            slot_ids[0] = -1
        case "no routes":
            slot_ids.fill_(-1)
        case "largest ids":
            slot_ids[:, -1] = torch.arange(num_tokens) % world_size * slots_per_rank + slots_per_rank - 1
    x = torch.randn(num_tokens, H, dtype=torch.float64).to(dtype)
    weights = torch.rand(num_tokens, top_k, dtype=torch.promote_types(dtype, torch.float32))
    weights[:, 0] *= 1e-40  # subnormal in fp32: bits survive only where nothing is computed
    grad = torch.randn(num_tokens, H, dtype=torch.float64).to(dtype)
    match case.pattern:
        case "bad numbers":
            x[::3] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0], dtype=dtype)
        case "strided":
            x, slot_ids, weights = (tensor.t().contiguous().t() for tensor in (x, slot_ids, weights))
            grad = torch.ones((), dtype=dtype).expand(num_tokens, H)
    return Inputs(x, slot_ids, weights, grad)


def _destinations(slot_ids: Tensor, slots_per_rank: int) -> list[set[int]]:
    return [{slot // slots_per_rank for slot in slots if slot >= 0} for slots in slot_ids.tolist()]


def _scales(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """What distinguishes the experts of these tests: a factor per global slot; 0 for no route."""
    return torch.where(slots < 0, 0, slots % 13 + 1).to(dtype) / 8


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _round_trip(dispatcher: Dispatcher, inputs: Inputs, first_slot: int) -> dict[str, Any]:
    """Experts that square: `y = x^2 sum_k w_k scale(slot_k)`; what arrived, the output, gradients, collectives."""
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    with Recorder() as recorder:
        marks = [0]

        def mark() -> None:
            marks.append(len(recorder.collectives()))

        arriving = dispatcher.dispatch(x, inputs.slot_ids, weights)
        mark()
        arrived = arriving.wait()
        mark()
        global_slots = torch.where(arrived.slot_ids < 0, -1, arrived.slot_ids + first_slot)
        factors = (arrived.weights * _scales(global_slots, arrived.weights.dtype)).sum(dim=1, keepdim=True)
        # As experts do: a row without routes is not looked at, whatever is in it.
        routed = (arrived.slot_ids >= 0).any(dim=1, keepdim=True)
        y = (arrived.tokens.masked_fill(~routed, 0).to(factors.dtype).square() * factors).to(x.dtype)
        if not inputs.x.is_contiguous():
            y = y.t().contiguous().t()
        returning = dispatcher.combine(y, arrived.handle)
        mark()
        out = returning.wait()
        mark()
        out.backward(inputs.grad)
        mark()
    assert x.grad is not None
    assert weights.grad is not None
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    return {
        "tokens": _bits(arrived.tokens),
        "tokens_shape": tuple(arrived.tokens.shape),
        "dtypes": (arrived.tokens.dtype, arrived.slot_ids.dtype, arrived.weights.dtype),
        "slot_ids": arrived.slot_ids.numpy(),
        "weights": _bits(arrived.weights),
        "out": _array(out),
        "grad_x": _array(x.grad),
        "grad_weights": _array(weights.grad),
        "collectives": [recorder.collectives()[start:end] for start, end in pairwise(marks)],
    }


def _all_cases(dispatcher_name: str) -> list[dict[str, Any]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    results = []
    for number, (name, case) in enumerate(CASES.items()):
        slots_per_rank = case.slots_per_rank(world_size)
        # `symmetric` is for one node.
        options = DispatchOptions(0 if dispatcher_name == "symmetric" else RANKS_PER_NODE)
        dispatcher = build_dispatcher(dispatcher_name, dist.group.WORLD, slots_per_rank, options)
        # Its kernels are interpreted here, which takes long: the dtypes in turn.
        dtypes = DTYPES[number % len(DTYPES) :][:1] if dispatcher_name == "symmetric" else DTYPES
        for dtype in dtypes:
            inputs = _inputs(name, dtype, world_size, rank)
            first, second = (_round_trip(dispatcher, inputs, rank * slots_per_rank) for _ in range(2))
            unequal = [key for key in first if key != "collectives" and not _same(first[key], second[key])]
            ones = torch.ones_like(inputs.x)
            ones[:, ::2] = 0.25
            arrived = dispatcher.dispatch(ones, inputs.slot_ids, inputs.weights).wait()
            routed = (arrived.slot_ids >= 0).any(dim=1, keepdim=True)
            identity = dispatcher.combine(arrived.tokens * routed, arrived.handle).wait()
            results.append(first | {"case": name, "dtype": dtype, "unequal": unequal, "identity": _array(identity)})
    return results


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return first == second


Results = tuple[int, list[list[dict[str, Any]]], str]


@pytest.fixture(
    scope="module",
    params=[("allgather", 3), ("alltoall", 2), ("alltoall", 3), ("alltoall", 4), ("hierarchical", 4)]
    + [("symmetric", 2)] * runtime.INTERPRETED,
    ids=lambda param: f"{param[0]}-{param[1]}-ranks",
)
def results(request: pytest.FixtureRequest, ranks: RankPool) -> Results:
    """World size, the results of each rank, and the dispatcher's name."""
    dispatcher_name, world_size = request.param
    return world_size, ranks.run(world_size, _all_cases, dispatcher_name), dispatcher_name


def test_what_arrives_is_exact_in_order_and_once_per_rank(results: Results) -> None:
    """Rows bit by bit in (source rank, position) order (`hierarchical`: the source's place first, then its node); the
    rank's own ids, foreign ones -1 with weight 0. `allgather` brings rows without a route as well."""
    world_size, by_rank, dispatcher_name = results
    source_ranks = list(range(world_size))
    if dispatcher_name == "hierarchical":
        source_ranks.sort(key=lambda source: divmod(source, RANKS_PER_NODE)[::-1])
    for rank, rank_results in enumerate(by_rank):
        for result in rank_results:
            slots_per_rank = CASES[result["case"]].slots_per_rank(world_size)
            sources = [_inputs(result["case"], result["dtype"], world_size, source) for source in source_ranks]
            tokens, ids, weights = [], [], []
            for source in sources:
                destinations = _destinations(source.slot_ids, slots_per_rank)
                needed = [dispatcher_name == "allgather" or rank in ranks for ranks in destinations]
                local = source.slot_ids[needed] - rank * slots_per_rank
                own = (source.slot_ids[needed] >= 0) & (local >= 0) & (local < slots_per_rank)
                tokens.append(source.x[needed])
                ids.append(local.masked_fill(~own, -1))
                weights.append(source.weights[needed].masked_fill(~own, 0))
            label = f"{result['case']}, {result['dtype']}, rank {rank}"
            assert result["tokens_shape"] == (sum(map(len, tokens)), H), label
            np.testing.assert_array_equal(result["tokens"], _bits(torch.cat(tokens)), label)
            np.testing.assert_array_equal(result["slot_ids"], torch.cat(ids), label)
            np.testing.assert_array_equal(result["weights"], _bits(torch.cat(weights)), label)
            weights_dtype = torch.promote_types(result["dtype"], torch.float32)
            assert result["dtypes"] == (result["dtype"], torch.int64, weights_dtype), label


def test_identity_experts_return_x_times_its_destinations(results: Results) -> None:
    world_size, by_rank, _ = results
    for rank, rank_results in enumerate(by_rank):
        for result in rank_results:
            slot_ids = _inputs(result["case"], result["dtype"], world_size, rank).slot_ids
            slots_per_rank = CASES[result["case"]].slots_per_rank(world_size)
            counts = np.array([len(ranks) for ranks in _destinations(slot_ids, slots_per_rank)])
            expected = counts.reshape(-1, 1) * np.where(np.arange(H) % 2 == 0, 0.25, 1.0)
            np.testing.assert_array_equal(result["identity"], expected, result["case"])


def test_output_and_gradients_equal_a_single_process(results: Results) -> None:
    world_size, by_rank, _ = results
    tolerances = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1.5e-2}
    for rank, rank_results in enumerate(by_rank):
        for result in rank_results:
            inputs = _inputs(result["case"], result["dtype"], world_size, rank)
            x, weights, grad = _array(inputs.x), _array(inputs.weights), _array(inputs.grad)
            real = inputs.slot_ids.numpy() >= 0
            scales = np.where(real, inputs.slot_ids.numpy() % 13 + 1, 0) / 8
            factors = (weights * scales).sum(axis=1, keepdims=True)
            routed = real.any(axis=1, keepdims=True)
            with np.errstate(invalid="ignore"):
                expected = {
                    "out": np.where(routed, x**2 * factors, 0),
                    "grad_x": np.where(routed, 2 * x * factors * grad, 0),
                    "grad_weights": np.where(real, (grad * x**2).sum(axis=1, keepdims=True) * scales, 0),
                }
            for key, value in expected.items():
                tolerance = tolerances[result["dtype"]]
                scale = np.abs(value[np.isfinite(value)]).max(initial=1e-36)  # above the subnormal numbers
                label = f"{key}: {result['case']}, {result['dtype']}, rank {rank}"
                np.testing.assert_allclose(result[key], value, 4 * tolerance, tolerance * scale, err_msg=label)


def test_number_of_collectives_does_not_depend_on_the_routing(results: Results) -> None:
    """The same on every rank, in every case, and nothing is exchanged about the routes on the way back."""
    _, by_rank, dispatcher_name = results
    all_results = [result for rank_results in by_rank for result in rank_results]
    counts = Counter(tuple(len(names) for names in result["collectives"]) for result in all_results)
    # `symmetric` exchanges counts alone.
    expected = {"allgather": (4, 0, 1, 0, 3), "alltoall": (3, 0, 1, 0, 3), "hierarchical": (3, 3, 2, 0, 6)}
    expected["symmetric"] = (1, 0, 0, 0, 0)
    assert list(counts) == [expected[dispatcher_name]], "dispatch, its wait, combine, its wait, backward"
    for result in all_results:
        *_, backward = result["collectives"]
        assert all("torch.float" in name or "torch.bfloat" in name for name in backward), backward
        kinds = ("all_to_all_single", "all_gather_into_tensor")
        assert all(name.startswith(kinds) for names in result["collectives"] for name in names)


def test_two_runs_are_bit_equal(results: Results) -> None:
    _, by_rank, _ = results
    assert [result["unequal"] for rank_results in by_rank for result in rank_results if result["unequal"]] == []


def _accumulation() -> list[float]:
    """All ranks hold slots of a token; each returns one term. bf16 rounds 256 + 1 to 256, and their fp32 sum once."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    dispatcher = build_dispatcher("alltoall", dist.group.WORLD, 1)
    x = torch.ones(2, H, dtype=torch.bfloat16, requires_grad=True)
    arrived = dispatcher.dispatch(x, torch.arange(world_size).repeat(2, 1), torch.ones(2, world_size)).wait()
    out = dispatcher.combine(arrived.tokens * (256 if rank == 0 else 1), arrived.handle).wait()
    out.sum().backward()
    assert x.grad is not None
    return [*out.flatten().tolist(), *x.grad.flatten().tolist()]


def test_sums_over_ranks_in_fp32_and_rounds_once(ranks: RankPool) -> None:
    for values in ranks.run(4, _accumulation):
        assert set(values) == {260.0}, "256 + 1 + 1 + 1 = 259 rounds to 260; in bf16 the ones are lost"


def _build_on_one_rank(name: str) -> str:
    assert dist.group.WORLD is not None
    return type(build_dispatcher(name, dist.group.WORLD, 4)).__name__


def _build_local_on_two_ranks() -> str:
    assert dist.group.WORLD is not None
    with pytest.raises(ValueError, match=r"'local' is for one rank .* not for 2; use 'auto' or 'alltoall'") as caught:
        build_dispatcher("local", dist.group.WORLD, 4)
    return str(caught.value)


def test_one_rank_needs_no_exchange(ranks: RankPool) -> None:
    for name in ("alltoall", "local"):
        assert ranks.run(1, _build_on_one_rank, name) == [LocalDispatcher.__name__]
    assert all(ranks.run(2, _build_local_on_two_ranks))
    inputs = _inputs("missing routes", torch.float32, 1, 0)
    dispatcher = LocalDispatcher(4)
    arrived = dispatcher.dispatch(inputs.x, inputs.slot_ids, inputs.weights).wait()
    assert torch.equal(arrived.tokens, inputs.x)
    assert torch.equal(arrived.slot_ids, inputs.slot_ids)
    assert torch.equal(arrived.weights, inputs.weights)
    assert torch.equal(dispatcher.combine(arrived.tokens, arrived.handle).wait(), inputs.x)


def test_unknown_dispatcher_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match=r"'carrier-pigeon'.*alltoall"):
        build_dispatcher("carrier-pigeon", cast(Any, None), 1)


def _traffic() -> list[Any]:
    """Of 8 ranks on 4 nodes: what `alltoall` and `hierarchical` sent, and what it says of a wrong node."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    slots_per_rank, top_k, width = 16, 8, 1024
    scores = torch.rand(96 + rank, world_size * slots_per_rank)
    slot_ids = scores.topk(top_k, dim=1).indices
    slot_ids[::7, 3:] = -1
    x, weights = torch.randn(len(slot_ids), width).bfloat16(), torch.rand(slot_ids.shape)
    results: list[Any] = [slot_ids]
    for name in ("alltoall", "hierarchical"):
        dispatcher = build_dispatcher(name, group, slots_per_rank, DispatchOptions(RANKS_PER_NODE))
        arrived = dispatcher.dispatch(x, slot_ids, weights).wait()
        dispatcher.combine(arrived.tokens, arrived.handle).wait()
        results.append(dispatcher.traffic)
    with pytest.raises(ValueError, match=r"ranks_per_node = 3.*8 ranks.*alltoall"):
        build_dispatcher("hierarchical", group, slots_per_rank, DispatchOptions(3))
    return results


def test_bytes_sent_are_the_least(ranks: RankPool) -> None:
    """Counted from the routes: a row per (token, other rank) there and back; ids and weights are at most 3 % of it."""
    world_size, slots_per_rank, row_bytes = 8, 16, 2 * 1024
    by_rank = ranks.run(world_size, _traffic)
    rows, pairs, entering, within, between = 0, 0, 0, 0, 0
    for rank, (slot_ids, plain, hierarchical) in enumerate(by_rank):
        destinations = _destinations(slot_ids, slots_per_rank)
        rows += sum(slot // slots_per_rank != rank for slots in slot_ids.tolist() for slot in slots if slot >= 0)
        others = sum(len(ranks - {rank}) for ranks in destinations)
        nodes = [{other // RANKS_PER_NODE for other in ranks} - {rank // RANKS_PER_NODE} for ranks in destinations]
        pairs += others
        entering += sum(map(len, nodes))
        # Arrived rows go back to where they came from: what a rank sends back is what it received.
        assert hierarchical.between < plain.between
        assert plain.metadata <= 0.03 * (plain.within + plain.between)
        for traffic in (plain, hierarchical):
            assert traffic.least_between == 2 * row_bytes * sum(map(len, nodes))
        assert plain.least_within + plain.least_between == 2 * row_bytes * others
        within += hierarchical.within
        between += hierarchical.between
    sent = sum(plain.within + plain.between for _, plain, _ in by_rank)
    assert sent == 2 * row_bytes * pairs, "the minimum: unique pairs of token and rank"
    assert sent < 0.70 * 2 * row_bytes * rows, "a third less than a copy per route"
    assert between == 2 * row_bytes * entering
    for traffics in zip(*(result[1:] for result in by_rank), strict=True):
        assert sum(traffic.least_between for traffic in traffics) == between
        assert sum(traffic.least_within for traffic in traffics) == 2 * row_bytes * pairs - between
    assert within >= 2 * row_bytes * pairs - between


def _threads_after_nodes() -> int:
    """Threads of this process, after it had groups of nodes."""
    assert dist.group.WORLD is not None
    build_dispatcher("hierarchical", dist.group.WORLD, 1, DispatchOptions(RANKS_PER_NODE))
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_groups_of_nodes_end_with_their_group(ranks: RankPool) -> None:
    few, *more = (max(ranks.run(4, _threads_after_nodes)) for _ in range(4))
    assert max(more) <= few + 4, "those of groups that are no more"
