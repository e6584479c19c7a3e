"""Experts that are modules of a user's own: any number of parameters, computed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from crossdock.experts.checks import check_ids
from crossdock.experts.routes import sort_routes
from crossdock.experts.scaling import scale_gradient

__all__ = ["UnpackedExperts", "ranks_apart"]

_RANKS_APART = "crossdock_ranks_apart"


def ranks_apart(parameter: nn.Parameter) -> int:
    """How many expert-parallel ranks hold another tensor in this one's place: 1 but for those of `UnpackedExperts`.

    A DTensor's layout says what is apart within its mesh; this is beyond that.
    """
    return getattr(parameter, _RANKS_APART, 1)


class UnpackedExperts(nn.ModuleDict):
    """All experts of a layer, or a rank's own, as modules; the keys are logical experts, `"0"` to `"E-1"`.

    A rank computes those that have tokens. The parameters of all others get a zero gradient, never none.

    Args:
        experts: `E` modules, each `[N, H] -> [N, H]` for any `N` above 0, without a parameter in common.

    Attributes:
        slots: the logical expert of each of this rank's slots, `-1` for an empty one.
        shapes: of the parameters of all `E` experts by name, those on other ranks included.
        buffers_stored: names of all experts' buffers that belong in a checkpoint, likewise.

    Raises:
        ValueError: for no experts, or some that share a parameter.
    """

    def __init__(self, experts: nn.ModuleList | Sequence[nn.Module]) -> None:
        super().__init__({str(expert): module for expert, module in enumerate(experts)})
        if not len(self):
            raise ValueError("experts is empty; it must have a module for each of the router's num_experts")
        first: dict[nn.Parameter, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if parameter in first:
                raise ValueError(
                    f"experts.{name} is the same parameter as experts.{first[parameter]}: experts that live on "
                    "different ranks cannot share one"
                )
            first[parameter] = name
        self.slots: tuple[int, ...] = tuple(range(len(self)))
        self.shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        self.buffers_stored = tuple(name for name in self.state_dict() if name not in self.shapes)
        self._num_ranks = 1

    def slot_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters with a row for each slot: there are none."""
        return {}

    def keep(self, slots: Sequence[int], num_ranks: int) -> None:
        """Prune to this rank's own.

        Args:
            slots: the logical expert of each, `-1` for an empty one.
            num_ranks: that share the experts, none of them twice.
        """
        self.slots, self._num_ranks = tuple(slots), num_ranks
        for expert in list(self):
            if int(expert) not in self.slots:
                del self[expert]
        self.mark()

    def mark(self) -> None:
        """Mark the parameters as this rank's own (`ranks_apart`): needed again where others have taken their place."""
        for parameter in self.parameters():
            setattr(parameter, _RANKS_APART, self._num_ranks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)
        self.mark()  # Off the meta device, for one, they are new ones.
        return applied

    def forward(
        self, tokens: Tensor, slot_ids: Tensor, weights: Tensor, gradient_factors: Tensor | None = None
    ) -> Tensor:
        """`tokens [U, H]`, `slot_ids [U, K]` (this rank's own slots), `weights [U, K]` -> `[U, H]`.

        Summed in fp32 (float64 stays) and rounded once. `gradient_factors [P/R]` multiply the gradients of each slot's
        parameters.

        Raises:
            ValueError: for an expert whose output is not of its input's shape.
        """
        check_ids(slot_ids, len(self.slots))
        route, counts = sort_routes(slot_ids, len(self.slots))
        row, weight = route // slot_ids.shape[1], weights.flatten()[route][:, None]
        y = tokens.new_zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, torch.float32))
        per_slot = counts.tolist()
        for slot, (own_row, own_weight) in enumerate(zip(row.split(per_slot), weight.split(per_slot), strict=True)):
            if len(own_row):
                factor = None if gradient_factors is None else gradient_factors[slot, None]
                output = self._compute(self.slots[slot], tokens[own_row], factor)
                y = y.index_add(0, own_row, output.to(y.dtype) * own_weight)
        return _keep_in_graph(y.to(tokens.dtype), (tokens, weights, *self.parameters()))

    def _compute(self, expert: int, x: Tensor, factor: Tensor | None) -> Tensor:
        """An expert's output `[N, H]` for `x [N, H]`; `factor [1]` multiplies the gradients of its parameters alone."""
        if factor is not None:
            x = scale_gradient(x, 1 / factor)  # undoes, for the tokens, what follows
        output = self[str(expert)](x)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"expert {expert} gives {shape} for tokens {list(x.shape)}; it must give the same shape")
        return output if factor is None else scale_gradient(output, factor)

    def extra_repr(self) -> str:
        return f"slots={self.slots}"


def _keep_in_graph(y: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Identity on `y`, with a zero gradient for each of `tensors`.

    Ranks that share an expert reduce the same gradients then, whoever of them has tokens for it; and with no token at
    all a rank takes part in the exchanges of the backward pass. Where activations are checkpointed, its saved tensor
    lets all ranks begin and end the recomputation between the same exchanges, whichever experts have saved some.
    """
    return _ZeroGradients.apply(y, *(tensor for tensor in tensors if tensor.requires_grad))  # type: ignore[return-value]


class _ZeroGradients(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _ = ctx.saved_tensors
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return grads[0], *zeros
