"""`deepep` on a double of its library (`deepep_double.py`): equal to `alltoall`, nothing repeated, nothing left over.

The double checks what it is called with. It is no hardware: what these tests cannot see is said in docs/moe.md.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.dispatch import (
    AllToAllDispatcher,
    DeepEPDispatcher,
    DeepEPOptions,
    Dispatcher,
    Nodes,
    Traffic,
    build_dispatcher,
    free_deepep_buffers,
    load_deepep,
)
from crossdock.kernels import dequantize_fp8, quantize_fp8
from crossdock.moe import moe_layers
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from tests.dispatch.deepep_double import Double
from tests.ranks import RankPool

H, SLOTS = 256, 8
# The real library takes bf16 alone.
EXACT = (torch.float64, torch.bfloat16)
PATTERNS = ("any", "top 1", "top 8", "missing", "idle source", "one destination", "no routes", "no tokens")
OPTIONS = [
    DeepEPOptions(api=api, expand=expand, fp8_dispatch=fp8)
    for api, expand, fp8 in product(("elastic", "buffer"), (False, True), (False, True))
    if not (expand and api == "buffer")
]


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _inputs(pattern: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x [T, H]`, `slot_ids [T, K]`, `weights [T, K]` of this rank, and the gradient of its output `[T, H]`."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100 * PATTERNS.index(pattern) + rank)
    num_tokens = 0 if pattern == "no tokens" or (pattern == "idle source" and rank == 0) else 5 + 2 * rank
    scores = torch.rand(num_tokens, num_ranks * SLOTS)
    if pattern == "one destination":
        scores[:, :SLOTS] += 2
    slot_ids = scores.topk({"top 1": 1, "top 8": 8}.get(pattern, 3), dim=1).indices
    if pattern == "missing":
        slot_ids[torch.rand(slot_ids.shape) < 0.5] = -1
        slot_ids[0] = -1
    elif pattern == "no routes":
        slot_ids.fill_(-1)
    x, grad = (torch.randn(num_tokens, H, dtype=torch.float64).to(dtype) for _ in range(2))
    weights = torch.rand(slot_ids.shape, dtype=torch.promote_types(dtype, torch.float32))
    return x, slot_ids, weights.masked_fill(slot_ids < 0, 0), grad


def _round_trip(
    dispatcher: Dispatcher, x: Tensor, slot_ids: Tensor, weights: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """Experts that square: `y = x^2 sum_k w_k factor(slot_k)`; the output and the gradients."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    arrived = dispatcher.dispatch(x, slot_ids, weights).wait()
    assert arrived.slot_ids.dtype == torch.int64
    assert arrived.tokens.dtype == x.dtype
    real = arrived.slot_ids >= 0
    assert bool((arrived.weights[~real] == 0).all())
    if arrived.tokens_per_slot is not None:
        counts = torch.bincount(arrived.slot_ids[real], minlength=SLOTS)
        assert arrived.tokens_per_slot.tolist() == counts.tolist()
    if arrived.grouped:
        assert arrived.slot_ids.shape[1] == 1
        assert bool((arrived.slot_ids.diff(dim=0) >= 0).all())
    first = dist.get_rank() * SLOTS
    factors = torch.where(real, (arrived.slot_ids + first) % 13 + 1, 0).to(arrived.weights.dtype) / 8
    y = (arrived.tokens.to(factors.dtype).square() * (arrived.weights * factors).sum(dim=1, keepdim=True)).to(x.dtype)
    out = dispatcher.combine(y, arrived.handle).wait()
    out.backward(grad)
    assert x.grad is not None
    assert weights.grad is not None
    return {"out": out.detach(), "grad of x": x.grad, "grad of weights": weights.grad}


