"""Routing: the decision, its losses, its bias and its statistics."""

from crossdock.routing.bias import update_expert_bias
from crossdock.routing.load import LoadCounter, max_mean_load, reduce_counts
from crossdock.routing.losses import (
    BatchTotals,
    LossCoefficients,
    attach_losses,
    count_experts,
    router_losses,
    switch_loss,
    z_loss,
)
from crossdock.routing.router import Router, RouterConfig, Routing

__all__ = [
    "BatchTotals",
    "LoadCounter",
    "LossCoefficients",
    "Router",
    "RouterConfig",
    "Routing",
    "attach_losses",
    "count_experts",
    "max_mean_load",
    "reduce_counts",
    "router_losses",
    "switch_loss",
    "update_expert_bias",
    "z_loss",
]
