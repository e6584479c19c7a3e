"""Every dispatcher with every experts backend is the same function, that of one process in float64, for drawn cases.

One call of the workers per case: each dispatcher and each backend there is for it. The oracle (tests/experts/oracle.py)
computes all ranks' tokens with all experts in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.comm import Wire, WireDtype
from crossdock.dispatch import (
    AUTO_DISPATCHER,
    DeepEPDispatcher,
    DeepEPOptions,
    Dispatcher,
    DispatchOptions,
    DispatchSituation,
    LocalDispatcher,
    build_dispatcher,
    free_deepep_buffers,
    plan_dispatch,
)
from crossdock.experts import GPT_OSS, SWIGLU, ExpertParams, ExpertsBackend, ExpertsFormula, cpu, eager, grouped_mm
from crossdock.kernels import runtime
from tests.dispatch.deepep_double import Double
from tests.experts.oracle import experts_forward, experts_gradients
from tests.ranks import RankPool

I = 8
NODES_OF = 2
DEEPEP_HIDDEN = 256
FORMULAS = (SWIGLU, GPT_OSS, ExpertsFormula("relu_squared", gated=False, weight_on="input"))
BACKENDS: dict[str, ExpertsBackend] = {
    "cpu": cpu,
    "eager": eager,
    "grouped_mm": grouped_mm,
    "grouped_mm, static": partial(grouped_mm, static=True),
}
# Norm-relative errors of whole tensors. In bf16 each product and each sum over ranks is rounded.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2}
ROUNDOFF = {"same": 0.0, "bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4}


class Inputs(NamedTuple):
    """`x [T, H]`, `slot_ids [T, K]`, `weights [T, K]` of one rank, and the gradient of its output `[T, H]`."""

    x: Tensor
    slot_ids: Tensor
    weights: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Case:
    """What is drawn; everything else follows from it.

    Attributes:
        tokens: of each rank.
        slots: per rank.
        skew: how much likelier a slot is than the next.
        drops, padding: shares of routes, and of whole tokens, that have no slot.
        formula: of `FORMULAS`.
        repeated: the backend that computes twice.
    """

    tokens: tuple[int, ...]
    slots: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    skew: float
    drops: float
    padding: float
    wire: WireDtype
    both: bool
    formula: int
    bias: bool
    repeated: str
    seed: int

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    def inputs(self, rank: int) -> Inputs:
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        shape = self.tokens[rank], self.hidden_size
        num_slots = self.num_ranks * self.slots
        gumbel = -torch.empty(shape[0], num_slots).exponential_(generator=generator).log()
        slot_ids = (gumbel - self.skew * torch.arange(num_slots)).topk(self.top_k, dim=1).indices
        slot_ids[torch.rand(slot_ids.shape, generator=generator) < self.drops] = -1
        slot_ids[torch.rand(shape[0], generator=generator) < self.padding] = -1
        wide = torch.promote_types(self.dtype, torch.float32)
        weights = torch.rand(slot_ids.shape, generator=generator, dtype=wide) + 0.1
        weights = weights.masked_fill(slot_ids < 0, 0)
        x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for _ in range(2))
        return Inputs(x, slot_ids, weights, grad)

    def params(self) -> ExpertParams:
        """Of all slots."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 999)
        num_slots, width = self.num_ranks * self.slots, FORMULAS[self.formula].width(I)
        shapes = [(num_slots, self.hidden_size, width), (num_slots, I, self.hidden_size)]
        shapes += [(num_slots, width), (num_slots, self.hidden_size)] if self.bias else []
        scales = self.hidden_size**-0.5, 0.5, 1, 1
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return ExpertParams(*((tensor * scale).to(self.dtype) for tensor, scale in zip(drawn, scales, strict=False)))

    def backends(self) -> list[str]:
        return [name for name in BACKENDS if self.dtype != torch.float64 or "grouped_mm" not in name]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ranks, slots = draw(st.sampled_from((4, 1, 2, 3))), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    shares = st.sampled_from((0.0, 0.0, 0.3, 0.8))
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, 7), min_size=num_ranks, max_size=num_ranks))),
        slots=slots,
        top_k=draw(st.integers(1, min(8, num_ranks * slots))),
        hidden_size=draw(st.sampled_from((8, 136, DEEPEP_HIDDEN))),
        dtype=dtype,
        skew=draw(st.sampled_from((0.0, 0.5, 4.0))),
        drops=draw(shares),
        padding=draw(shares),
        wire=draw(st.sampled_from(("same", "same", "bf16", "fp16", "fp8"))),
        both=draw(st.booleans()),
        formula=draw(st.integers(0, len(FORMULAS) - 1)),
        bias=draw(st.booleans()),
        repeated=draw(st.sampled_from([name for name in BACKENDS if dtype != torch.float64 or "grouped" not in name])),
        seed=draw(st.integers(0, 2**16)),
    )


