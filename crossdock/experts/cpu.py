"""Experts on a CPU: per-expert products into reused buffers, with the backward pass by hand.

What surrounds the products (gathering rows, activation, summing per token) is done expert by expert, block by block,
while the rows are in cache. Nothing of the size of all routes is made but the first product's output, which the
backward pass needs; it recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from crossdock.experts.experts import ExpertParams
from crossdock.experts.formula import ExpertsFormula
from crossdock.experts.operator import Gradients, Kept, make_backend
from crossdock.experts.routes import sort_routes

__all__ = ["cpu", "cpu_problem", "product_dtype"]

# Values that elementwise work takes at once: a few buffers of this many fit a core's cache, and a call costs little
# beside them.
_BLOCK_VALUES = 2**17
_NATIVE = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}


def cpu_problem(tokens: Tensor, params: ExpertParams) -> str | None:
    """Why `cpu` cannot compute these `tokens` and `params`, or `None` where it can."""
    return None if tokens.device.type == "cpu" else f"runs on a CPU, not on {tokens.device}"


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` are computed in: itself where the processor has instructions for it, else fp32."""
    # Not in every torch that is supported.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if dtype in _NATIVE and not any(capabilities.get(name) for name in _NATIVE[dtype]):
        return torch.float32
    return dtype


class _Workspace:
    """Buffers for one expert's rows at a time, in the dtype of products, reused from expert to expert."""

    def __init__(self, dtype: torch.dtype, max_rows: int) -> None:
        self.dtype = product_dtype(dtype)
        self._max_rows = max_rows
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, count: int, columns: int) -> Tensor:
        """The first `count` rows of the buffer `name`."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._max_rows, columns, dtype=self.dtype)
        return self._buffers[name][:count]

    def gather(self, name: str, source: Tensor, row: Tensor) -> Tensor:
        """`source[row]`."""
        out = self.rows(name, row.shape[0], source.shape[1])
        if source.dtype == self.dtype:
            return torch.index_select(source, 0, row, out=out)
        return out.copy_(source.index_select(0, row))

    def matrix(self, name: str, source: Tensor) -> Tensor:
        """A weight in the dtype of products."""
        if source.dtype == self.dtype:
            return source
        if name not in self._buffers:
            self._buffers[name] = torch.empty(source.shape, dtype=self.dtype)
        return self._buffers[name].copy_(source)

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write `left @ right` to `out`, whatever its dtype."""
        if out.dtype == self.dtype:
            torch.mm(left, right, out=out)
        else:
            out.copy_(left @ right)


