"""Who computes each route of a step: copies of experts, and relief of overloaded ranks. Plans, no weights."""

from crossdock.balance.assign import Assignment, assign, assignment
from crossdock.balance.choice import CopyRule, CopyTable, choose, copy_table
from crossdock.balance.costs import Rates, SpillCosts
from crossdock.balance.pieces import Pieces, even_pieces
from crossdock.balance.pouring import level
from crossdock.balance.rates import measure_rates
from crossdock.balance.spilling import SpillLimits, SpillPlan, borrowed_slots_needed, spill

__all__ = [
    "Assignment",
    "CopyRule",
    "CopyTable",
    "Pieces",
    "Rates",
    "SpillCosts",
    "SpillLimits",
    "SpillPlan",
    "assign",
    "assignment",
    "borrowed_slots_needed",
    "choose",
    "copy_table",
    "even_pieces",
    "level",
    "measure_rates",
    "spill",
]