def _errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over largest magnitude."""
    result = {}
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        largest = value.double().abs().max().item() if value.numel() else 0.0
        difference = (ours[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        result[name] = difference / max(largest, 1e-30)
    return result


def _against_alltoall(dtype: torch.dtype) -> list[tuple[DeepEPOptions, str, dict[str, float]]]:
    results = []
    other = AllToAllDispatcher(_group(), SLOTS)
    for options in OPTIONS:
        double = Double(EXACT if dtype == torch.float64 else (torch.bfloat16,))
        dispatcher = DeepEPDispatcher(_group(), SLOTS, None, options, library=double, dtypes=double.dtypes)
        for pattern in PATTERNS:
            x, slot_ids, weights, grad = _inputs(pattern, dtype)
            ours = _round_trip(dispatcher, x, slot_ids, weights, grad)
            # What a token is rounded to on the way does not depend on where it goes.
            rounded = dequantize_fp8(*quantize_fp8(x), dtype) if options.fp8_dispatch else x
            theirs = _round_trip(other, rounded, slot_ids, weights, grad)
            results.append((options, pattern, _errors(ours, theirs)))
        assert double.calls["dispatch"] == double.calls["cached dispatch"] == len(PATTERNS)
        assert double.calls["combine"] == double.calls["combine with weights"] == len(PATTERNS)
        assert (double.outstanding, double.alive) == (0, 0)
        free_deepep_buffers()
        assert all(buffer.destroyed for buffer in double.buffers)
    return results


@pytest.mark.parametrize(("dtype", "num_ranks"), [(torch.bfloat16, 2), (torch.float64, 4)])
def test_output_and_gradients_equal_alltoall(ranks: RankPool, dtype: torch.dtype, num_ranks: int) -> None:
    """In float64 up to the order of sums. In bf16 a row per route is rounded, and then the sum of a rank's."""
    for by_case in ranks.run(num_ranks, _against_alltoall, dtype):
        assert len(by_case) == len(OPTIONS) * len(PATTERNS)
        for options, pattern, errors in by_case:
            bound = 1e-13 if dtype == torch.float64 else 2e-2 if options.expand else 1e-6
            assert all(error <= bound for error in errors.values()), (options, pattern, errors)


