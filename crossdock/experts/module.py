"""The module that owns the experts' parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock.experts.autocast import autocast_dtype
from crossdock.experts.choice import AUTO, EXPERTS_BACKENDS, choose_backend
from crossdock.experts.experts import ExpertAdapters, ExpertParams
from crossdock.experts.formula import SWIGLU, ExpertsFormula
from crossdock.experts.lora import lora_experts
from crossdock.experts.scaling import scale_gradient

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
        static_shapes: compute by `grouped_mm` with a row for every route that there could be, without a sync.

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
        self, tokens: Tensor, slot_ids: Tensor, weights: Tensor, gradient_factors: Tensor | None = None
    ) -> Tensor:
        """`tokens [U, H]`, `slot_ids [U, K]` (this rank's own slots), `weights [U, K]` -> `[U, H]`.

        `gradient_factors [P/R]` multiply the gradients of each slot's parameters.
        """
        params = ExpertParams(
            _local(self.gate_and_up_projs),
            _local(self.down_projs),
            None if self.gate_and_up_bias is None else _local(self.gate_and_up_bias),
            None if self.down_bias is None else _local(self.down_bias),
        )
        adapters = self.adapters()
        if adapters is not None:
            adapters = ExpertAdapters(*map(_local, adapters))
        if gradient_factors is not None:
            scaled = (None if tensor is None else scale_gradient(tensor, gradient_factors) for tensor in params)
            params = ExpertParams(*scaled)  # type: ignore[arg-type]
            if adapters is not None:
                adapters = ExpertAdapters(*(scale_gradient(tensor, gradient_factors) for tensor in adapters))
        # Autocast does not know every backend's products.
        dtype = autocast_dtype(params.down_projs)
        tokens, params = tokens.to(autocast_dtype(tokens)), params.to(dtype)
        if adapters is not None and self.lora_scale is not None:
            eager, static = self.backend == "eager", self.static_shapes
            given = tokens, slot_ids, weights, params, adapters.to(dtype), self.lora_scale, self.formula
            return lora_experts(*given, eager=eager, static=static)
        backend = choose_backend(self.backend, tokens, params, static=self.static_shapes)
        return backend(tokens, slot_ids, weights, params, self.formula)

    def extra_repr(self) -> str:
        slots, intermediate_size, hidden_size = self.down_projs.shape
        return f"slots={slots}, hidden_size={hidden_size}, intermediate_size={intermediate_size}, {self.backend}"


def _local(parameter: Tensor) -> Tensor:
    """This rank's rows of an expert parameter, whose gradient is this rank's own as well."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
