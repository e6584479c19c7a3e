"""MoE layers on four ranks by every dispatcher, whole and in chunks: the layer of one rank, nothing repeated, no error
for bad numbers.

Deepep is there through a double of its library. One run of the workers trains all setups; tests look at its results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock import ExpertParallel, MoE, MoEConfig, RouterConfig, apply_ep, moe_layers, set_batch_totals
from crossdock.dispatch import (
    DEEPEP_OPS,
    DeepEPDispatcher,
    DeepEPOptions,
    LocalDispatcher,
    StaticDispatcher,
    free_deepep_buffers,
)
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from crossdock.placement import EMPTY, Placement
from tests.dispatch.deepep_double import Double
from tests.ranks import RankPool

WORLD, H, I, E, K = 4, 256, 8, 9, 2
# Of each rank: fewer than chunks, and none.
TOKENS = (1, 0, 2, 7)
TRAINING = {"capacity_factor": 1.0, "sequence_aux_loss_coeff": 0.1, "z_loss_coeff": 0.01}
CHUNKS = (1, 2, 3)
RECOMPUTED = (1, 3)
DEEPEP = {
    "deepep": DeepEPOptions(),
    "deepep, expand": DeepEPOptions(expand=True),
    "deepep, buffer": DeepEPOptions("buffer"),
}
DISPATCHERS = ("allgather", "alltoall", "hierarchical", "static", *DEEPEP)


class Setup(NamedTuple):
    """`dispatcher` of `DISPATCHERS`."""

    dispatcher: str
    chunks: int = 1
    recompute: str = "none"
    gradient_scale: str = "off"

    @property
    def dtype(self) -> torch.dtype:
        """`grouped_mm`, which static shapes need, has no float64."""
        return torch.float32 if self.dispatcher == "static" else torch.float64

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.dtype == torch.float64 else 5e-6

    def config(self, **others: Any) -> MoEConfig:
        name: Any = self.dispatcher if self.dispatcher in ("allgather", "hierarchical") else "alltoall"
        static = self.dispatcher == "static"
        return MoEConfig(
            name,
            self.chunks,
            ranks_per_node=2,
            static_shapes=static,
            experts="grouped_mm" if static else "cpu",
            gradient_scale=cast(Any, self.gradient_scale),
            **others,
        )


class _Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(H, I, RouterConfig(E, K), config, bias=True, shared_intermediate_size=8, shared_gate=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def _blocks(setup: Setup, **others: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    config = setup.config(**others)
    blocks = nn.ModuleList([_Block(config)]).double()
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            parameter.normal_(std=0.3 if "bias" in name or "router" in name else 0.1)
    return blocks.to(setup.dtype)


def _spread(blocks: nn.ModuleList, setup: Setup, double: Double) -> nn.ModuleList:
    apply_ep(blocks, init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",)))
    group = dist.group.WORLD
    assert group is not None
    for layer in moe_layers(blocks).values():
        assert layer.dispatch_plan.overlap_chunks == setup.chunks
        assert isinstance(layer.dispatcher, StaticDispatcher) == (setup.dispatcher == "static")
        if setup.dispatcher in DEEPEP:
            slots, checks = layer.placement.slots_per_rank, layer.config.debug_checks
            layer.dispatcher = DeepEPDispatcher(
                group, slots, None, DEEPEP[setup.dispatcher], debug_checks=checks, library=double, dtypes=double.dtypes
            )
    apply_activation_checkpoint(blocks, ActivationCheckpointConfig(cast(Any, setup.recompute)))
    return blocks


def _tokens(rank: int) -> tuple[Tensor, Tensor]:
    """`x [1, T, H]`, and the gradient of the output."""
    torch.manual_seed(10 + rank)
    x, grad = torch.randn(2, 1, TOKENS[rank], H, dtype=torch.float64)
    return x, grad


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().double().numpy().copy()


def _through(blocks: nn.ModuleList, x: Tensor, grad: Tensor) -> dict[str, np.ndarray]:
    """The output, and the gradients of `x` and of the parameters (as they have run up)."""
    x = x.clone().requires_grad_()
    out = x
    for block in blocks:
        out = block(out)
    out.backward(grad)
    grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in blocks.named_parameters()}
    return {"out": _array(out), "x": _array(x.grad)} | {name: _array(value) for name, value in grads.items()}


class _Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))

    def exchanges(self) -> int:
        return sum(
            count
            for op, count in self.calls.items()
            if op in DEEPEP_OPS or (op.namespace == "_c10d_functional" and "wait_tensor" not in str(op))
        )


class Trained(NamedTuple):
    """`exchanges` in a step, and how many times a block's first operation ran."""

    values: dict[str, np.ndarray]
    exchanges: int
    norms: int


