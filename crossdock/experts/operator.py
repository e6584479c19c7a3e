"""A backend as one operator of torch, with its backward pass by hand.

Of a forward pass it keeps the tokens, the weights, the first product's output and the routes' order; the backward pass
computes the rest again. In bf16 that is `2 T H + 4 T K I` bytes for gated experts, and indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from crossdock.experts.checks import check_dtypes, check_ids
from crossdock.experts.experts import ExpertParams, ExpertsBackend
from crossdock.experts.formula import SWIGLU, ExpertsFormula

__all__ = ["EXPERTS_OPS", "Gradients", "Kept", "make_backend"]

EXPERTS_OPS: set[Any] = set()
"""The operators, for selective recompute: it keeps their outputs instead of running the products again."""


class Kept(NamedTuple):
    """What the forward pass hands the backward pass.

    Attributes:
        pre_activations: `[N, 2I]` (ungated `[N, I]`) of the sorted routes, biases included.
        route: `[N]`, as in `SortedRoutes`.
        counts: `[P/R]`, real routes per slot.
    """

    pre_activations: Tensor
    route: Tensor
    counts: Tensor


class Gradients(NamedTuple):
    """Of tokens `[U, H]` (`None` where not needed), weights `[U, K]` and parameters (`None` where not needed)."""

    tokens: Tensor | None
    weights: Tensor
    params: ExpertParams | None


class TunedBackend(ExpertsBackend, Protocol):
    """A backend that may be told how its kernels are to run."""

    def __call__(
        self,
        tokens: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        params: ExpertParams,
        formula: ExpertsFormula = ...,
        *,
        tuning: Sequence[int] = (),
    ) -> Tensor: ...


class Forward(Protocol):
    """`y [U, H]` as `ExpertsBackend` says, and what is kept. Without autograd. `tuning`: of kernels, as the backend
    likes it; empty unless told."""

    def __call__(
        self,
        tokens: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        params: ExpertParams,
        formula: ExpertsFormula,
        tuning: Sequence[int],
    ) -> tuple[Tensor, Kept]: ...


class Backward(Protocol):
    """The gradients. Without autograd."""

    def __call__(
        self,
        grad_y: Tensor,
        tokens: Tensor,
        weights: Tensor,
        params: ExpertParams,
        kept: Kept,
        formula: ExpertsFormula,
        tuning: Sequence[int],
        *,
        needs_tokens: bool,
        needs_params: bool,
    ) -> Gradients: ...


_PARAMS = "Tensor gate_and_up_projs, Tensor down_projs, Tensor? gate_and_up_bias, Tensor? down_bias"
_SETTINGS = "str activation, bool gated, float? limit, float up_offset, str weight_on, int[] tuning"
_NUM_PARAMS = len(ExpertParams._fields)


def make_backend(name: str, forward: Forward, backward: Backward, *, static: bool = False) -> TunedBackend:
    """The backend as operator `crossdock::{name}`.

    Args:
        name: of the operator.
        forward: computes.
        backward: computes gradients.
        static: whether `Kept` has a row for every entry of `slot_ids`, so that no shape depends on the ids.
    """

    def run(tokens: Tensor, slot_ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        params, formula = ExpertParams(*rest[:_NUM_PARAMS]), ExpertsFormula(*rest[_NUM_PARAMS:-1])
        check_ids(slot_ids, len(params.down_projs))  # in here, where tracing does not look
        y, kept = forward(tokens, slot_ids, weights, params, formula, rest[-1])
        return y, kept.pre_activations, kept.route, kept.counts

    def run_backward(grad_y: Tensor, tokens: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
        """The gradients of `_flat`."""
        params, rest = ExpertParams(*rest[:_NUM_PARAMS]), rest[_NUM_PARAMS:]
        kept, formula, (tuning, needs_tokens, needs_params) = Kept(*rest[:3]), ExpertsFormula(*rest[3:-3]), rest[-3:]
        given = grad_y, tokens, weights, params, kept, formula, tuning
        grads = backward(*given, needs_tokens=needs_tokens, needs_params=needs_params)
        return [grad for grad in (grads.tokens, grads.weights, *(grads.params or ())) if grad is not None]

    def fake(tokens: Tensor, slot_ids: Tensor, weights: Tensor, gate_and_up_projs: Tensor, *_: Any) -> Any:
        routes = slot_ids.numel() if static else torch.library.get_ctx().new_dynamic_size()
        return (
            torch.empty_like(tokens),
            tokens.new_empty(routes, gate_and_up_projs.shape[2]),
            slot_ids.new_empty(routes),
            slot_ids.new_empty(len(gate_and_up_projs)),
        )

    def fake_backward(grad_y: Tensor, tokens: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
        params, (needs_tokens, needs_params) = rest[:_NUM_PARAMS], rest[-2:]
        given = [tokens] * needs_tokens + [weights] + [param for param in params if needs_params and param is not None]
        return [torch.empty_like(tensor) for tensor in given]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tokens, _, weights, *rest = inputs
        ctx.save_for_backward(tokens, weights, *rest[:_NUM_PARAMS], *output[1:])
        ctx.settings = rest[_NUM_PARAMS:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, settings = ctx.saved_tensors, ctx.settings
        needs_tokens, _, needs_weights, *needs = ctx.needs_input_grad[: 3 + _NUM_PARAMS]
        grads = iter(backward_op(grad_y, *saved, *settings, needs_tokens, any(needs)))
        of_tokens, of_weights = next(grads) if needs_tokens else None, next(grads)
        of_params = [next(grads, None) if param is not None else None for param in saved[2 : 2 + _NUM_PARAMS]]
        return (
            of_tokens,
            None,
            of_weights if needs_weights else None,
            *(grad if needed else None for grad, needed in zip(of_params, needs, strict=True)),
            *(None for _ in settings),
        )

    inputs = f"Tensor tokens, Tensor slot_ids, Tensor weights, {_PARAMS}, {_SETTINGS}"
    forward_op = torch.library.custom_op(
        f"crossdock::{name}", run, mutates_args=(), schema=f"({inputs}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    inputs = (
        f"Tensor grad_y, Tensor tokens, Tensor weights, {_PARAMS}, Tensor pre_activations, Tensor route, Tensor counts,"
        f" {_SETTINGS}, bool needs_tokens, bool needs_params"
    )
    backward_op = torch.library.custom_op(
        f"crossdock::{name}_backward", run_backward, mutates_args=(), schema=f"({inputs}) -> Tensor[]"
    )
    forward_op.register_fake(fake)
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(differentiate, setup_context=setup)
    op = getattr(torch.ops.crossdock, name).default
    EXPERTS_OPS.add(op)

    def backend(
        tokens: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        params: ExpertParams,
        formula: ExpertsFormula = SWIGLU,
        *,
        tuning: Sequence[int] = (),
    ) -> Tensor:
        check_dtypes(tokens, params)
        y, *_ = op(
            tokens,
            slot_ids,
            weights,
            *params,
            formula.activation,
            formula.gated,
            formula.limit,
            formula.up_offset,
            formula.weight_on,
            tuning,
        )
        return y

    return backend
