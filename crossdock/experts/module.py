"""The module that owns the experts' parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock.experts.autocast import autocast_dtype
from crossdock.experts.choice import AUTO, EXPERTS_BACKENDS, choose_backend
from crossdock.experts.experts import ExpertAdapters, ExpertParams, ForeignExperts
from crossdock.experts.formula import SWIGLU, ExpertsFormula
from crossdock.experts.lora import lora_experts
from crossdock.experts.scaling import scale_gradient
from crossdock.kernels import TileTable

__all__ = ["GroupedExperts"]


class GroupedExperts(nn.Module):
    """All experts of a layer, or a rank's part of them, as two parameters, or four with biases; adapters are four more.

    Args:
        num_slots: rows of the parameters (`E` on one rank, `P/R` under expert parallelism).
        hidden_size: `H`.
        intermediate_size: `I`.
        backend: computes the products; of `EXPERTS_BACKENDS`, or `auto`.
        formula: what an expert computes.
        bias: whether both products have one.

    Attributes:
        gate_and_up_projs, down_projs, gate_and_up_bias, down_bias: as in `ExpertParams`; the biases may be `None`.
        gate_and_up_lora_a, gate_and_up_lora_b, down_lora_a, down_lora_b: as in `ExpertAdapters`, after `add_lora`.
        lora_scale: what the adapters' products are multiplied by; `None` without adapters.
        static_shapes: compute with a row for every route that there could be, without a sync.
        is_whole: whether these are all experts, and not a rank's part of them.
        kernel_tiles: of the kernels of backend `triton`; its own choice unless told.

    Raises:
        ValueError: for an unknown backend.
    """

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        intermediate_size: int,
        backend: str = AUTO,
        formula: ExpertsFormula = SWIGLU,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if backend != AUTO and backend not in EXPERTS_BACKENDS:
            valid = ", ".join((AUTO, *EXPERTS_BACKENDS))
            raise ValueError(f"experts backend {backend!r} is unknown; valid: {valid}")
        self.backend = backend
        self.static_shapes = False
        self.is_whole = True
        self.kernel_tiles: TileTable | None = None
        self.formula = formula
        width = formula.width(intermediate_size)
        self.gate_and_up_projs = nn.Parameter(torch.empty(num_slots, hidden_size, width))
        self.down_projs = nn.Parameter(torch.empty(num_slots, intermediate_size, hidden_size))
        self.gate_and_up_bias = nn.Parameter(torch.empty(num_slots, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_slots, hidden_size)) if bias else None
        self.lora_scale: float | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights of deviation `std`; biases 0."""
        nn.init.normal_(self.gate_and_up_projs, std=std)
        nn.init.normal_(self.down_projs, std=std)
        for bias in (self.gate_and_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def add_lora(self, rank: int, alpha: float) -> None:
        """Give every expert low-rank adapters of `rank` columns, times `alpha / rank`, without any effect yet.

        Before the experts are spread over ranks. Values: `A` of deviation `1 / sqrt(3 n)` for `n` inputs, `B` 0.
        """
        _, hidden_size, width = self.gate_and_up_projs.shape
        intermediate_size = self.down_projs.shape[1]
        for name, size in zip(
            ExpertAdapters._fields, (hidden_size, width, intermediate_size, hidden_size), strict=True
        ):
            adapter = nn.Parameter(self.down_projs.new_zeros(len(self.down_projs), size, rank))
            if name.endswith("_lora_a"):
                nn.init.normal_(adapter, std=(3 * size) ** -0.5)
            self.register_parameter(name, adapter)
        self.lora_scale = alpha / rank

    def adapters(self) -> ExpertAdapters | None:
        """The parameters that `add_lora` made."""
        if self.lora_scale is None:
            return None
        return ExpertAdapters(*(getattr(self, name) for name in ExpertAdapters._fields))

    def slot_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters with a row for each slot, by name: all of them."""
        return dict(self.named_parameters())

    def forward(
        self,
        tokens: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        gradient_factors: Tensor | None = None,
        foreign: ForeignExperts | None = None,
    ) -> Tensor:
        """`tokens [U, H]`, `slot_ids [U, K]` (this rank's own slots), `weights [U, K]` -> `[U, H]`.

        Args:
            gradient_factors: `[P/R]`, multiply the gradients of each slot's parameters.
            foreign: computes the slots that follow the rows of the parameters.
        """
        rows: Mapping[str, Tensor] = self.local_rows()
        if gradient_factors is not None:
            rows = {name: scale_gradient(row, gradient_factors) for name, row in rows.items()}
        # Autocast does not know every backend's products.
        tokens = tokens.to(autocast_dtype(tokens))
        if foreign is None:
            return self.compute(tokens, slot_ids, weights, rows)
        num_rows = len(rows["down_projs"])
        compute_foreign = foreign.prepare(rows)
        if compute_foreign is None:
            return self.compute(tokens, slot_ids, weights, rows)
        y = self.compute(tokens, slot_ids.masked_fill(slot_ids >= num_rows, -1), weights, rows)
        return y + compute_foreign(tokens, (slot_ids - num_rows).clamp_min(-1), weights, self.compute)

    def local_rows(self) -> dict[str, Tensor]:
        """This rank's rows of each parameter, by name, in the graph."""
        return {name: _local(parameter) for name, parameter in self.named_parameters()}

    def compute(self, tokens: Tensor, slot_ids: Tensor, weights: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """`y [U, H]` of experts whose parameters are `rows`: as this module's, by name, in any number."""
        params = ExpertParams(*(rows.get(name) for name in ExpertParams._fields))  # type: ignore[arg-type]
        dtype = autocast_dtype(params.down_projs)
        params = params.to(dtype)
        if self.lora_scale is not None:
            adapters = ExpertAdapters(*(rows[name] for name in ExpertAdapters._fields)).to(dtype)
            eager, static = self.backend == "eager", self.static_shapes
            given = tokens, slot_ids, weights, params, adapters, self.lora_scale, self.formula
            return lora_experts(*given, eager=eager, static=static)
        backend = choose_backend(
            self.backend,
            tokens,
            params,
            static=self.static_shapes,
            is_whole=self.is_whole and len(params.down_projs) == len(self.down_projs),
            tiles=self.kernel_tiles,
        )
        return backend(tokens, slot_ids, weights, params, self.formula)

    def extra_repr(self) -> str:
        slots, intermediate_size, hidden_size = self.down_projs.shape
        return f"slots={slots}, hidden_size={hidden_size}, intermediate_size={intermediate_size}, {self.backend}"


def _local(parameter: Tensor) -> Tensor:
    """This rank's rows of an expert parameter, whose gradient is this rank's own as well."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
