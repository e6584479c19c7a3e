"""One-sided exchanges of processes over shared memory: late ranks, layers beside `alltoall`, failures, refusals."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.comm import GpuMemory, SharedFiles
from crossdock.dispatch import (
    DispatchOptions,
    Nodes,
    RankFailure,
    RankTimeout,
    SymmetricDispatcher,
    build_dispatcher,
    symmetric,
    symmetric_problem,
)
from crossdock.kernels import runtime
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from tests.dispatch.recorder import Recorder
from tests.dispatch.test_symmetric import CAPACITY, SLOTS, H, draw, experts, grad, independent
from tests.ranks import RankPool

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1: processes over gloo")


def _stress(rounds: int) -> list[bool]:
    """Ranks that are late in turns, at random, for as many exchanges: does each row arrive as it was sent?"""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    dispatcher = build_dispatcher("symmetric", dist.group.WORLD, SLOTS, DispatchOptions(static_shapes=True))
    delays = np.random.default_rng(rank)
    right = []
    for number in range(rounds):
        torch.manual_seed(number)
        inputs = draw([CAPACITY] * world_size, 2, torch.bfloat16)
        time.sleep(float(delays.random() * 0.05 * (delays.random() < 0.4)))
        pending = dispatcher.dispatch(inputs.x[rank], inputs.slot_ids[rank], inputs.weights[rank])
        time.sleep(float(delays.random() * 0.05 * (delays.random() < 0.4)))
        arrived = pending.wait()
        returning = dispatcher.combine(experts(arrived, rank), arrived.handle)
        time.sleep(float(delays.random() * 0.05 * (delays.random() < 0.4)))
        right.append(torch.equal(returning.wait(), independent(inputs)[rank]["out"]))
    return right


def test_processes_that_are_late_in_turns_lose_no_row(ranks: RankPool) -> None:
    assert all(all(right) for right in ranks.run(3, _stress, 12))


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().double().numpy()


class _Block(nn.Module):
    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(H, 8, RouterConfig(5, 3), config)
        self.moe.router.reset_parameters(std=1.0)
        self.moe.experts.reset_parameters(std=0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def _training(settings: dict[str, Any], mode: Any, dtype: torch.dtype) -> dict[Any, Any]:
    """Two layers of 5 experts, three micro-batches, the last rank without tokens in one: outputs and all gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    results: dict[Any, Any] = {}
    for name in ("alltoall", "symmetric"):
        torch.manual_seed(0)
        blocks = nn.ModuleList([_Block(MoEConfig(name, **settings), dtype) for _ in range(2)])  # type: ignore[arg-type]
        apply_activation_checkpoint(apply_ep(blocks, mesh), ActivationCheckpointConfig(mode))
        values: list[np.ndarray] = []
        with Recorder("symmetric_begin", "symmetric_finish") as recorder:
            for number, tokens in enumerate((6, 5, 3)):
                torch.manual_seed(100 * number + rank)
                x = torch.randn(0 if number == 1 and rank == world_size - 1 else tokens, H, dtype=dtype)
                x.requires_grad_()
                out = x
                for block in blocks:
                    out = block(out)
                out.float().square().sum().backward()
                values += [_array(out), _array(x.grad)]
        values += [_array(parameter.grad) for parameter in blocks.parameters()]
        results[name] = values
        results[name, "exchanges"] = recorder.names.count("symmetric_begin")
        # A full recompute stops once it has what was kept, which is before the last results return.
        if mode != "full":
            assert recorder.names.count("symmetric_finish") == results[name, "exchanges"]
        dispatcher = next(moe for moe in blocks.modules() if isinstance(moe, MoE)).dispatcher
        results[name, "type"] = type(dispatcher).__name__
        results[name, "rows"] = dispatcher.traffic.within
    return results


