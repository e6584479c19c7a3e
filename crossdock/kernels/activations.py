"""Gated activation times routing weight, in one pass over memory (docs/semantics.md, "Experts").

    h = g s(alpha g) (u + offset) p    with s the sigmoid, gate g, up u, weight p

SwiGLU has alpha 1 and offset 0; gpt-oss's quick-GEGLU has 1.702 and 1, and clamps `g <= 7`, `-7 <= u <= 7` first.
With `a = g s(alpha g)`, `v = u + offset` and the incoming gradient `d`:

    dp = sum over the row of d a v
    du = d p a
    dg = d p v (s + alpha a (1 - s))

and `du`, `dg` are 0 where a clamp cut off. Only the inputs are kept for the backward pass.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.kernels.gating import gated, gated_slopes
from crossdock.kernels.runtime import buffer_dtype, cdiv, device_of, jit, runs, tl

__all__ = [
    "FusedActivation",
    "fused_quick_geglu_prob",
    "fused_silu_gate_prob",
    "get_fused_activation_fn",
    "quick_geglu_prob_reference",
    "silu_gate_prob_reference",
]

# 16 bytes of bfloat16 per thread: 8 warps of 32 threads over 8 x 256 values.
_BLOCK_ROWS, _BLOCK_COLUMNS, _NUM_WARPS = 8, 256, 8


class FusedActivation(Protocol):
    """A gated activation times the routing weight."""

    def __call__(self, gate: Tensor, up: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
        """`activation(gate, up) * prob`, in fp32 (float64 in, float64 throughout), rounded once.

        Args:
            gate: `[N, I]`; without `up`, both halves side by side, `[N, 2I]`, gate first. Rows may be strided.
            up: `[N, I]` in the dtype of `gate`.
            prob: routing weights `[N]` or `[N, 1]` of any floating dtype; 1 without them.

        Returns:
            `[N, I]` in the dtype of `gate`.

        Raises:
            ValueError: on other shapes, or where `gate` and `up` differ in dtype.
        """
        ...


class _Form(NamedTuple):
    """The activation by its name in crossdock/kernels/gating.py, and alpha for the reference."""

    activation: str
    alpha: float
    limit: float | None
    offset: float


_SILU = _Form("silu", 1.0, None, 0.0)
_QUICK_GEGLU = _Form("quick_gelu", 1.702, 7.0, 1.0)


def fused_silu_gate_prob(gate: Tensor, up: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
    """`silu(gate) * up * prob`; shapes: `FusedActivation`."""
    return _fused(_SILU, gate, up, prob)


def fused_quick_geglu_prob(gate: Tensor, up: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
    """gpt-oss's `(up + 1) * gate * sigmoid(1.702 gate) * prob`, clamped at 7; shapes: `FusedActivation`."""
    return _fused(_QUICK_GEGLU, gate, up, prob)


