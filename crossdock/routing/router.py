"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from crossdock.kernels import Scoring, decide
from crossdock.kernels.runtime import runs
from crossdock.routing.capacity import DropPolicy, expert_capacity, within_capacity
from crossdock.routing.forced import deal_out, draw_zipf

__all__ = ["Router", "RouterConfig", "Routing", "ScoreFunction"]

logger = logging.getLogger(__name__)

NO_EXPERT = -1
ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]
"""From logits to scores."""


@dataclass(frozen=True)
class RouterConfig:
    """How a router decides. Most of it is fixed by the model's family; the rest is the user's choice.

    Attributes:
        num_experts: `E`.
        top_k: `K`, experts per token.
        score_function: scores from logits; `sqrt_softplus` is DeepSeek-V4's.
        softmax_over: `all` experts before the choice, or the `chosen` alone after it (gpt-oss); softmax only.
        norm_topk_prob: divide a token's weights by their sum.
        routed_scaling_factor: multiplies the weights.
        n_group, topk_group: experts in `n_group` equal groups in order; only those of the best `topk_group` can be
            chosen.
        group_score: a group's score: the sum of its two largest (`top2_sum`, DeepSeek-V3) or its largest (`max`, V2).
        bias: a learned bias on the logits (gpt-oss).
        router_dtype: of the product: `float32`, or the `input`'s.
        kernel: what decides from the logits: operations of `torch`, or one kernel (`triton`) where it can: not in
            float64, not with groups, a capacity or forced experts.
        expert_bias: keep a bias per expert that is added to the scores for the choice alone (aux-loss-free balancing).
        input_jitter: in training, multiply the router's input by uniform noise in `1 +- input_jitter` (Switch).
        capacity_factor: drop routes beyond `ceil(T K / E * capacity_factor)` per expert; `None` drops none.
        drop_policy: which routes stay: those with the largest weights (`probs`), or the first in order (`position`).
        force_load_balance: ignore the scores' order and deal experts out in turn; for measurements.
        force_zipf: ignore the scores' order and draw experts by Zipf's law of this exponent; for experiments.
        force_zipf_seed: shuffles which experts are popular; `None`: the lower the index, the more popular.
        force_zipf_drift: after so many steps other experts are popular; 0: never.

    Raises:
        ValueError: for a combination that decides nothing; the message names the field.
    """

    num_experts: int
    top_k: int
    score_function: ScoreFunction = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    expert_bias: bool = False
    force_load_balance: bool = False
    softmax_over: Literal["all", "chosen"] = "all"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    bias: bool = False
    router_dtype: Literal["float32", "input"] = "float32"
    kernel: Literal["torch", "triton"] = "torch"
    input_jitter: float = 0.0
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probs"
    force_zipf: float | None = None
    force_zipf_seed: int | None = None
    force_zipf_drift: int = 0

    def __post_init__(self) -> None:
        experts, top_k = self.num_experts, self.top_k
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k ({top_k}) must be between 1 and num_experts ({experts})")
        for name, value, valid in (
            ("score_function", self.score_function, get_args(ScoreFunction)),
            ("softmax_over", self.softmax_over, ("all", "chosen")),
            ("group_score", self.group_score, ("top2_sum", "max")),
            ("router_dtype", self.router_dtype, ("float32", "input")),
            ("kernel", self.kernel, ("torch", "triton")),
            ("drop_policy", self.drop_policy, get_args(DropPolicy)),
        ):
            if value not in valid:
                raise ValueError(f"{name} {value!r} is unknown; valid: {', '.join(valid)}")
        if self.softmax_over == "chosen" and self.score_function != "softmax":
            raise ValueError(f"softmax_over = 'chosen' needs score_function softmax, not {self.score_function}")
        if self.n_group < 1 or experts % self.n_group:
            raise ValueError(f"n_group ({self.n_group}) must divide num_experts ({experts})")
        reachable = self.topk_group * experts // self.n_group
        if not 1 <= self.topk_group <= self.n_group or reachable < top_k:
            raise ValueError(
                f"topk_group ({self.topk_group}) must be at most n_group ({self.n_group}) and give top_k ({top_k}) "
                f"experts to choose from, not {reachable}"
            )
        if not 0 <= self.input_jitter < 1:
            raise ValueError(f"input_jitter ({self.input_jitter}) must be at least 0 and less than 1")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < inf:
            raise ValueError(f"capacity_factor ({self.capacity_factor}) must be a finite number above 0, or None")
        if self.force_zipf is not None and (self.force_load_balance or not 0 <= self.force_zipf < inf):
            raise ValueError(f"force_zipf ({self.force_zipf}) must be at least 0, and without force_load_balance")


@cache
def _warn_of_constant_weights() -> None:
    logger.warning(
        "top_k = 1 with normalised weights: every weight is 1, so that the router has no gradient but an auxiliary "
        "loss's; set norm_topk_prob = False, and softmax_over = 'all'"
    )


class Routing(NamedTuple):
    """A router's decision (docs/design.md, contract 0).

    Attributes:
        expert_ids: `[T, K]` int64, `-1` for padding and dropped routes.
        weights: `[T, K]` fp32 (float64 where `x` is), `0` for padding and dropped routes.
        scores: `[T, E]` in the dtype of `weights`, without the expert bias.
        logits: `[T, E]` likewise.
        dropped: scalar int64, routes beyond the capacity; `None` where there is none.
        counts: `[E]` int64, routes per expert, where they were counted on the way.
    """

    expert_ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor
    dropped: Tensor | None = None
    counts: Tensor | None = None