LAYERS = {
    "plain": ({}, "none", torch.float32),
    "bfloat16, fp8 both ways": ({"wire_dtype": "fp8", "wire_directions": "both"}, "none", torch.bfloat16),
    "chunks": ({"overlap_chunks": 2, "debug_checks": True}, "none", torch.float32),
    "full recompute": ({}, "full", torch.float32),
    "selective recompute": ({"overlap_chunks": 2}, "selective", torch.float32),
    "full recompute, chunks": ({"overlap_chunks": 2}, "full", torch.float32),
    "full recompute, three chunks": ({"overlap_chunks": 3}, "full", torch.float32),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_as_with_alltoall_bit_by_bit(name: str, ranks: RankPool) -> None:
    settings, mode, dtype = LAYERS[name]
    passes = 3 if mode == "full" else 2
    for results in ranks.run(2, _training, settings, mode, dtype):
        for ours, theirs in zip(results["symmetric"], results["alltoall"], strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert np.isfinite(ours).all()
        assert results["symmetric", "type"] == "SymmetricDispatcher"
        exchanges = 3 * 2 * 2 * passes * settings.get("overlap_chunks", 1)  # micro-batches, layers, there and back
        assert results["symmetric", "exchanges"] <= exchanges
        if mode != "full":
            assert results["symmetric", "exchanges"] == exchanges, "an exchange was repeated"
        assert results["alltoall", "exchanges"] == 0
        assert results["symmetric", "rows"] == results["alltoall", "rows"] > 0


def _static() -> list[list[np.ndarray]]:
    """Outputs and gradients of batches of several sizes, with `alltoall` and with static shapes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    layers = {}
    for name, settings in (("alltoall", {}), ("symmetric", {"static_shapes": True, "overlap_chunks": 2})):
        torch.manual_seed(0)
        layers[name] = MoE(H, 8, RouterConfig(5, 3), MoEConfig(name, experts="grouped_mm", **settings))  # type: ignore[arg-type]
        layers[name].router.reset_parameters(std=1.0)
        layers[name].experts.reset_parameters(std=0.5)
        apply_ep(nn.ModuleList([layers[name]]), mesh)
    results: list[list[np.ndarray]] = []
    for number, tokens in enumerate((8 - rank, 2 * rank, 0, 8)):
        of_batch = []
        for layer in layers.values():
            torch.manual_seed(100 * number + rank)
            layer.zero_grad()
            x = torch.randn(tokens, H, requires_grad=True)
            out = layer(x)
            out.square().sum().backward()
            of_batch += [_array(value) for value in (out, x.grad, *(p.grad for p in layer.parameters()))]
        half = len(of_batch) // 2
        results += [[ours, theirs] for theirs, ours in zip(of_batch[:half], of_batch[half:], strict=True)]
    dispatcher = layers["symmetric"].dispatcher
    assert isinstance(dispatcher, SymmetricDispatcher)
    assert dispatcher.max_tokens == 4
    with Recorder() as recorder:
        layers["symmetric"](torch.randn(3, H))
    assert recorder.collectives() == [], "counts are exchanged once"
    with pytest.raises(ValueError, match=r"5 tokens are more than the 4 .* largest batch"):
        layers["symmetric"](torch.randn(10, H))
    return results


def test_static_shapes_compute_the_same_without_an_exchange_of_counts(ranks: RankPool) -> None:
    for results in ranks.run(2, _static):
        for ours, theirs in results:
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def _alone(static: bool) -> str:
    """What rank 0 raises where rank 1 stays away, or refuses."""
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    dispatcher = SymmetricDispatcher.of_group(dist.group.WORLD, SLOTS, static_shapes=static, timeout=1.5)
    inputs = draw((4, 4), 2, torch.float32)
    own = (inputs.x[rank], inputs.slot_ids[rank], inputs.weights[rank])
    arrived = dispatcher.dispatch(*own).wait()
    dispatcher.combine(arrived.tokens, arrived.handle).wait()
    if rank == 1:
        if not static:
            dispatcher.refuse(torch.device("cpu"))
        return ""
    try:
        dispatcher.dispatch(*own).wait()
    except (RankFailure, RankTimeout) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_process_that_stays_away_ends_the_wait_of_the_others(ranks: RankPool) -> None:
    message, _ = ranks.run(2, _alone, True)
    assert message.startswith("RankTimeout: dispatcher 'symmetric': rank 1 of the 2 that hold the experts did not send")
    message, _ = ranks.run(2, _alone, False)
    assert message.startswith("RankFailure: rank 1 of the 2")


def _growing() -> list[bool]:
    """Batches that grow between forward and backward of an earlier one, which uses the buffers it began with."""
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    dispatcher = build_dispatcher("symmetric", dist.group.WORLD, SLOTS)
    right, outs = [], []
    for tokens in (2, 500, 3):
        torch.manual_seed(tokens)
        inputs = draw((tokens, tokens + 1), 2, torch.float32, hidden=64)
        x = inputs.x[rank].clone().requires_grad_()
        arrived = dispatcher.dispatch(x, inputs.slot_ids[rank], inputs.weights[rank]).wait()
        out = dispatcher.combine(experts(arrived, rank), arrived.handle).wait()
        outs.append((out, x, inputs))
    for out, x, inputs in outs:
        out.backward(inputs.grad[rank])
        expected = independent(inputs)[rank]
        right += [torch.equal(out, expected["out"]), torch.equal(grad(x), expected["x"])]
    return right


def test_buffers_grow_with_the_batch(ranks: RankPool) -> None:
    assert all(all(right) for right in ranks.run(2, _growing))


def _files() -> tuple[list[str], str]:
    """Mapped files that still have a name, and what ranks on two machines raise."""
    assert dist.group.WORLD is not None
    window = SharedFiles(dist.group.WORLD).allocate(4096, torch.device("cpu"))
    assert len(window.addresses.unique()) == 2
    window.own[window.rank] = 1
    dist.barrier()
    maps = Path("/proc/self/maps").read_text().splitlines()
    left = [line for line in maps if "crossdock-" in line and not line.endswith("(deleted)")]
    name, socket.gethostname = socket.gethostname, lambda: f"host{dist.get_rank()}"
    try:
        with pytest.raises(
            RuntimeError, match="needs ranks of one machine, not of host0, host1; use 'alltoall'"
        ) as caught:
            SharedFiles(dist.group.WORLD).allocate(4096, torch.device("cpu"))
    finally:
        socket.gethostname = name
    dist.barrier()
    return left, str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what is mapped in /proc")
def test_shared_files_leave_nothing_and_refuse_several_machines(ranks: RankPool) -> None:
    for left, message in ranks.run(2, _files):
        assert left == []
        assert message


def _build(options: DispatchOptions) -> str:
    assert dist.group.WORLD is not None
    try:
        return type(build_dispatcher("symmetric", dist.group.WORLD, 1, options)).__name__
    except ValueError as error:
        return str(error)


def test_what_it_cannot_do_is_refused_in_words(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.run(2, _build, DispatchOptions()) == ["SymmetricDispatcher"] * 2
    for message in ranks.run(2, _build, DispatchOptions(ranks_per_node=1)):
        assert message.startswith(
            "dispatcher 'symmetric' needs ranks that can map each other's memory, those of one NVLink"
        )
        assert message.endswith("use 'alltoall'")
    monkeypatch.setattr(symmetric, "kernels_run", lambda device: False)
    assert "TRITON_INTERPRET=1" in str(symmetric_problem(torch.device("cpu")))
    assert "needs Triton and CUDA" in str(symmetric_problem(torch.device("cuda")))
    assert "2 nodes" in str(symmetric_problem(torch.device("cuda"), Nodes.consecutive(4, 2)))


def _without_memory_on_rank_1() -> str:
    """What each rank is told where a GPU of one of them has no room; torch's memory itself needs GPUs."""
    taken = torch.empty(16, dtype=torch.uint8)
    error = torch.OutOfMemoryError("out of memory") if dist.get_rank() else None
    with (
        mock.patch("torch.distributed._symmetric_memory.empty", return_value=taken, side_effect=error),
        pytest.raises(RuntimeError) as raised,
    ):
        GpuMemory(dist.group.WORLD).allocate(16, torch.device("cpu"))  # type: ignore[arg-type]
    return str(raised.value)


def test_a_rank_without_memory_tells_the_others(ranks: RankPool) -> None:
    for told in ranks.run(2, _without_memory_on_rank_1):
        assert "'symmetric'" in told
        assert "out of memory" in told
