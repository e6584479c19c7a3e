"""A mistake on one rank: every rank raises, the failing one its own error, and the next call works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.comm import Wire
from crossdock.dispatch import DispatchOptions, LocalDispatcher, RankMismatch, build_dispatcher
from crossdock.kernels import runtime
from crossdock.routing import Routing
from tests.ranks import RankPool

H, K, SLOTS, RANKS_PER_NODE = 8, 2, 3, 2
WRONG = 1
WORLDS = [("allgather", 3), ("alltoall", 2), ("hierarchical", 4)] + [("symmetric", 2)] * runtime.INTERPRETED
Inputs = tuple[Tensor, Tensor, Tensor]


def _inputs(world_size: int) -> Inputs:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    return torch.randn(5, H), torch.rand(5, world_size * SLOTS).topk(K, dim=1).indices, torch.rand(5, K)


def _with_id(slot_ids: Tensor, wrong: int) -> Tensor:
    slot_ids[3, 1] = wrong
    return slot_ids


# What one rank does wrong, and what its error says. The first world sizes have 6, 9 and 12 slots.
MISTAKES: dict[str, tuple[Callable[..., Inputs], str]] = {
    "x is flat": (lambda x, ids, w: (x.flatten(), ids, w), r"x must be \[T, H\], not \[40\]"),
    "x is whole numbers": (lambda x, ids, w: (x.long(), ids, w), "x must be float16, .* not torch.int64"),
    "ids of fewer tokens": (lambda x, ids, w: (x, ids[1:], w[1:]), r"slot_ids must be .* T = 5.* not \[4, 2\]"),
    "ids of int32": (lambda x, ids, w: (x, ids.int(), w), "slot_ids must be torch.int64, not torch.int32"),
    "weights for fewer experts": (lambda x, ids, w: (x, ids, w[:, 1:]), r"weights must be \[5, 2\].* not \[5, 1\]"),
    "weights of float64": (lambda x, ids, w: (x, ids, w.double()), "weights must be torch.float32 .*float64"),
    "ids elsewhere": (lambda x, ids, w: (x, ids.to("meta"), w), "slot_ids is on meta, x on cpu"),
    "x elsewhere": (lambda x, ids, w: (x.to("meta"), ids, w), "slot_ids is on cpu, x on meta"),
    "id too large": (lambda x, ids, w: (x, _with_id(ids, 1000), w), "slot_ids has 1000; ids are 0 to"),
    "id too small": (lambda x, ids, w: (x, _with_id(ids, -2), w), "slot_ids has -2; ids are 0 to"),
}
# What no rank can know to be wrong.
MISMATCHES: dict[str, Callable[..., Inputs]] = {
    "other features": lambda x, ids, w: (x[:, 1:], ids, w),
    "other dtype": lambda x, ids, w: (x.bfloat16(), ids, w),
    "other top-k": lambda x, ids, w: (x, ids[:, 1:], w[:, 1:]),
}


def _dispatches(dispatcher_name: str) -> dict[str, Any]:
    """What each mistake of rank 1 raises here; after each, a call without one."""
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    dispatcher = build_dispatcher(dispatcher_name, group, SLOTS, DispatchOptions(RANKS_PER_NODE))
    other_wire = build_dispatcher(
        dispatcher_name, group, SLOTS, DispatchOptions(RANKS_PER_NODE, Wire("fp8" if rank == WRONG else "bf16"))
    )
    mistakes: dict[str, Any] = {name: change for name, (change, _) in MISTAKES.items()} | MISMATCHES
    other_slots = build_dispatcher(dispatcher_name, group, SLOTS + (rank == WRONG), DispatchOptions(RANKS_PER_NODE))
    mistakes |= dict.fromkeys(("other wire", "other slots"), lambda *inputs: inputs)
    dispatchers = {"other wire": other_wire, "other slots": other_slots}
    results = {}
    for name, change in mistakes.items():
        inputs = _inputs(world_size)
        wrong = change(*inputs) if rank == WRONG else inputs
        try:
            dispatchers.get(name, dispatcher).dispatch(*wrong).wait()
            results[name] = "nothing", ""
        except (ValueError, RuntimeError) as error:
            results[name] = type(error).__name__, str(error)
        x, slot_ids, weights = _inputs(world_size)
        arrived = dispatcher.dispatch(x, slot_ids, weights).wait()
        back = dispatcher.combine(arrived.tokens * (arrived.slot_ids >= 0).any(dim=1, keepdim=True), arrived.handle)
        times = torch.tensor([len({slot // SLOTS for slot in slots}) for slots in slot_ids.tolist()])
        torch.testing.assert_close(back.wait(), x * times[:, None])
        with pytest.raises(ValueError, match=r"y must be \[\d+, 8\]"):
            dispatcher.combine(arrived.tokens[:, 1:], arrived.handle)
        with pytest.raises(ValueError, match=r"y must be float16, .* not torch.int64"):
            dispatcher.combine(arrived.tokens.long(), arrived.handle)
    return results


@pytest.mark.parametrize(("dispatcher_name", "world_size"), WORLDS)
def test_a_wrong_call_of_dispatch_raises_on_every_rank(dispatcher_name: str, world_size: int, ranks: RankPool) -> None:
    by_rank = ranks.run(world_size, _dispatches, dispatcher_name)
    others = rf"rank {WRONG} of the {world_size} that hold the experts \(global rank {WRONG}\) has failed"
    for rank, results in enumerate(by_rank):
        for name, (_, text) in MISTAKES.items():
            kind, message = results[name]
            assert kind == ("ValueError" if rank == WRONG else "RankFailure"), f"{name}: {message}"
            _assert_says(message, text if rank == WRONG else others)
        for name in (*MISMATCHES, "other wire", "other slots"):
            kind, message = results[name]
            assert kind in ("RankMismatch", "RankFailure"), f"{name}: {message}"
            if dispatcher_name != "hierarchical":
                assert kind == "RankMismatch"
        if dispatcher_name == "allgather":
            _assert_says(results["other features"][1], r"rank 0 .*\[T, 8\].*; rank 1 \(global rank 1\): x \[T, 7\]")
            _assert_says(results["other dtype"][1], r"rank 1 .*torch.bfloat16.*; rank 2 .*torch.float32")
            _assert_says(results["other top-k"][1], r"rank 0 .*slot_ids \[T, 2\].*; rank 1 .*slot_ids \[T, 1\]")
            _assert_says(results["other wire"][1], r"rank 0 .*wire bf16.*; rank 1 .*wire fp8")
            _assert_says(results["other slots"][1], r"rank 0 .* 3 slots per rank.*; rank 1 .* 4 slots per rank")


def _assert_says(message: str, pattern: str) -> None:
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(message)


@pytest.mark.parametrize("name", MISTAKES)
def test_one_rank_refuses_the_same(name: str) -> None:
    change, text = MISTAKES[name]
    with pytest.raises(ValueError, match=text):
        LocalDispatcher(2 * SLOTS).dispatch(*change(*_inputs(2)))


def _fail(module: Any, args: Any, routing: Routing) -> None:
    raise ArithmeticError("a bead is stuck")


def _infinite_logits(module: Any, args: Any, routing: Routing) -> Routing:
    return routing._replace(logits=torch.full_like(routing.logits, torch.inf))


def _routed(layer: MoE, hook: Any, x: Tensor) -> Tensor:
    handle = layer.router.register_forward_hook(hook)
    try:
        return layer(x)
    finally:
        handle.remove()


def _layers(dispatcher_name: Any) -> dict[str, Any]:
    """What each mistake of rank 1 in a layer's forward pass raises here; after each, a training step without one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    layer = MoE(H, 4, RouterConfig(5, K), MoEConfig(dispatcher_name, RANKS_PER_NODE, debug_checks=True))
    apply_ep(torch.nn.ModuleList([layer]), mesh)
    x = torch.randn(2, 3, H)
    bad = x.clone()
    bad[1, 2, 3] = torch.nan
    mistakes: dict[str, Callable[[], Any]] = {
        "features": lambda: layer(x[..., 1:]),
        "mask": lambda: layer(x, torch.zeros(2, 4, dtype=torch.bool)),
        "mask's dtype": lambda: layer(x, torch.zeros(2, 3)),
        "dtype": lambda: layer(x.double()),
        "device": lambda: layer(x.to("meta")),
        "router": lambda: _routed(layer, _fail, x),
        "NaN": lambda: layer(bad),
        "logits": lambda: _routed(layer, _infinite_logits, x),
    }
    results = {}
    for name, mistake in mistakes.items():
        try:
            mistake() if rank == WRONG else layer(x)
            results[name] = "nothing", ""
        except (ValueError, RuntimeError, ArithmeticError) as error:
            results[name] = type(error).__name__, str(error)
        layer(x).sum().backward()
    layer(bad, torch.tensor([[False] * 3, [False, False, True]]))
    return results


