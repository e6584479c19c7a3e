"""Dispatchers: how tokens travel to their experts and back, all to one contract."""

from crossdock.dispatch.agreement import Agreement, RankFailure, RankMismatch
from crossdock.dispatch.allgather import AllGatherDispatcher
from crossdock.dispatch.alltoall import AllToAllDispatcher
from crossdock.dispatch.building import DISPATCHERS, STATIC_DISPATCHERS, build_dispatcher
from crossdock.dispatch.checks import wrong_id
from crossdock.dispatch.deepep import DEEPEP_OPS, DeepEPDispatcher, deepep_problem
from crossdock.dispatch.deepep_api import DeepEPOptions
from crossdock.dispatch.deepep_buffers import choose_deepep_api, free_deepep_buffers, load_deepep
from crossdock.dispatch.dispatcher import Dispatched, Dispatcher
from crossdock.dispatch.hierarchical import HierarchicalDispatcher
from crossdock.dispatch.local import LocalDispatcher
from crossdock.dispatch.nodes import Nodes, find_nodes
from crossdock.dispatch.options import DispatchOptions
from crossdock.dispatch.plan import AUTO_DISPATCHER, LOCAL_PLAN, DispatchPlan, DispatchSituation, plan_dispatch
from crossdock.dispatch.static import StaticDispatcher
from crossdock.dispatch.symmetric import SymmetricDispatcher, symmetric_problem
from crossdock.dispatch.symmetric_buffers import ExchangeBuffers, RankTimeout
from crossdock.dispatch.symmetric_ops import SYMMETRIC_OPS
from crossdock.dispatch.traffic import Traffic

__all__ = [
    "AUTO_DISPATCHER",
    "DEEPEP_OPS",
    "DISPATCHERS",
    "LOCAL_PLAN",
    "STATIC_DISPATCHERS",
    "SYMMETRIC_OPS",
    "Agreement",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "DeepEPDispatcher",
    "DeepEPOptions",
    "DispatchOptions",
    "DispatchPlan",
    "DispatchSituation",
    "Dispatched",
    "Dispatcher",
    "ExchangeBuffers",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "Nodes",
    "RankFailure",
    "RankMismatch",
    "RankTimeout",
    "StaticDispatcher",
    "SymmetricDispatcher",
    "Traffic",
    "build_dispatcher",
    "choose_deepep_api",
    "deepep_problem",
    "find_nodes",
    "free_deepep_buffers",
    "load_deepep",
    "plan_dispatch",
    "symmetric_problem",
    "wrong_id",
]