class Router(nn.Module):
    """Top-k router (docs/semantics.md, "Router").

    Args:
        hidden_size: `H`.
        config: sizes and scoring.

    Attributes:
        steps: that the optimizer has taken (`finish_step`), which `force_zipf_drift` goes by.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.steps = 0
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.bias else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)
        if config.top_k == 1 and (config.norm_topk_prob or config.softmax_over == "chosen"):
            _warn_of_constant_weights()
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """A normal weight of deviation `std`; both biases 0."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
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
        config = self.config
        if self.training and config.input_jitter:
            x = x * torch.empty_like(x).uniform_(1 - config.input_jitter, 1 + config.input_jitter)
        logits = self._logits(x)
        if self._decides_at_once() and runs(logits):
            scoring = Scoring(
                config.top_k,
                config.score_function,
                config.softmax_over == "chosen",
                config.norm_topk_prob,
                config.routed_scaling_factor,
            )
            expert_ids, weights, scores, counts = decide(logits, scoring, self.expert_bias, padding_mask)
            return Routing(expert_ids, weights, scores, logits, counts=counts)
        scores = self._scores(logits)
        over_chosen = config.softmax_over == "chosen"
        expert_ids = self._choose((logits if over_chosen else scores).detach(), padding_mask)
        weights = logits.gather(1, expert_ids).softmax(dim=-1) if over_chosen else scores.gather(1, expert_ids)
        if config.norm_topk_prob and not over_chosen:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * config.routed_scaling_factor
        if padding_mask is not None:
            expert_ids = expert_ids.masked_fill(padding_mask[:, None], NO_EXPERT)
            weights = weights.masked_fill(padding_mask[:, None], 0)
        if config.capacity_factor is None:
            return Routing(expert_ids, weights, scores, logits)
        tokens = len(x) if padding_mask is None else (~padding_mask).sum()
        capacity = expert_capacity(tokens, config.top_k, config.num_experts, config.capacity_factor)
        stays = within_capacity(expert_ids, weights.detach(), config.num_experts, capacity, config.drop_policy)
        dropped = ((expert_ids >= 0) & ~stays).sum()
        return Routing(
            expert_ids.masked_fill(~stays, NO_EXPERT), weights.masked_fill(~stays, 0), scores, logits, dropped
        )

    def _decides_at_once(self) -> bool:
        """Whether one kernel is to decide, and knows how."""
        config = self.config
        forced = config.force_load_balance or config.force_zipf is not None
        special = forced or config.topk_group < config.n_group or config.capacity_factor is not None
        return config.kernel == "triton" and not special

    def _logits(self, x: Tensor) -> Tensor:
        """`x W^T (+ b)` `[T, E]` in fp32 (float64 where `x` is), under autocast too."""
        wide = torch.promote_types(x.dtype, torch.float32)
        compute = wide if self.config.router_dtype == "float32" else x.dtype
        device = x.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            if compute == x.dtype:
                bias = None if self.bias is None else self.bias.to(compute)
                return F.linear(x, self.weight.to(compute), bias).to(wide)
            logits: Tensor = _WideProduct.apply(x, self.weight, compute)  # type: ignore[assignment]
            return logits if self.bias is None else logits + self.bias.to(compute)

    def _scores(self, logits: Tensor) -> Tensor:
        match self.config.score_function:
            case "softmax":
                return logits.softmax(dim=-1)
            case "sigmoid":
                return logits.sigmoid()
            case _:
                # Where softplus is 0 in this precision, the root has no finite slope; clamping has slope 0.
                return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()

    def _choose(self, scores: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The `K` experts of each token, `[T, K]`. The expert bias changes which are chosen, never their weights."""
        config, (num_tokens, num_experts), device = self.config, scores.shape, scores.device
        if config.force_load_balance:
            return deal_out(num_tokens, num_experts, config.top_k, padding_mask, device)
        if config.force_zipf is not None:
            sizes = num_tokens, num_experts, config.top_k
            period = self.steps // config.force_zipf_drift if config.force_zipf_drift else 0
            return draw_zipf(*sizes, config.force_zipf, config.force_zipf_seed, device, period)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if config.topk_group < config.n_group:
            scores = self._within_best_groups(scores)
        return scores.topk(config.top_k, dim=-1).indices

    def _within_best_groups(self, scores: Tensor) -> Tensor:
        """`scores [T, E]` with those outside the best groups at minus infinity: 0 could still win over a negative."""
        groups = scores.view(len(scores), self.config.n_group, -1)
        if self.config.group_score == "max":
            group_scores = groups.amax(dim=-1)
        else:
            group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
        best = group_scores.topk(self.config.topk_group, dim=-1).indices
        loses = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        return groups.masked_fill(loses[..., None], -torch.inf).view_as(scores)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # A cast of the model (`model.bfloat16()`) must leave the bias in fp32: its steps of 1e-3 would be rounded away.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.config.num_experts}, top_k={self.config.top_k}, {self.config.score_function}"


class _WideProduct(Function):
    """`x W^T` in `dtype`, which is wider than that of `x`; keeps `x` as it is, not a wide copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None