def _train(setups: list[Setup]) -> dict[Setup, Trained]:
    results = {}
    for setup in setups:
        double = Double((setup.dtype,))
        blocks = _spread(_blocks(setup, **TRAINING), setup, double)
        set_batch_totals(blocks, WORLD, sum(TOKENS))
        x, grad = (tensor.to(setup.dtype) for tensor in _tokens(dist.get_rank()))
        with _Counted() as counted:
            values = _through(blocks, x, grad)
        results[setup] = Trained(values, counted.exchanges(), counted.calls[torch.ops.aten.native_layer_norm.default])
        free_deepep_buffers()
    return results


Results = tuple[str, list[dict[Setup, Trained]]]


@pytest.fixture(scope="module", params=DISPATCHERS)
def trained(request: pytest.FixtureRequest, ranks: RankPool) -> Results:
    """A dispatcher's name, and the results of each rank."""
    setups = [Setup(request.param, chunks) for chunks in CHUNKS]
    setups += [Setup(request.param, chunks, "selective") for chunks in RECOMPUTED]
    return request.param, ranks.run(WORLD, _train, setups)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, np.ndarray]:
    """The same in one process in float64, the ranks' sequences one after the other."""
    blocks = _blocks(Setup("alltoall"), **TRAINING)
    set_batch_totals(blocks, WORLD, sum(TOKENS))
    by_rank = [_through(blocks, *_tokens(rank)) for rank in range(WORLD)]
    assert sum(int(layer.load.dropped) for layer in moe_layers(blocks).values()) > 0
    return by_rank[-1] | {name: np.concatenate([of[name] for of in by_rank], axis=1) for name in ("out", "x")}


def _whole(by_rank: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All ranks' tokens; gradients of the experts in their logical order, of all else summed."""
    placement = Placement.contiguous(E, WORLD)
    slots = [
        slot for slot, expert in enumerate(e for r in range(WORLD) for e in placement.experts_on(r)) if expert != EMPTY
    ]
    whole = {}
    for name in by_rank[0]:
        values = [of_rank[name] for of_rank in by_rank]
        if name in ("out", "x"):
            whole[name] = np.concatenate(values, axis=1)
        else:
            whole[name] = np.concatenate(values)[slots] if ".experts." in name else np.sum(values, axis=0)
    return whole


def _assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float, label: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        assert error <= tolerance, f"{label}: {name} is off by {error}"


def test_layers_in_chunks_equal_those_of_one_rank(trained: Results, one_rank: dict[str, np.ndarray]) -> None:
    """With drops, shared experts and both losses; ranks with fewer tokens than chunks, and without any."""
    dispatcher, by_rank = trained
    for chunks in CHUNKS:
        setup = Setup(dispatcher, chunks)
        _assert_close(_whole([of_rank[setup].values for of_rank in by_rank]), one_rank, setup.tolerance, setup)


def test_selective_recompute_repeats_no_exchange(trained: Results) -> None:
    dispatcher, by_rank = trained
    for of_rank in by_rank:
        for chunks in RECOMPUTED:
            plain, selective = (of_rank[Setup(dispatcher, chunks, mode)] for mode in ("none", "selective"))
            assert selective.norms > plain.norms, "nothing was recomputed"
            assert selective.exchanges == plain.exchanges == chunks * of_rank[Setup(dispatcher)].exchanges
            for name, value in plain.values.items():
                if "buffer" in dispatcher or dispatcher not in DEEPEP:  # rows of the others come in any order
                    np.testing.assert_array_equal(selective.values[name], value, name)
                else:
                    np.testing.assert_allclose(selective.values[name], value, 1e-9, 1e-12, err_msg=name)


@pytest.mark.parametrize("dispatcher", ["alltoall", "static"])
def test_gradient_scale_counts_the_routes_of_all_chunks(ranks: RankPool, dispatcher: str) -> None:
    scales = ("off", "output", "gradient")
    setups = [Setup(dispatcher, chunks, "none", scale) for chunks in CHUNKS for scale in scales]
    by_rank: list[dict[Setup, Trained]] = ranks.run(WORLD, _train, setups)
    for scale in scales[1:]:
        scaled = False
        for of_rank in by_rank:
            whole = of_rank[Setup(dispatcher, 1, "none", scale)].values
            unscaled = of_rank[Setup(dispatcher)].values
            scaled = scaled or any(not np.allclose(value, unscaled[name]) for name, value in whole.items())
            for setup in (Setup(dispatcher, chunks, "none", scale) for chunks in CHUNKS[1:]):
                for name, value in of_rank[setup].values.items():
                    largest = np.abs(whole[name]).max(initial=0)
                    label = f"{setup}: {name}"
                    np.testing.assert_allclose(value, whole[name], 0, 10 * setup.tolerance * largest, err_msg=label)
        assert scaled, f"{scale} changes nothing"


# What a GPU has to be waited for, or makes a shape of values.
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")
BAD_RANK, BAD_TOKENS = 3, (2, 5)
BAD_SETUPS = [Setup(*setup) for setup in product(DISPATCHERS, (1, 3))]


def _seen_ids(blocks: nn.ModuleList) -> Iterator[Tensor]:
    """Fills up with the ids that routers give from now on."""
    seen: list[Tensor] = []
    for layer in moe_layers(blocks).values():
        layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing.expert_ids))
    return iter(seen)


