"""Dispatchers with a narrow wire: tokens arrive as the wire decodes them, and nothing else is rounded unless asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.comm import Wire, WireDtype
from crossdock.dispatch import DispatchOptions, build_dispatcher
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from tests.ranks import RankPool

WORLD, H, K, SLOTS, RANKS_PER_NODE = 4, 200, 3, 2, 2
WIRES: tuple[WireDtype, ...] = ("bf16", "fp16", "fp8")
ROUNDOFF = {"bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4}
DISPATCHERS = ("allgather", "alltoall", "hierarchical")


class Inputs(NamedTuple):
    """`x [T, H]`, `slot_ids [T, K]`, `weights [T, K]`, and the gradient of the output `[T, H]`."""

    x: Tensor
    slot_ids: Tensor
    weights: Tensor
    grad: Tensor


def _inputs(rank: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(rank)
    num_tokens = 0 if rank == 2 else 11 + rank
    slot_ids = torch.rand(num_tokens, WORLD * SLOTS).topk(K, dim=1).indices
    slot_ids[::4, 1:] = -1
    weights = torch.rand(num_tokens, K, dtype=torch.promote_types(dtype, torch.float32))
    return Inputs(torch.randn(num_tokens, H).to(dtype), slot_ids, weights, torch.randn(num_tokens, H).to(dtype))


def _scales(slots: Tensor) -> Tensor:
    """What distinguishes the experts of these tests: a factor per global slot; 0 for no route."""
    return torch.where(slots < 0, 0, slots + 1).double() / 8


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _round_trips(dispatcher_name: str) -> dict[tuple[str, bool, torch.dtype], list[dict[str, Any]]]:
    """Experts that square, `y = x^2 sum_k w_k scale(slot_k)`, twice for each wire, direction and dtype."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    results = {}
    for name in ("same", *WIRES):
        for both in (False, True):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                runs = []
                for _ in range(2):
                    dispatcher = build_dispatcher(
                        dispatcher_name, group, SLOTS, DispatchOptions(RANKS_PER_NODE, Wire(name, both=both))
                    )
                    inputs = _inputs(rank, dtype)
                    x, weights = inputs.x.requires_grad_(), inputs.weights.requires_grad_()
                    arrived = dispatcher.dispatch(x, inputs.slot_ids, weights).wait()
                    slots = torch.where(arrived.slot_ids < 0, -1, arrived.slot_ids + rank * SLOTS)
                    factors = (arrived.weights * _scales(slots).to(weights.dtype)).sum(dim=1, keepdim=True)
                    y = (arrived.tokens.to(weights.dtype).square() * factors).to(dtype)
                    out = dispatcher.combine(y, arrived.handle).wait()
                    out.backward(inputs.grad)
                    assert x.grad is not None
                    assert weights.grad is not None
                    run = {"tokens": arrived.tokens, "out": out, "grad_x": x.grad, "grad_weights": weights.grad}
                    arrays = {key: _array(value) for key, value in run.items()}
                    runs.append(arrays | {"traffic": dispatcher.traffic})
                results[name, both, dtype] = runs
    return results


Key = tuple[WireDtype, bool, torch.dtype]
Results = tuple[str, list[dict[Key, list[dict[str, Any]]]]]


@pytest.fixture(scope="module", params=DISPATCHERS)
def results(request: pytest.FixtureRequest, ranks: RankPool) -> Results:
    return request.param, ranks.run(WORLD, _round_trips, request.param)


def _decoded(x: Tensor, name: WireDtype) -> Tensor:
    wire = Wire(name)
    return wire.decode(wire.encode(x), H, x.dtype)


def test_tokens_arrive_as_the_wire_decodes_them(results: Results) -> None:
    """On every rank the rows of the others, by any number of hops."""
    dispatcher_name, by_rank = results
    for rank, of_rank in enumerate(by_rank):
        for (name, _, dtype), (run, _) in of_rank.items():
            expected = []
            for source in range(WORLD):
                inputs = _inputs(source, dtype)
                needed = (inputs.slot_ids >= 0) & (inputs.slot_ids // SLOTS == rank)
                rows = needed.any(dim=1) if dispatcher_name != "allgather" else slice(None)
                expected.append(_decoded(inputs.x, name)[rows])
            ours, theirs = run["tokens"], _array(torch.cat(expected))
            if dispatcher_name == "hierarchical":  # in another order
                ours, theirs = (rows[np.lexsort(rows.T)] for rows in (ours, theirs))
            np.testing.assert_array_equal(ours, theirs, f"{name}, {dtype}")


def test_with_tokens_alone_gradients_are_those_of_the_decoded_values(results: Results) -> None:
    _, by_rank = results
    tolerances = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1.5e-2}
    for rank, of_rank in enumerate(by_rank):
        for (name, both, dtype), (run, _) in of_rank.items():
            if both and name != "same":
                continue
            inputs = _inputs(rank, dtype)
            x, weights, grad = (_array(t) for t in (_decoded(inputs.x, name), inputs.weights, inputs.grad))
            scales = _array(_scales(inputs.slot_ids))
            factors = (weights * scales).sum(axis=1, keepdims=True)
            expected = {
                "out": x**2 * factors,
                "grad_x": 2 * x * factors * grad,
                "grad_weights": (grad * x**2).sum(axis=1, keepdims=True) * scales,
            }
            for key, value in expected.items():
                tolerance = tolerances[dtype]
                scale = np.abs(value).max(initial=0)
                label = f"{key}: {name}, {dtype}, rank {rank}"
                np.testing.assert_allclose(run[key], value, 4 * tolerance, tolerance * scale, err_msg=label)