def _block_rows(intermediate_size: int) -> int:
    return max(1, _BLOCK_VALUES // intermediate_size)


def _blocks(intermediate_size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, as many at a time as elementwise work takes."""
    step = _block_rows(intermediate_size)
    if tensors[0].shape[0] <= step:
        return iter([tensors])
    return zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, faster where that is nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _forward(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    formula: ExpertsFormula,
    tuning: Sequence[int],
) -> tuple[Tensor, Kept]:
    gate_and_up_projs, down_projs, gate_and_up_bias, down_bias = params
    weight_on = formula.weight_on
    intermediate_size, hidden_size = down_projs.shape[1:]
    route, counts = sort_routes(slot_ids, len(down_projs))
    row, weight = route // slot_ids.shape[1], weights.flatten()[route][:, None]
    per_slot = counts.tolist()
    work = _Workspace(tokens.dtype, max(per_slot, default=0))
    wide = torch.promote_types(tokens.dtype, torch.float32)
    pre_activations = tokens.new_empty(len(route), formula.width(intermediate_size))
    y = torch.zeros(tokens.shape, dtype=wide)
    of_slots = zip(*(tensor.split(per_slot) for tensor in (row, weight, pre_activations)), strict=True)
    for slot, (own_row, own_weight, kept) in enumerate(of_slots):
        if not (count := per_slot[slot]):
            continue
        x = work.gather("x", tokens, own_row)
        if weight_on == "input":
            x.mul_(own_weight)
        pre = kept if kept.dtype == work.dtype else work.rows("pre", count, kept.shape[1])
        torch.mm(x, work.matrix("gate_and_up", gate_and_up_projs[slot]), out=pre)
        if gate_and_up_bias is not None:
            pre.add_(gate_and_up_bias[slot])
        if pre is not kept:
            kept.copy_(pre)
        h = work.rows("h", count, intermediate_size)
        for block_pre, block_weight, block_h in _blocks(intermediate_size, pre, own_weight, h):
            value = formula.activate(*formula.halves(_cast(block_pre, wide)))
            if weight_on == "output":
                torch.mul(value, block_weight, out=block_h)
            else:
                block_h.copy_(value)
        out = work.rows("out", count, hidden_size)
        torch.mm(h, work.matrix("down", down_projs[slot]), out=out)
        if down_bias is not None:
            bias = down_bias[slot].to(wide)
            out.add_(bias * own_weight if weight_on == "output" else bias)
        y.index_add_(0, own_row, _cast(out, wide))
    return y.to(tokens.dtype), Kept(pre_activations, route, counts)


def _backward(
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
) -> Gradients:
    gate_and_up_projs, down_projs, _, down_bias = params
    pre_activations, route, counts = kept
    weight_on = formula.weight_on
    intermediate_size, hidden_size = down_projs.shape[1:]
    per_slot = counts.tolist()
    row, weight = route // weights.shape[1], weights.flatten()[route][:, None]
    work = _Workspace(tokens.dtype, max(per_slot, default=0))
    wide = torch.promote_types(tokens.dtype, torch.float32)
    grads = None
    if needs_params:
        grads = ExpertParams(*(None if param is None else torch.empty_like(param) for param in params))  # type: ignore[arg-type]
        idle = [slot for slot, count in enumerate(per_slot) if not count]
        for grad in grads:
            if grad is not None:
                grad[idle] = 0
    grad_tokens = torch.zeros(tokens.shape, dtype=wide) if needs_tokens else None
    grad_weight = torch.empty(len(route), dtype=wide)
    needs_input = needs_tokens or weight_on == "input"
    slopes = torch.empty(
        3, min(_block_rows(intermediate_size), max(per_slot, default=0)), intermediate_size, dtype=wide
    )
    of_slots = zip(*(tensor.split(per_slot) for tensor in (row, weight, grad_weight, pre_activations)), strict=True)
    for slot, (own_row, own_weight, own_grad_weight, pre) in enumerate(of_slots):
        if not (count := per_slot[slot]):
            continue
        grad_out = work.gather("grad_out", grad_y, own_row)
        grad_h = work.rows("grad_h", count, intermediate_size)
        torch.mm(grad_out, work.matrix("down", down_projs[slot]).t(), out=grad_h)
        h = work.rows("h", count, intermediate_size)
        grad_pre = work.rows("grad_pre", count, pre.shape[1])
        for block_pre, block_weight, block_grad_weight, block_grad_h, block_h, block_grad_pre in _blocks(
            intermediate_size, pre, own_weight, own_grad_weight, grad_h, h, grad_pre
        ):
            value, gate_slope, up_slope = slopes[:, : block_pre.shape[0]].unbind()
            value = block_h if h.dtype == wide else value
            formula.slopes(*formula.halves(_cast(block_pre, wide)), value, gate_slope, up_slope)
            grad_value = _cast(block_grad_h, wide)
            if weight_on == "output":
                torch.sum(value * grad_value, dim=1, out=block_grad_weight)
                value.mul_(block_weight)
                grad_value.mul_(block_weight)
            if value is not block_h:
                block_h.copy_(value)
            grad_gate, grad_up = formula.halves(block_grad_pre)
            torch.mul(grad_value, gate_slope, out=grad_gate)
            if grad_up is not None:
                torch.mul(grad_value, up_slope, out=grad_up)
        x = work.gather("x", tokens, own_row) if needs_params or weight_on == "input" else None
        if needs_input:
            grad_x = work.rows("grad_x", count, hidden_size)
            torch.mm(grad_pre, work.matrix("gate_and_up", gate_and_up_projs[slot]).t(), out=grad_x)
            if x is not None and weight_on == "input":
                torch.sum(_cast(x, wide) * grad_x, dim=1, out=own_grad_weight)
                grad_x.mul_(own_weight)
                x.mul_(own_weight)
            if grad_tokens is not None:
                grad_tokens.index_add_(0, own_row, _cast(grad_x, wide))
        if down_bias is not None and weight_on == "output":
            own_grad_weight += _cast(grad_out, wide) @ down_bias[slot].to(wide)
        if grads is None or x is None:
            continue
        work.product(x.t(), grad_pre, grads.gate_and_up_projs[slot])
        work.product(h.t(), grad_out, grads.down_projs[slot])
        if grads.gate_and_up_bias is not None:
            grads.gate_and_up_bias[slot] = grad_pre.sum(dim=0, dtype=wide)
        if grads.down_bias is not None:
            weighted = grad_out * own_weight if weight_on == "output" else grad_out
            grads.down_bias[slot] = weighted.sum(dim=0, dtype=wide)
    grad_weights = torch.zeros(weights.shape, dtype=weights.dtype)
    grad_weights.view(-1).index_copy_(0, route, grad_weight.to(weights.dtype))
    return Gradients(None if grad_tokens is None else grad_tokens.to(tokens.dtype), grad_weights, grads)


cpu = make_backend("cpu_experts", _forward, _backward)
"""Contract and shapes: `ExpertsBackend`. Any floating dtype; CPU alone.

A half precision that the processor has no products for is computed in fp32, which rounds less often.
"""
