"""Muon for the matrices of hidden layers, AdamW for all other parameters, on any layout, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from crossdock.experts import GroupedExperts, UnpackedExperts
from crossdock.optim.hidden_matrices import MatrixForm, hidden_matrices, router_parameters
from crossdock.optim.newton_schulz import orthogonalise
from crossdock.optim.whole_matrices import Portion, ShardedMatrices, exchanges, gather_matrices, scatter_matrices
from crossdock.parallel import local_part

__all__ = ["AdjustLR", "Muon"]

AdjustLR = Literal["match_rms_adamw", "original"]
"""How large an update is: as AdamW's, or as first published."""


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) beside AdamW.

    For a matrix `W [n_out, n_in]` with gradient `G`, as `torch.optim.Muon` has it:

        B <- m B + (1 - m) G;    U = (1 - m) G + m B    (Nesterov)
        W <- W - lr * weight_decay * W - lr * scale * orthogonalise(U)

    with `scale = 0.2 sqrt(max(n_out, n_in))` for `match_rms_adamw` (arXiv 2502.16982: an update is then as large as
    AdamW's, so that its learning rate fits) or `sqrt(max(1, n_out / n_in))` for `original`. Every matrix is
    orthogonalised by itself, whatever parameter holds it: each expert's, its gate and its up projection alone. So the
    result does not depend on how they are stored or laid out. A sharded matrix is whole for a moment, on one rank of
    those that share it, in turn; replicas each compute their own.

    Parameters without a gradient stay as they are. All that are no matrix of a hidden layer (embeddings, the output
    head, norms, biases, routers, gates, adapters) are AdamW's, which decays them but vectors, experts' biases, routers.

    Make it when the model has its layout. `param_groups` are Muon's one and AdamW's two, each with `lr`; the state is
    `momentum_buffer` or AdamW's, laid out as the parameters are.

    Args:
        model: on any layout.
        lr: learning rate of both.
        momentum: `m`.
        weight_decay: of both.
        adjust_lr_fn: `scale`.
        betas: AdamW's.
        eps: AdamW's.
        dtype: in which matrices travel and are orthogonalised, bfloat16 where a model computes in it; by default the
            parameters' own.
        matrices: which parameters are Muon's, and how they hold matrices; by default `hidden_matrices(model)`.
        exchange_bytes: of whole matrices on a rank at a time, or one matrix; a step needs some times as much memory.

    Raises:
        ValueError: for a model without such matrices, parameters that FSDP has offloaded, or a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        adjust_lr_fn: AdjustLR = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype | None = None,
        matrices: Mapping[nn.Parameter, MatrixForm] | None = None,
        exchange_bytes: int = 64 * 2**20,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum}: must be at least 0 and below 1")
        if adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust_lr_fn = {adjust_lr_fn!r}: must be match_rms_adamw or original")
        forms = hidden_matrices(model) if matrices is None else matrices
        # With experts that are modules, this rank may be one that has none.
        if not forms and not any(isinstance(module, UnpackedExperts) for module in model.modules()):
            raise ValueError("the model has no matrix of a hidden layer that is trained; use AdamW")
        self._layouts = {parameter: _Layout.of(parameter, form) for parameter, form in forms.items()}
        self._dtype, self._exchange_bytes = dtype, exchange_bytes
        rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in forms]
        kept = {parameter for parameter in rest if parameter.ndim < 2} | _undecayed(model)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "is_muon": False,
            "momentum": momentum,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
            "eps": eps,
            "fused": True,
        }
        groups: list[dict[str, Any]] = [
            {"params": list(forms), "is_muon": True},
            {"params": [parameter for parameter in rest if parameter not in kept]},
            {"params": [parameter for parameter in rest if parameter in kept], "weight_decay": 0.0},
        ]
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters. Collective for the ranks that share matrices, whether they have gradients or not."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["is_muon"]:
                self._step_muon(group)
            else:
                self._step_adamw(group)
        return loss

    def _step_adamw(self, group: dict[str, Any]) -> None:
        """By element, so that each rank's part is all it takes."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=local_part(parameter).device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        if parameters:
            adamw(
                [local_part(parameter) for parameter in parameters],
                [_local_gradient(parameter) for parameter in parameters],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _step_muon(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                local_part(state["momentum_buffer"]).lerp_(_local_gradient(parameter), 1 - group["momentum"])
        for parameters in self._shared_alike(group["params"]):
            self._step_together(group, parameters)

    def _shared_alike(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those whose matrices the same ranks share, the largest first: in one order on all ranks."""
        together: dict[Any, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups = tuple(stage.group.group_name for stage in self._layouts[parameter].matrices.stages)
            key = (groups, str(self._dtype or parameter.dtype), str(local_part(parameter).device))
            together.setdefault(key, []).append(parameter)
        return [sorted(together[key], key=lambda p: -math.prod(p.shape[-2:])) for key in sorted(together)]

    def _step_together(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        dtype = self._dtype or parameters[0].dtype
        by_matrices = {self._layouts[parameter].matrices: parameter for parameter in parameters}
        for portions in exchanges(list(by_matrices), self._exchange_bytes // dtype.itemsize):
            chosen = [by_matrices[portion.matrices] for portion in portions]
            pieces = [
                self._update(parameter, portion, group["momentum"]).to(dtype)
                for parameter, portion in zip(chosen, portions, strict=True)
            ]
            whole = gather_matrices(portions, pieces)
            whole = _orthogonalised(whole, [self._layouts[parameter].form for parameter in chosen])
            pieces = scatter_matrices(portions, whole)
            for parameter, portion, piece in zip(chosen, portions, pieces, strict=True):
                if parameter.grad is not None:
                    scale = self._layouts[parameter].scale(group["adjust_lr_fn"])
                    own = portion.matrices.local(parameter)[portion.part]
                    own.mul_(1 - group["lr"] * group["weight_decay"]).add_(piece, alpha=-group["lr"] * scale)

    def _update(self, parameter: nn.Parameter, portion: Portion, momentum: float) -> Tensor:
        """What is to be orthogonalised, this rank's pieces `[num, a, b]`; zeros without a gradient."""
        local = portion.matrices.local
        if parameter.grad is None:
            return torch.zeros_like(local(parameter)[portion.part])
        buffer = local(self.state[parameter]["momentum_buffer"])[portion.part]
        return local(_local_gradient(parameter))[portion.part].lerp(buffer, momentum)


class _Layout(NamedTuple):
    """Where the matrices of a parameter are, and how it holds them."""

    matrices: ShardedMatrices
    form: MatrixForm

    @classmethod
    def of(cls, parameter: nn.Parameter, form: MatrixForm) -> _Layout:
        _refuse_offloaded(parameter)
        n_out = parameter.shape[-1 if form.transposed else -2]
        if form.parts < 1 or n_out % form.parts:
            raise ValueError(f"parts = {form.parts}: must divide n_out, {n_out} of {list(parameter.shape)}")
        return cls(ShardedMatrices(parameter), form)

    def scale(self, adjust_lr_fn: AdjustLR) -> float:
        n_in, n_out = self.matrices.shape if self.form.transposed else self.matrices.shape[::-1]
        n_out //= self.form.parts
        if adjust_lr_fn == "original":
            return math.sqrt(max(1, n_out / n_in))
        return 0.2 * math.sqrt(max(n_out, n_in))


def _orthogonalised(whole: list[Tensor], forms: list[MatrixForm]) -> list[Tensor]:
    """Each matrix of each parameter `[N, A, B]`; those of one shape at once."""
    by_shape: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for index, (matrices, form) in enumerate(zip(whole, forms, strict=True)):
        n_out_first = matrices.mT if form.transposed else matrices
        alone = torch.cat(n_out_first.chunk(form.parts, dim=1))
        by_shape.setdefault(tuple(alone.shape[1:]), []).append((index, alone))
    results = list(whole)
    for entries in by_shape.values():
        done = orthogonalise(torch.cat([alone for _, alone in entries]))
        for (index, _), alone in zip(entries, done.split([len(alone) for _, alone in entries]), strict=True):
            n_out_first = torch.cat(alone.chunk(forms[index].parts), dim=1) if len(alone) else whole[index]
            results[index] = n_out_first.mT if forms[index].transposed and len(alone) else n_out_first
    return results


def _undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Routers, and biases of experts: these have a row for each, but are vectors."""
    experts = (module for module in model.modules() if isinstance(module, GroupedExperts))
    biases = {bias for module in experts for bias in (module.gate_and_up_bias, module.down_bias) if bias is not None}
    return biases | router_parameters(model)


def _local_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    ours, theirs = (tensor.placements if isinstance(tensor, DTensor) else () for tensor in (parameter, gradient))
    if ours != theirs:
        raise ValueError(f"a gradient is laid out as {theirs}, its parameter as {ours}")
    return local_part(gradient)


def _refuse_offloaded(parameter: Tensor) -> None:
    if isinstance(parameter, DTensor) and parameter.to_local().device.type != parameter.device_mesh.device_type:
        raise ValueError("Muon needs parameters where their mesh computes; use AdamW with FSDP's cpu_offload")