@pytest.mark.parametrize(("dispatcher_name", "world_size"), WORLDS)
def test_a_layer_that_fails_on_one_rank_raises_on_every_rank(
    dispatcher_name: str, world_size: int, ranks: RankPool
) -> None:
    said = {
        "features": ("ValueError", "x has 7 features, this layer's hidden_size is 8"),
        "mask": ("ValueError", r"padding_mask must be \[2, 3\] torch.bool on cpu, not \[2, 4\] torch.bool"),
        "mask's dtype": ("ValueError", r"padding_mask must be .* not \[2, 3\] torch.float32"),
        "dtype": ("ValueError", "x is torch.float64, this layer torch.float32"),
        "device": ("ValueError", "x is on meta, this layer on cpu"),
        "router": ("ArithmeticError", "a bead is stuck"),
        "NaN": ("ValueError", "x of 1 of 6 tokens: NaN or infinity"),
        "logits": ("ValueError", "the router's logits of 6 of 6 tokens: NaN or infinity"),
    }
    for rank, results in enumerate(ranks.run(world_size, _layers, dispatcher_name)):
        for name, (kind, text) in said.items():
            if rank != WRONG:
                kind, text = "RankFailure", rf"rank {WRONG} of the {world_size} that hold the experts"
            assert results[name][0] == kind, f"{name}: {results[name]}"
            _assert_says(results[name][1], text)


def _differing_layers(dispatcher_name: Any, settings: str) -> tuple[str, str]:
    """What a layer raises whose number of experts, or of chunks, is another on rank 1."""
    rank = dist.get_rank()
    experts, chunks = (6 + 2 * rank, 1) if settings == "experts" else (6, 1 + rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    layer = MoE(H, 4, RouterConfig(experts, K), MoEConfig(dispatcher_name, chunks))
    apply_ep(torch.nn.ModuleList([layer]), mesh)
    try:
        layer(torch.randn(5, H)).sum().backward()
    except RankMismatch as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("dispatcher_name", ["allgather", "alltoall"])
def test_ranks_whose_layers_differ_all_say_so(dispatcher_name: str, ranks: RankPool) -> None:
    differences = {
        "experts": r"rank 0 .* 3 slots per rank.*; rank 1 .* 4 slots per rank",
        "chunks": r"rank 0 .* 1 chunks; rank 1 .* 2 chunks",
    }
    for settings, text in differences.items():
        for kind, message in ranks.run(2, _differing_layers, dispatcher_name, settings):
            assert kind == "RankMismatch"
            _assert_says(message, text)