def _dispatchers(case: Case) -> Iterator[tuple[str, Dispatcher]]:
    """All that there are for a case, on this rank."""
    group = dist.group.WORLD
    assert group is not None
    if case.num_ranks == 1:
        yield "local", LocalDispatcher(case.slots)
        return
    options = DispatchOptions(NODES_OF, Wire(case.wire, both=case.both))
    for name in ("allgather", "alltoall", "hierarchical"):
        if name != "hierarchical" or case.num_ranks == 2 * NODES_OF:
            yield name, build_dispatcher(name, group, case.slots, options)
    yield "static", build_dispatcher("alltoall", group, case.slots, DispatchOptions(0, options.wire, True))
    if runtime.INTERPRETED:
        static = case.seed % 2 == 1
        name = f"symmetric{', static' * static}"
        yield name, build_dispatcher("symmetric", group, case.slots, DispatchOptions(0, options.wire, static))
    experts = case.num_ranks * case.slots
    situation = DispatchSituation(
        case.num_ranks, experts, case.top_k, case.hidden_size, case.dtype, torch.device("cpu")
    )
    plan = plan_dispatch(AUTO_DISPATCHER, 0, situation, options)
    yield AUTO_DISPATCHER, build_dispatcher(plan.dispatcher, group, case.slots, options)
    if case.hidden_size == DEEPEP_HIDDEN and case.wire == "same":
        double = Double((case.dtype,))
        for deepep in (DeepEPOptions(), DeepEPOptions(expand=True), DeepEPOptions("buffer")):
            if deepep.api != "buffer" or case.num_ranks != 3:
                name = f"deepep, {deepep.api}{', expand' * deepep.expand}"
                yield name, DeepEPDispatcher(group, case.slots, None, deepep, library=double, dtypes=(case.dtype,))


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().numpy()


def _round_trip(case: Case, dispatcher: Dispatcher, backend: ExpertsBackend) -> dict[str, np.ndarray]:
    """The output, and the gradients of this rank's tokens, weights and experts."""
    inputs, rank = case.inputs(dist.get_rank()), dist.get_rank()
    x, weights = inputs.x.requires_grad_(), inputs.weights.requires_grad_()
    own = slice(rank * case.slots, (rank + 1) * case.slots)
    params = ExpertParams(*(None if p is None else p[own].clone().requires_grad_() for p in case.params()))  # type: ignore[arg-type]
    arrived = dispatcher.dispatch(x, inputs.slot_ids, weights).wait()
    y = backend(arrived.tokens, arrived.slot_ids, arrived.weights, params, FORMULAS[case.formula])
    out = dispatcher.combine(y, arrived.handle).wait()
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    out.backward(inputs.grad)
    grads = {name: param.grad for name, param in params._asdict().items() if param is not None}
    return {
        name: _array(value) for name, value in ({"y": out, "tokens": x.grad, "weights": weights.grad} | grads).items()
    }


def _identity(case: Case, dispatcher: Dispatcher) -> tuple[np.ndarray, bool]:
    """What experts that change nothing return for powers of two, which no dtype rounds; whether rows were routes."""
    inputs = case.inputs(dist.get_rank())
    arrived = dispatcher.dispatch(_powers_of_two(inputs.x), inputs.slot_ids, inputs.weights).wait()
    routed = (arrived.slot_ids >= 0).any(dim=1, keepdim=True)
    return _array(dispatcher.combine(arrived.tokens * routed, arrived.handle).wait()), arrived.grouped


def _powers_of_two(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1, 1).to(x.dtype) * torch.exp2(x.clamp(-2, 2).round())


class Result(NamedTuple):
    """Of one dispatcher on one rank: `_round_trip` by backend, whether two of them were equal, and `_identity`."""

    by_backend: dict[str, dict[str, np.ndarray]]
    bit_equal: bool
    identity: np.ndarray
    grouped: bool


def _all_dispatchers(case: Case) -> dict[str, Result]:
    results = {}
    for name, dispatcher in _dispatchers(case):
        by_backend = {each: _round_trip(case, dispatcher, BACKENDS[each]) for each in case.backends()}
        again = _round_trip(case, dispatcher, BACKENDS[case.repeated])
        bit_equal = all(np.array_equal(value, again[key]) for key, value in by_backend[case.repeated].items())
        results[name] = Result(by_backend, bit_equal, *_identity(case, dispatcher))
    free_deepep_buffers()
    return results


