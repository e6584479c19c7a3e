"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Router", "RouterConfig", "Routing"]

NO_EXPERT = -1


@dataclass(frozen=True)
class RouterConfig:
    """What a model family fixes about its router.

    Attributes:
        num_experts: `E`.
        top_k: `K`, experts per token.
        score_function: scores from logits.
        norm_topk_prob: divide a token's weights by their sum.
        routed_scaling_factor: multiplies the weights.
        expert_bias: keep a bias per expert that is added to the scores for the choice alone (aux-loss-free balancing).
        force_load_balance: ignore the scores' order and deal experts out in turn; for measurements.
    """

    num_experts: int
    top_k: int
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    expert_bias: bool = False
    force_load_balance: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts})")
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function {self.score_function!r} is unknown; valid: softmax, sigmoid")


class Routing(NamedTuple):
    """A router's decision (docs/design.md, contract 0).

    Attributes:
        expert_ids: `[T, K]` int64, `-1` for padding.
        weights: `[T, K]` fp32 (float64 where `x` is), `0` for padding.
        scores: `[T, E]` in the dtype of `weights`, without bias.
        logits: `[T, E]` likewise.
    """

    expert_ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor


class Router(nn.Module):
    """Top-k router (docs/semantics.md, "Router").

    Args:
        hidden_size: `H`.
        config: sizes and scoring.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(
        self, x: Tensor, *, sequence_shape: tuple[int, ...] | None = None, padding_mask: Tensor | None = None
    ) -> Routing:
        """Route `x` `[T, H]`.

        Args:
            x: the tokens.
            sequence_shape: `(B, S)` with `B * S = T`, for routers that look at whole sequences; this one does not.
            padding_mask: `[T]` bool, true where a token is padding: it gets no expert.
        """
        logits = self._logits(x)
        scores = logits.softmax(dim=-1) if self.config.score_function == "softmax" else logits.sigmoid()
        expert_ids = self._choose(scores.detach(), padding_mask)
        weights = scores.gather(1, expert_ids)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        if padding_mask is not None:
            expert_ids = expert_ids.masked_fill(padding_mask[:, None], NO_EXPERT)
            weights = weights.masked_fill(padding_mask[:, None], 0)
        return Routing(expert_ids, weights, scores, logits)

    def _logits(self, x: Tensor) -> Tensor:
        """`x W^T` `[T, E]` in fp32 (float64 where `x` is), under autocast too."""
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        device = x.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            return F.linear(x.to(compute_dtype), self.weight.to(compute_dtype))

    def _choose(self, scores: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The `K` experts of each token, `[T, K]`. The bias changes which are chosen, never their weights."""
        if self.config.force_load_balance:
            return self._deal_out(scores, padding_mask)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        return scores.topk(self.config.top_k, dim=-1).indices

    def _deal_out(self, scores: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Experts in turn, token after token, so that no two experts' counts differ by more than one."""
        num_tokens, num_experts = scores.shape
        position = torch.arange(num_tokens, device=scores.device)
        if padding_mask is not None:
            position = (~padding_mask).cumsum(0) - 1
        first = position.clamp_min(0)[:, None] * self.config.top_k
        return (first + torch.arange(self.config.top_k, device=scores.device)) % num_experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # A cast of the model (`model.bfloat16()`) must leave the bias in fp32: its steps of 1e-3 would be rounded away.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.config.num_experts}, top_k={self.config.top_k}, {self.config.score_function}"