def silu_gate_prob_reference(gate: Tensor, up: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
    """What `fused_silu_gate_prob` computes, in torch's own operations."""
    return _reference(_SILU, gate, up, prob)


def quick_geglu_prob_reference(gate: Tensor, up: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
    """What `fused_quick_geglu_prob` computes, in torch's own operations."""
    return _reference(_QUICK_GEGLU, gate, up, prob)


def get_fused_activation_fn(use_triton: bool, activation: Literal["silu", "quick_geglu"] = "silu") -> FusedActivation:
    """The fused function, or the reference; the fused one takes the reference itself where kernels cannot run.

    Raises:
        ValueError: for an activation that there is none of.
    """
    functions = {
        "silu": (fused_silu_gate_prob, silu_gate_prob_reference),
        "quick_geglu": (fused_quick_geglu_prob, quick_geglu_prob_reference),
    }
    if activation not in functions:
        raise ValueError(f"activation {activation!r} is unknown; valid: {', '.join(functions)}")
    fused, reference = functions[activation]
    return fused if use_triton else reference


def _reference(form: _Form, gate: Tensor, up: Tensor | None, prob: Tensor | None) -> Tensor:
    _check(gate, up, prob)
    dtype, wide = gate.dtype, torch.promote_types(gate.dtype, torch.float32)
    gate, up = _halves(gate, up)
    gate, up = gate.to(wide), up.to(wide)
    if form.limit is not None:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    h = gate * torch.sigmoid(form.alpha * gate) * (up + form.offset)
    return (h if prob is None else h * prob.reshape(-1, 1).to(wide)).to(dtype)


def _fused(form: _Form, gate: Tensor, up: Tensor | None, prob: Tensor | None) -> Tensor:
    _check(gate, up, prob)
    if not runs(gate, up, prob):
        return _reference(form, gate, up, prob)
    return _Fused.apply(form, gate, up, prob)  # type: ignore[return-value]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form: _Form, gate: Tensor, up: Tensor | None, prob: Tensor | None) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(gate, up, prob)
        return _launch_forward(form, *_halves(gate, up), prob)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor | None, Tensor | None]:  # type: ignore[override]
        gate, up, prob = ctx.saved_tensors
        dtype = buffer_dtype(gate.dtype)
        gate_grad = torch.empty(gate.shape, dtype=dtype, device=gate.device)
        up_grad = None if up is None else torch.empty(up.shape, dtype=dtype, device=up.device)
        prob_grad = torch.zeros(len(gate), device=gate.device) if ctx.needs_input_grad[3] else None
        _launch_backward(ctx.form, grad, *_halves(gate, up), prob, *_halves(gate_grad, up_grad), prob_grad)
        return (
            None,
            gate_grad.to(gate.dtype),
            None if up_grad is None else up_grad.to(gate.dtype),
            None if prob_grad is None else prob_grad.to(prob.dtype).view(prob.shape),
        )


def _launch_forward(form: _Form, gate: Tensor, up: Tensor, prob: Tensor | None) -> Tensor:
    gate, up = _rows(gate), _rows(up)
    num_rows, width = gate.shape
    out = torch.empty(num_rows, width, dtype=buffer_dtype(gate.dtype), device=gate.device)
    if out.numel():
        grid = (cdiv(num_rows, _BLOCK_ROWS), cdiv(width, _BLOCK_COLUMNS))
        with device_of(gate):
            _forward_kernel[grid](
                *(gate, up, None if prob is None else prob.reshape(-1), out),
                *(num_rows, width, gate.stride(0), up.stride(0)),
                ACTIVATION=form.activation,
                LIMIT=form.limit,
                OFFSET=form.offset,
                BLOCK_ROWS=_BLOCK_ROWS,
                BLOCK_COLUMNS=_BLOCK_COLUMNS,
                num_warps=_NUM_WARPS,
            )
    return out.to(gate.dtype)


def _launch_backward(
    form: _Form,
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    prob: Tensor | None,
    gate_grad: Tensor,
    up_grad: Tensor,
    prob_grad: Tensor | None,
) -> None:
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    num_rows, width = gate.shape
    if not gate.numel():
        return
    with device_of(gate):
        _backward_kernel[(cdiv(num_rows, _BLOCK_ROWS),)](
            *(grad, gate, up, None if prob is None else prob.reshape(-1), gate_grad, up_grad, prob_grad),
            *(num_rows, width, grad.stride(0), gate.stride(0), up.stride(0), gate_grad.stride(0), up_grad.stride(0)),
            ACTIVATION=form.activation,
            LIMIT=form.limit,
            OFFSET=form.offset,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            num_warps=_NUM_WARPS,
        )


@jit
def _forward_kernel(
    gate_ptr,  # [num_rows, width]
    up_ptr,  # [num_rows, width]
    prob_ptr,  # [num_rows] or None
    out_ptr,  # [num_rows, width], contiguous
    num_rows,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row[:, None] < num_rows) & (column[None, :] < width)
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask).to(tl.float32)
    up = tl.load(up_ptr + row[:, None] * up_stride + column[None, :], mask=mask).to(tl.float32)
    h = gated(gate, up, ACTIVATION, LIMIT, OFFSET, True)
    if prob_ptr is not None:
        h *= tl.load(prob_ptr + row, mask=row < num_rows).to(tl.float32)[:, None]
    tl.store(out_ptr + row[:, None] * width + column[None, :], h, mask=mask)


@jit
def _backward_kernel(
    grad_ptr,  # [num_rows, width]
    gate_ptr,  # [num_rows, width]
    up_ptr,  # [num_rows, width]
    prob_ptr,  # [num_rows] or None
    gate_grad_ptr,  # [num_rows, width]
    up_grad_ptr,  # [num_rows, width]
    prob_grad_ptr,  # [num_rows] fp32, or None
    num_rows,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    gate_grad_stride,
    up_grad_stride,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # A program has whole rows, so that the weight's gradient is one sum in a fixed order, without atomics.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < num_rows
    prob_grad = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    prob = tl.full([BLOCK_ROWS], 1.0, dtype=tl.float32)
    if prob_ptr is not None:
        prob = tl.load(prob_ptr + row, mask=row_mask, other=0).to(tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = row_mask[:, None] & (column < width)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column, mask=mask, other=0).to(tl.float32)
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column, mask=mask, other=0).to(tl.float32)
        up = tl.load(up_ptr + row[:, None] * up_stride + column, mask=mask, other=0).to(tl.float32)
        h, gate_slope, up_slope = gated_slopes(gate, up, ACTIVATION, LIMIT, OFFSET, True)
        if prob_grad_ptr is not None:
            prob_grad += tl.sum(grad * h, axis=1)
        grad *= prob[:, None]
        gate_grad, up_grad = grad * gate_slope, grad * up_slope
        tl.store(gate_grad_ptr + row[:, None] * gate_grad_stride + column, gate_grad, mask=mask)
        tl.store(up_grad_ptr + row[:, None] * up_grad_stride + column, up_grad, mask=mask)
    if prob_grad_ptr is not None:
        tl.store(prob_grad_ptr + row, prob_grad, mask=row_mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    return gate.tensor_split(2, dim=1)  # type: ignore[return-value]


def _rows(tensor: Tensor) -> Tensor:
    """Values of a row side by side, which the kernels take for granted; a gradient may be expanded."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _check(gate: Tensor, up: Tensor | None, prob: Tensor | None) -> None:
    if gate.dim() != 2 or (up is None and gate.shape[1] % 2):
        raise ValueError(f"gate {list(gate.shape)}: must be [N, I] with up [N, I], or [N, 2I] without")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(
            f"up {list(up.shape)} {up.dtype}: must have shape and dtype of gate, {list(gate.shape)} {gate.dtype}"
        )
    if prob is not None and (prob.shape not in ((len(gate),), (len(gate), 1)) or not prob.is_floating_point()):
        raise ValueError(f"prob {list(prob.shape)} {prob.dtype}: must be [{len(gate)}] or [{len(gate)}, 1], floating")
