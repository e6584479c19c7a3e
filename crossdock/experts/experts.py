"""The module that owns the experts' parameters, and the contract of the backends that compute with them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["ExpertParams", "ExpertsBackend", "GroupedExperts", "swiglu"]


class ExpertParams(NamedTuple):
    """Weights of `P/R` slots: `gate_and_up_projs [P/R, H, 2I]` (gate first, then up) and `down_projs [P/R, I, H]`."""

    gate_and_up_projs: Tensor
    down_projs: Tensor


class ExpertsBackend(Protocol):
    """A pure function (DESIGN.md, contract 1); it knows nothing of ranks or modules."""

    def __call__(self, tokens: Tensor, slot_ids: Tensor, weights: Tensor, params: ExpertParams) -> Tensor:
        """The weighted sum over each token's slots: `y[u] = sum_k weights[u, k] * expert_{slot_ids[u, k]}(tokens[u])`.

        Args:
            tokens: `[U, H]`.
            slot_ids: `[U, K]` int64 in `0 .. P/R - 1`, `-1` for no route. A row without routes gives 0.
            weights: `[U, K]` fp32, or float64 in a float64 model.
            params: the slots' weights, in the dtype of `tokens`.

        Returns:
            `[U, H]` in the dtype of `tokens`, summed in fp32 and rounded once. With `U = 0` all inputs stay in the
            graph: an idle expert's gradient is zero, never `None`.
        """
        ...


def swiglu(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """`silu(gate) * up * weight` in fp32, rounded once to the dtype of the input (SEMANTICS.md, "Experts").

    Args:
        gate_and_up: `[N, 2I]`, gate in the first `I` columns.
        weights: `[N]`, the routing weight of each row.

    Returns:
        `[N, I]`.
    """
    compute_dtype = torch.promote_types(gate_and_up.dtype, torch.float32)
    gate, up = gate_and_up.to(compute_dtype).chunk(2, dim=-1)
    return (F.silu(gate) * up * weights.to(compute_dtype)[:, None]).to(gate_and_up.dtype)


class GroupedExperts(nn.Module):
    """All experts of a layer, or a rank's part of them, as two parameters.

    Args:
        num_slots: rows of the parameters (`E` on one rank, `P/R` under expert parallelism).
        hidden_size: `H`.
        intermediate_size: `I`.
        backend: computes the products.
    """

    def __init__(self, num_slots: int, hidden_size: int, intermediate_size: int, backend: ExpertsBackend) -> None:
        super().__init__()
        self.backend = backend
        self.gate_and_up_projs = nn.Parameter(torch.empty(num_slots, hidden_size, 2 * intermediate_size))
        self.down_projs = nn.Parameter(torch.empty(num_slots, intermediate_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.gate_and_up_projs, std=std)
        nn.init.normal_(self.down_projs, std=std)

    def forward(self, tokens: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        """`tokens [U, H]`, `slot_ids [U, K]` (this rank's own slots), `weights [U, K]` -> `[U, H]`."""
        params = ExpertParams(_local(self.gate_and_up_projs), _local(self.down_projs))
        device = tokens.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Autocast does not know every backend's products.
            dtype = torch.get_autocast_dtype(device)
            tokens, params = tokens.to(dtype), ExpertParams(*(weight.to(dtype) for weight in params))
        return self.backend(tokens, slot_ids, weights, params)

    def extra_repr(self) -> str:
        slots, hidden_size, double_intermediate_size = self.gate_and_up_projs.shape
        return f"slots={slots}, hidden_size={hidden_size}, intermediate_size={double_intermediate_size // 2}"


def _local(parameter: Tensor) -> Tensor:
    """This rank's rows of an expert parameter, whose gradient is this rank's own as well."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