class Oracle:
    """All ranks' tokens through all experts, in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.by_rank = [case.inputs(rank) for rank in range(case.num_ranks)]
        self.slot_ids = torch.cat([inputs.slot_ids for inputs in self.by_rank]).numpy()

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        case, wire = self.case, Wire(self.case.wire)
        x, _, weights, grad = (torch.cat(parts) for parts in zip(*self.by_rank, strict=True))
        if case.num_ranks > 1:  # rounding has no part in the gradient
            x = wire.decode(wire.encode(x), case.hidden_size, case.dtype)
        params = (None if param is None else _array(param) for param in case.params())
        arrays: Any = [_array(x), self.slot_ids, _array(weights), *params, FORMULAS[case.formula]]
        grads = experts_gradients(_array(grad), *arrays)._asdict()
        return {"y": experts_forward(*arrays)} | {name: grad for name, grad in grads.items() if grad is not None}

    def bound(self, dispatcher_name: str, name: str) -> float:
        """Of the norm of the error of output or gradient `name`."""
        scale = np.linalg.norm(self.expected[name])
        if name == "weights":
            # One number per route, a sum of `H` products of random signs that may cancel: what they come to in general.
            grad = _array(torch.cat([inputs.grad for inputs in self.by_rank]))
            sizes = np.linalg.norm(self.expected["y"], axis=1) * np.linalg.norm(grad, axis=1)
            scale = max(scale, np.linalg.norm(sizes) / self.case.hidden_size**0.5)
        return float(scale) * self._tolerance(dispatcher_name)

    def _tolerance(self, dispatcher_name: str) -> float:
        """In both directions each result and gradient is rounded once more per hop, gradients of tokens twice."""
        case = self.case
        hops = 2 if dispatcher_name in ("hierarchical", AUTO_DISPATCHER) else 1
        saves = not Wire(case.wire).leaves(case.hidden_size, case.dtype)
        lossy = case.num_ranks > 1 and case.both and saves
        return TOLERANCES[case.dtype] + (2 * hops * ROUNDOFF[case.wire] if lossy else 0)

    def times(self, *, grouped: bool) -> np.ndarray:
        """How many rows of a token exist, `[T, 1]`: one per rank that it needs, or per route."""
        if grouped:
            return (self.slot_ids >= 0).sum(axis=1, keepdims=True)
        ranks = [{slot // self.case.slots for slot in slots if slot >= 0} for slots in self.slot_ids.tolist()]
        return np.array([len(needed) for needed in ranks]).reshape(-1, 1)


def _check(ranks: RankPool, case: Case) -> None:
    by_rank: list[dict[str, Result]] = ranks.run(case.num_ranks, _all_dispatchers, case)
    oracle = Oracle(case)
    x = _array(torch.cat([_powers_of_two(inputs.x) for inputs in oracle.by_rank]))
    for dispatcher_name in by_rank[0]:
        results = [of_rank[dispatcher_name] for of_rank in by_rank]
        for backend in case.backends():
            ours = [result.by_backend[backend] for result in results]
            assert ours[0].keys() == oracle.expected.keys()
            for name, expected in oracle.expected.items():
                error = np.linalg.norm(np.concatenate([of_rank[name] for of_rank in ours]) - expected)
                bound = oracle.bound(dispatcher_name, name)
                assert error <= bound, f"{dispatcher_name}, {backend}: {name} is off by {error}, more than {bound}"
        if not dispatcher_name.startswith("deepep"):  # whose rows come in any order
            assert all(result.bit_equal for result in results), f"{dispatcher_name}: two runs differ"
        identity = np.concatenate([result.identity for result in results])
        times = oracle.times(grouped=results[0].grouped)
        np.testing.assert_array_equal(identity, x * times, f"{dispatcher_name}: identity experts")


def _drawn(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same cases in every run."""
    profile = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    return lambda test: profile(given(case=cases())(test))


@_drawn(12)
def test_every_dispatcher_with_every_backend_equals_the_oracle(ranks: RankPool, case: Case) -> None:
    """Outputs and all gradients; identity experts return a token once per row; two runs are equal bit by bit."""
    _check(ranks, case)


@pytest.mark.slow
@_drawn(200)
def test_every_dispatcher_with_every_backend_equals_the_oracle_in_many_cases(ranks: RankPool, case: Case) -> None:
    _check(ranks, case)
