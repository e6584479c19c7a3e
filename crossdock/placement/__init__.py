"""Maps and plans of where experts live; no weights."""

from crossdock.placement.copy_rules import max_mean, rank_loads
from crossdock.placement.eplb import EPLB, eplb
from crossdock.placement.placement import EMPTY, Placement
from crossdock.placement.planner import PLANNERS, Planner
from crossdock.placement.primaries import plan_with_primaries, with_primaries
from crossdock.placement.situation import CopyChoice, PlanningSituation

__all__ = [
    "EMPTY",
    "EPLB",
    "PLANNERS",
    "CopyChoice",
    "Placement",
    "Planner",
    "PlanningSituation",
    "eplb",
    "max_mean",
    "plan_with_primaries",
    "rank_loads",
    "with_primaries",
]
