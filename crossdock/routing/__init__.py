"""Routing: the decision, its losses, its bias and its statistics."""

from crossdock.routing.bias import update_expert_bias
from crossdock.routing.capacity import DropPolicy, expert_capacity, within_capacity
from crossdock.routing.counting import count_experts
from crossdock.routing.forced import deal_out, draw_zipf
from crossdock.routing.load import (
    CollapseMonitor,
    LoadCounter,
    LoadStatistics,
    Observed,
    StepLoad,
    is_recompute,
    load_statistics,
    reduce_load,
)
from crossdock.routing.losses import (
    BatchTotals,
    LossCoefficients,
    attach_losses,
    count_in_backward,
    router_losses,
    switch_loss,
    z_loss,
)
from crossdock.routing.router import Router, RouterConfig, Routing, ScoreFunction

__all__ = [
    "BatchTotals",
    "CollapseMonitor",
    "DropPolicy",
    "LoadCounter",
    "LoadStatistics",
    "LossCoefficients",
    "Observed",
    "Router",
    "RouterConfig",
    "Routing",
    "ScoreFunction",
    "StepLoad",
    "attach_losses",
    "count_experts",
    "count_in_backward",
    "deal_out",
    "draw_zipf",
    "expert_capacity",
    "is_recompute",
    "load_statistics",
    "reduce_load",
    "router_losses",
    "switch_loss",
    "update_expert_bias",
    "within_capacity",
    "z_loss",
]
