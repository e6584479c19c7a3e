"""The contract of the backends that compute experts (docs/design.md, contract 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from crossdock.experts.formula import ExpertsFormula

__all__ = ["ComputeRows", "ExpertAdapters", "ExpertParams", "ExpertsBackend", "ForeignExperts"]


class ExpertParams(NamedTuple):
    """Weights of `P/R` slots: `gate_and_up_projs [P/R, H, 2I]` (gate first, then up) and `down_projs [P/R, I, H]`.

    Ungated experts have `gate_and_up_projs [P/R, H, I]`. The biases, where there are any: `[P/R, 2I]` (or `[P/R, I]`)
    and `[P/R, H]`.
    """

    gate_and_up_projs: Tensor
    down_projs: Tensor
    gate_and_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> ExpertParams:
        """All of them in `dtype`."""
        return ExpertParams(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # type: ignore[arg-type]


class ExpertAdapters(NamedTuple):
    """Low-rank adapters of `P/R` slots (`crossdock/experts/lora.py`): of the first product `[P/R, H, r]` and
    `[P/R, 2I, r]` (ungated `[P/R, I, r]`), of the second `[P/R, I, r]` and `[P/R, H, r]`."""

    gate_and_up_lora_a: Tensor
    gate_and_up_lora_b: Tensor
    down_lora_a: Tensor
    down_lora_b: Tensor

    def to(self, dtype: torch.dtype) -> ExpertAdapters:
        """All of them in `dtype`."""
        return ExpertAdapters(*(tensor.to(dtype) for tensor in self))


class ExpertsBackend(Protocol):
    """A pure function (docs/design.md, contract 1); it knows nothing of ranks or modules."""

    def __call__(
        self, tokens: Tensor, slot_ids: Tensor, weights: Tensor, params: ExpertParams, formula: ExpertsFormula = ...
    ) -> Tensor:
        """The weighted sum over each token's slots: `y[u] = sum_k weights[u, k] * expert_{slot_ids[u, k]}(tokens[u])`.

        Args:
            tokens: `[U, H]`.
            slot_ids: `[U, K]` int64 in `0 .. P/R - 1`, `-1` for no route. A row without routes gives 0.
            weights: `[U, K]` fp32, or float64 in a float64 model.
            params: the slots' weights, in the dtype of `tokens`.
            formula: what an expert computes; SwiGLU with the weight on the output unless told.

        Returns:
            `[U, H]` in the dtype of `tokens`, summed in fp32 and rounded once. With `U = 0` all inputs stay in the
            graph: an idle expert's gradient is zero, never `None`.
        """
        ...


ComputeRows = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Of tokens `[U, H]`, ids of rows `[U, K]`, weights `[U, K]` and parameters by name, with these rows: `y [U, H]`."""


class ForeignExperts(Protocol):
    """Experts of other ranks that this one computes as well, in slots that follow the rows of its own parameters."""

    def prepare(self, rows: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor, ComputeRows], Tensor] | None:
        """Before this rank's own experts are computed, on all ranks of the group that holds the experts.

        Args:
            rows: this rank's parameters by name, a row for each of its primaries, in the graph.

        Returns:
            What computes the foreign ones: of tokens `[U, H]`, ids of foreign slots from 0 `[U, K]`, weights `[U, K]`
            and a function that computes with given rows; on all ranks, whatever the ids. `None` where there are none.
        """
        ...