def test_fp8_is_within_a_sixteenth() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, H, dtype=torch.float64) * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    values, scales = quantize_fp8(x)
    assert (values.dtype, scales.dtype, tuple(scales.shape)) == (torch.float8_e4m3fn, torch.float32, (7, H // 128))
    largest = x.view(7, -1, 128).abs().amax(dim=2).repeat_interleave(128, dim=1)
    # A subnormal value is within half a step of 2^-9.
    bound = torch.maximum(x.abs() / 16, largest / 448 * 2**-10 * 1.001)
    assert bool(((dequantize_fp8(values, scales, torch.float64) - x).abs() <= bound).all())
    assert bool((dequantize_fp8(*quantize_fp8(torch.zeros(2, H)), torch.float32) == 0).all())
    assert bool(dequantize_fp8(*quantize_fp8(torch.full((1, H), torch.nan)), torch.float32).isnan().all())


class _Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        config = replace(config, experts="eager", sequence_aux_loss_coeff=0.1)
        self.moe = MoE(H, 8, RouterConfig(9, 2), config, shared_intermediate_size=8)
        assert self.moe.shared_experts is not None
        for part in (self.moe.experts, self.moe.shared_experts):
            part.reset_parameters(std=0.5)
        self.moe.router.reset_parameters(std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def _blocks(config: MoEConfig, dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    return cast(nn.ModuleList, apply_ep(nn.ModuleList([_Block(config), _Block(config)]).to(dtype), mesh))


def _train(blocks: nn.ModuleList) -> list[np.ndarray]:
    """Two micro-batches whose backward passes come last; the last rank has no tokens. The parameters' gradients."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    batches = torch.randn(2, num_ranks, 6, H, dtype=next(blocks.parameters()).dtype)[:, rank]
    losses = []
    for batch in batches:
        x = batch[: 0 if rank == num_ranks - 1 else 5 - rank].clone().requires_grad_()
        for block in blocks:
            x = block(x)
        losses.append(x.square().sum())
    for loss in losses:
        loss.backward()
    grads = [cast(Tensor, parameter.grad) for parameter in blocks.parameters()]
    return [(grad.to_local() if isinstance(grad, DTensor) else grad).double().numpy() for grad in grads]


def _recompute() -> dict[str, Any]:
    blocks = _blocks(MoEConfig(), torch.float64)
    results: dict[str, Any] = {"alltoall": (_train(blocks), _rows_sent(blocks))}
    for options in (DeepEPOptions(), DeepEPOptions(expand=True), DeepEPOptions(api="buffer")):
        for mode in ("none", "full", "selective"):
            double = Double(EXACT)
            blocks = _blocks(MoEConfig(), torch.float64)
            for layer in moe_layers(blocks).values():
                slots = layer.placement.slots_per_rank
                layer.dispatcher = DeepEPDispatcher(_group(), slots, None, options, library=double, dtypes=EXACT)
            apply_activation_checkpoint(blocks, ActivationCheckpointConfig(mode))
            gc.disable()
            grads = _train(blocks)
            assert len(double.buffers) == 1, "two layers share one buffer"
            assert (double.outstanding, double.alive) == (0, 0)
            gc.enable()
            free_deepep_buffers()
            assert all(buffer.destroyed for buffer in double.buffers)
            results[f"{options.api} {options.expand} {mode}"] = (grads, dict(double.calls), _rows_sent(blocks))
    return results


def _rows_sent(blocks: nn.Module) -> list[Traffic]:
    return [replace(layer.dispatcher.traffic, metadata=0) for layer in moe_layers(blocks).values()]


def test_selective_recompute_repeats_no_exchange(ranks: RankPool) -> None:
    """Under full recompute rows arrive in another order the second time; the backward pass goes by that order."""
    exchanges = 2 * 2  # layers, micro-batches
    for results in ranks.run(4, _recompute):
        expected, rows_sent = results.pop("alltoall")
        assert len(results) == 9
        for name, (grads, calls, rows_sent_here) in results.items():
            if name.endswith("full"):
                assert rows_sent_here[0].within > rows_sent[0].within
            else:
                assert rows_sent_here == rows_sent, name
            for ours, theirs in zip(grads, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11, err_msg=name)
            times = 2 if name.endswith("full") else 1
            assert calls["dispatch"] == times * exchanges, name
            assert exchanges <= calls["combine"] <= times * exchanges, name
            assert calls["cached dispatch"] == calls["combine with weights"] == exchanges, name


def _by_name() -> list[Any]:
    """In bf16, on a library found by its name; then the same by `alltoall`, and the SMs that were asked for."""
    config = MoEConfig(dispatcher="deepep", deepep_num_sms=8, deepep_max_tokens_per_rank=64)
    results: list[Any] = []
    for api in ("elastic", "buffer"):
        double = Double()
        sys.modules["deep_ep"] = cast(Any, double)
        try:
            grads = _train(_blocks(replace(config, deepep_api=api), torch.bfloat16))
        finally:
            del sys.modules["deep_ep"]
        free_deepep_buffers()
        results.append((grads, double.num_sms, [getattr(b, "num_max_tokens_per_rank", 64) for b in double.buffers]))
    return [*results, _train(_blocks(MoEConfig(), torch.bfloat16))]


def test_a_model_in_bf16_trains_by_name_as_with_alltoall(ranks: RankPool) -> None:
    for *results, expected in ranks.run(2, _by_name):
        for grads, num_sms, room in results:
            assert (num_sms, room) == ({8}, [64])
            for ours, theirs in zip(grads, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2 * np.abs(theirs).max(initial=1e-9))


def _chunks() -> tuple[set[tuple[str, int]], list[Any], list[Any]]:
    """What `Buffer` was asked for with sizes of chunks, and the gradients with and without."""
    results = []
    asked: set[tuple[str, int]] = set()
    chunked = MoEConfig(dispatcher="deepep", deepep_dispatch_chunk=12, deepep_combine_chunk=3, deepep_num_sms=8)
    for config in (MoEConfig(dispatcher="deepep"), chunked):
        double = Double(elastic=config is chunked)  # a size of chunks asks for Buffer, beside ElasticBuffer too
        sys.modules["deep_ep"] = cast(Any, double)
        try:
            results.append(_train(_blocks(config, torch.bfloat16)))
        finally:
            del sys.modules["deep_ep"]
        free_deepep_buffers()
        asked = double.chunks
        assert config is not chunked or double.num_sms == {8}
    return asked, *results


def test_chunks_of_buffer_are_as_they_are_set_with_the_same_numbers(ranks: RankPool) -> None:
    for asked, plain, chunked in ranks.run(2, _chunks):
        assert asked == {("dispatch", 12), ("combine", 3)}
        for ours, theirs in zip(chunked, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2 * np.abs(theirs).max(initial=1e-9))


def _overlap() -> list[tuple[list[int], list[int]]]:
    results = []
    for api in ("elastic", "buffer"):
        double = Double()
        dispatcher = DeepEPDispatcher(_group(), SLOTS, None, DeepEPOptions(api=api), library=double)
        x, slot_ids, weights, grad = _inputs("any", torch.bfloat16)
        backward: list[int] = []
        x.requires_grad_()
        arriving = dispatcher.dispatch(x, slot_ids, weights)
        meanwhile = x.sin()
        forward = [double.outstanding]
        arrived = arriving.wait()
        forward.append(double.outstanding)
        returning = dispatcher.combine(arrived.tokens * 2, arrived.handle)
        later = x.cos()
        forward.append(double.outstanding)
        out = returning.wait() + meanwhile + later
        forward.append(double.outstanding)
        for work in (later, arrived.tokens, meanwhile):
            work.register_hook(lambda _, double=double, seen=backward: seen.append(double.outstanding))
        out.backward(grad)
        free_deepep_buffers()
        results.append((forward, [*backward, double.outstanding]))
    return results


def test_other_work_runs_while_tokens_travel_in_both_directions(ranks: RankPool) -> None:
    for results in ranks.run(2, _overlap):
        for forward, backward in results:
            assert forward == [1, 0, 1, 0]
            # Gradients: of what ran while results, then tokens, travelled; the experts' in between.
            assert backward == [1, 0, 1, 0]


def _growth() -> list[list[Any]]:
    results = []
    for api in ("elastic", "buffer"):
        double = Double()
        options = DeepEPOptions(api=api)
        first, second = (DeepEPDispatcher(_group(), SLOTS, Nodes((0, 1)), options, library=double) for _ in range(2))
        outputs, made = [], []
        # The last rank alone has more tokens the second time; the third fits.
        for dispatcher, more in ((first, 0), (second, 40), (first, 30)):
            num_tokens = 4 + more * (dist.get_rank() == dist.get_world_size() - 1)
            x = torch.ones(num_tokens, H, dtype=torch.bfloat16, requires_grad=True)
            slot_ids = torch.arange(0, dist.get_world_size() * SLOTS, SLOTS).repeat(num_tokens, 1)
            arrived = dispatcher.dispatch(x, slot_ids, torch.ones(slot_ids.shape)).wait()
            outputs.append((x, dispatcher.combine(arrived.tokens, arrived.handle).wait()))
            made.append(len(double.buffers))
        for _, out in outputs:
            out.sum().backward()
        values = {value for x, out in outputs for t in (x.grad, out) for value in cast(Tensor, t).flatten().tolist()}
        room = [getattr(buffer, "num_max_tokens_per_rank", None) for buffer in double.buffers]
        free_deepep_buffers()
        assert all(buffer.destroyed for buffer in double.buffers)
        results.append([made, room, values, first.traffic])
    return results


def test_a_buffer_grows_on_all_ranks_and_handles_keep_theirs(ranks: RankPool) -> None:
    for rank, (elastic, plain) in enumerate(ranks.run(2, _growth)):
        assert elastic[:3] == [[1, 2, 2], [4, 88], {2.0}]
        assert plain[:3] == [[1, 1, 1], [None], {2.0}]
        # Of the first and third time, forward and backward: a row per token to the other rank, and one back for each of
        # its.
        sent = (4 + 4, 4 + 34)
        assert elastic[3] == plain[3]
        assert elastic[3].between == 2 * (sent[rank] + sent[1 - rank]) * H * 2
        assert elastic[3].least_between == 4 * sent[rank] * H * 2
        assert elastic[3].within == 0


def _without_gradients() -> list[int]:
    double = Double()
    dispatcher = DeepEPDispatcher(_group(), SLOTS, library=double)
    x, slot_ids, weights, _ = _inputs("any", torch.bfloat16)
    with torch.no_grad():
        arrived = dispatcher.dispatch(x, slot_ids, weights).wait()
        dispatcher.combine(arrived.tokens, arrived.handle).wait()
    held = double.alive
    del arrived
    free_deepep_buffers(destroy=False)
    return [held, double.alive, sum(buffer.destroyed for buffer in double.buffers)]


def test_a_handle_lives_as_long_as_something_needs_it(ranks: RankPool) -> None:
    assert ranks.run(2, _without_gradients) == [[1, 0, 0]] * 2


def _refusals() -> list[str]:
    messages = []

    def refused(action: Any) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the test looks at all of them)
            action()
        messages.append(str(error.value))

    double = Double()
    dispatcher = DeepEPDispatcher(_group(), SLOTS, library=double)
    x, slot_ids, weights, _ = _inputs("any", torch.bfloat16)
    refused(lambda: dispatcher.dispatch(x.float(), slot_ids, weights))
    refused(lambda: dispatcher.dispatch(x[:, :240], slot_ids, weights))
    refused(lambda: dispatcher.dispatch(x, slot_ids.repeat(1, 11), weights.repeat(1, 11)))
    refused(lambda: DeepEPDispatcher(_group(), 257, library=double))
    refused(lambda: DeepEPDispatcher(_group(), SLOTS, library=Double(elastic=False, plain=False)))
    refused(lambda: DeepEPDispatcher(_group(), SLOTS, None, DeepEPOptions(expand=True), library=Double(elastic=False)))
    refused(lambda: DeepEPDispatcher(_group(), SLOTS, None, DeepEPOptions(api="buffer"), library=double))
    refused(lambda: build_dispatcher("deepep", _group(), SLOTS))
    free_deepep_buffers()
    return messages


def test_what_cannot_work_is_refused_in_one_line(ranks: RankPool) -> None:
    for messages in ranks.run(3, _refusals):
        expected = (
            "torch.float32",
            "multiple of 256, not 240",
            "32 experts per token at most, not 33",
            "256 per rank at most",
            "has neither",
            "expand needs what deep_ep 2.1.0 lacks",
            "does not run on 3 ranks",
            "No module named 'deep_ep'",
        )
        for message, part in zip(messages, expected, strict=True):
            assert part in message
            assert "\n" not in message
            assert "alltoall" in message or "has the API" in message


def test_a_missing_or_too_old_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ValueError, match=r"deep_ep.*2\.1.*github\.com/deepseek-ai/DeepEP.*'alltoall'"):
        load_deepep()
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, Double(elastic=False, plain=False)))
    with pytest.raises(ValueError, match=r"deep_ep.*ElasticBuffer.*'alltoall'.*2\.1\.0 has neither"):
        load_deepep()
    double = Double(elastic=False)
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, double))
    assert load_deepep() is double


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_sms": 7}, "even"),
        ({"dispatch_chunk": 256}, "below 256"),
        ({"combine_chunk": -1}, "below 256"),
        ({"combine_chunk": 4, "api": "elastic"}, "no chunks"),
        ({"dispatch_chunk": 4, "expand": True}, "no chunks"),
        ({"max_tokens_per_rank": -1}, "0 or more"),
        ({"api": "buffer", "expand": True}, "no expand"),
    ],
)
def test_options_that_cannot_work_are_refused(settings: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        DeepEPOptions(**settings)