def _bad_numbers() -> dict[Setup, tuple[list[dict[str, np.ndarray]], list[dict[str, int]], list[int]]]:
    """A step with good numbers and one with a NaN and an infinity in rank 3's tokens; syncs of both; all ids."""
    rank, results = dist.get_rank(), {}
    for setup in BAD_SETUPS:
        double = Double((setup.dtype,))
        blocks = _spread(_blocks(setup), setup, double)
        seen = _seen_ids(blocks)
        x, grad = (tensor.to(setup.dtype) for tensor in _tokens(rank))
        bad = x.clone()
        if rank == BAD_RANK:
            bad[0, BAD_TOKENS[0], 7] = torch.nan
            bad[0, BAD_TOKENS[1], 8] = torch.inf
        _through(blocks, x, grad)  # static shapes agree on a size in their first step
        steps, syncs = [], []
        for tokens in (x, bad):
            with _Counted() as counted:
                steps.append(_through(blocks, tokens, grad))
            names = Counter({str(op.overloadpacket.__name__): count for op, count in counted.calls.items()})
            syncs.append({name: names[name] for name in _SYNCS})
        results[setup] = steps, syncs, torch.cat([ids.flatten() for ids in seen]).tolist()
        free_deepep_buffers()
    return results


def test_bad_numbers_flow_and_stay_in_their_rows(ranks: RankPool) -> None:
    for rank, by_setup in enumerate(ranks.run(WORLD, _bad_numbers)):
        others = [token for token in range(TOKENS[rank]) if rank != BAD_RANK or token not in BAD_TOKENS]
        for setup, ((clean, bad), (syncs, bad_syncs), ids) in by_setup.items():
            assert syncs == bad_syncs, setup
            assert all(-1 <= expert < E for expert in ids), setup
            for name in ("out", "x"):
                if rank == BAD_RANK:
                    assert not np.isfinite(bad[name][0, BAD_TOKENS]).any(), f"{setup}: {name}"
                np.testing.assert_allclose(
                    bad[name][0, others], clean[name][0, others], 1e-4, 1e-5, err_msg=f"{setup}: {name}"
                )


def _checked() -> dict[Setup, list[tuple[str, str]]]:
    """What a NaN and an infinity in rank 3's tokens raise here with `debug_checks`; after each, a step without one."""
    rank, results = dist.get_rank(), {}
    for setup in BAD_SETUPS:
        blocks = _spread(_blocks(setup, debug_checks=True), setup, Double((setup.dtype,)))
        x, grad = (tensor.to(setup.dtype) for tensor in _tokens(rank))
        raised = results[setup] = []
        for value in (torch.nan, torch.inf):
            bad = x.clone()
            if rank == BAD_RANK:
                bad[0, 0, 0] = value
            try:
                # Not the block, whose norm makes NaN of an infinity.
                next(iter(moe_layers(blocks).values()))(bad)
                raised.append(("nothing", ""))
            except (ValueError, RuntimeError) as error:
                raised.append((type(error).__name__, str(error)))
            assert all(np.isfinite(value).all() for value in _through(blocks, x, grad).values())
        free_deepep_buffers()
    return results


def test_with_debug_checks_a_bad_number_raises_on_all_ranks(ranks: RankPool) -> None:
    for rank, by_setup in enumerate(ranks.run(WORLD, _checked, timeout=90)):
        for setup, raised in by_setup.items():
            for kind, message in raised:
                assert kind == ("ValueError" if rank == BAD_RANK else "RankFailure"), f"{setup}: {message}"
                expected = "x of 1 of 7 tokens: NaN or infinity" if rank == BAD_RANK else f"rank {BAD_RANK} of the 4"
                assert expected in message, setup


def _style_on_one_rank() -> tuple[str, list[str]]:
    blocks = nn.ModuleList([_Block(Setup("static", 3).config())])
    parallelize_module(
        blocks, init_device_mesh("cpu", (1,), mesh_dim_names=("ep",)), {"0.moe": ExpertParallel(tokens_per_rank=8)}
    )
    (layer,) = moe_layers(blocks).values()
    layer(torch.randn(3, H)).sum().backward()
    return type(layer.dispatcher).__name__, [n for n, p in layer.named_parameters() if isinstance(p, DTensor)]


def test_the_parallel_style_leaves_a_layer_alone_on_one_rank(ranks: RankPool) -> None:
    assert ranks.run(1, _style_on_one_rank) == [(LocalDispatcher.__name__, [])]
