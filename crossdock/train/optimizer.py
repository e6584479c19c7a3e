"""The optimizer, what it decays, and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from crossdock.config import LRSchedulerConfig, OptimizerConfig
from crossdock.optim import Muon
from crossdock.routing import Router

__all__ = ["build_optimizer", "learning_rate_factor"]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices are decayed; norms, biases (vectors) and routers are not. Or Muon beside it.

    Args:
        model: on its layout.
        config: which, and its settings.
        dtype: in which the model computes, and Muon's matrices; that of its parameters if `None`.
    """
    if config.name == "muon":
        return Muon(
            model,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn=config.adjust_lr_fn,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            dtype=dtype,
        )
    routers = {p for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in trained if p.ndim < 2 or p in routers]
    decayed = [p for p in trained if p.ndim >= 2 and p not in routers]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate_factor(step: int, steps: int, config: LRSchedulerConfig) -> float:
    """The share of the peak learning rate at `step` (from 1) of `steps`: linear warm-up, constant, decay.

    The decay takes the last `decay_ratio * steps` steps and ends at `min_lr_factor` with the last one.
    """
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    decay_steps = (
        steps - warmup if config.decay_ratio is None else min(round(steps * config.decay_ratio), steps - warmup)
    )
    into_decay = step - (steps - decay_steps)
    if into_decay <= 0:
        return 1.0
    progress = min(into_decay / decay_steps, 1.0)
    curve = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * curve