def test_in_both_directions_each_result_and_gradient_is_rounded_once_more_per_hop(results: Results) -> None:
    """All terms of `out` have one sign, so that each rounding moves it by `u` of itself, or by `u` of its group's
    largest in fp8; the same for the gradient of a token, whose terms have the sign of `x grad`."""
    dispatcher_name, by_rank = results
    hops = 2 if dispatcher_name == "hierarchical" else 1
    for of_rank in by_rank:
        for (name, both, dtype), (run, _) in of_rank.items():
            if not both or name == "same" or dtype == torch.bfloat16:
                continue
            plain, _ = of_rank[name, False, dtype]
            u = ROUNDOFF[name]
            for key in ("out", "grad_x"):
                bound = (1 + u) ** hops - 1 + 1e-5
                largest = np.abs(plain[key]).max(initial=0)
                # The gradient of `out` has been rounded too, on its way to the experts.
                factor = 2 if key == "grad_x" else 1
                error = np.abs(run[key] - plain[key])
                assert (error <= factor * (bound * np.abs(plain[key]) + 2**-12 * largest)).all(), f"{key}: {name}"
                assert len(error) == 0 or error.any(), f"{key}: {name} was not rounded"


def test_bytes_are_those_of_encoded_rows(results: Results) -> None:
    """208 bytes for 200 values of fp8: of the rows there, which `alltoall` sends once per (token, other rank), or of
    those back as well."""
    dispatcher_name, by_rank = results
    for rank, of_rank in enumerate(by_rank):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            width = H * dtype.itemsize
            keys: tuple[Key, ...] = (("same", False, dtype), ("fp8", False, dtype), ("fp8", True, dtype))
            plain, tokens, both = (of_rank[key][0]["traffic"] for key in keys)
            assert plain.metadata == tokens.metadata == both.metadata
            rows_there = 0
            for place in ("within", "between"):
                whole, less, least = (getattr(traffic, place) for traffic in (plain, tokens, both))
                assert least * width == whole * 208
                rows, rest = divmod(whole - less, width - 208)
                assert rest == 0
                rows_there += rows
            if dispatcher_name == "alltoall":
                destinations = [
                    {slot // SLOTS for slot in slots if slot >= 0} for slots in _inputs(rank, dtype).slot_ids.tolist()
                ]
                assert rows_there == sum(len(ranks - {rank}) for ranks in destinations)


def test_two_runs_are_bit_equal(results: Results) -> None:
    _, by_rank = results
    for of_rank in by_rank:
        for first, second in of_rank.values():
            for key, value in first.items():
                assert np.array_equal(value, second[key]) if key != "traffic" else value == second[key]


class _Collectives(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "_c10d_functional" and func.overloadpacket.__name__ != "wait_tensor"
        return func(*args, **(kwargs or {}))


class _Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.moe = MoE(H, 8, RouterConfig(6, 2), config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


def _recompute(dispatcher_name: Any) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",))
    results = {}
    for mode in ("none", "selective"):
        torch.manual_seed(0)
        config = MoEConfig(dispatcher_name, ranks_per_node=RANKS_PER_NODE, wire_dtype="fp8", wire_directions="both")
        blocks = nn.ModuleList([_Block(config), _Block(config)])
        apply_activation_checkpoint(apply_ep(blocks, mesh), ActivationCheckpointConfig(mode))
        x = torch.randn(5, H).requires_grad_()
        with _Collectives() as collectives:
            out = x
            for block in blocks:
                out = block(out)
            out.square().sum().backward()
        grads = [x.grad, *(parameter.grad for parameter in blocks.parameters())]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        results[mode] = [_array(grad) for grad in local if grad is not None], collectives.count
    return results


@pytest.mark.parametrize("dispatcher_name", ["allgather", "hierarchical"])
def test_selective_recompute_repeats_no_exchange(dispatcher_name: str, ranks: RankPool) -> None:
    for results in ranks.run(WORLD, _recompute, dispatcher_name):
        (plain, count), (selective, count_selective) = results["none"], results["selective"]
        assert count_selective == count
        assert len(plain) > 4
        for ours, theirs in zip(selective, plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)
