"""Ranks kept evenly busy: experts placed by their loads, copies of them, and relief of overloaded ranks in a step."""

from crossdock.balance.assign import Assignment, assign, assignment
from crossdock.balance.balancer import Balancer
from crossdock.balance.checks import BalanceError, check_sizes, copies_per_rank
from crossdock.balance.choice import CopyRule, CopyTable, choose, copy_table
from crossdock.balance.config import BalanceConfig, BalanceStrategy
from crossdock.balance.costs import Rates, SpillCosts
from crossdock.balance.migrate import Migration, MigrationError, migrate
from crossdock.balance.monitor import BalanceMonitor, RankLoad
from crossdock.balance.pieces import Pieces, even_pieces
from crossdock.balance.pouring import level
from crossdock.balance.rates import measure_rates
from crossdock.balance.relief import LayerRelief
from crossdock.balance.spilling import SpillLimits, SpillPlan, borrowed_slots_needed, spill

__all__ = [
    "Assignment",
    "BalanceConfig",
    "BalanceError",
    "BalanceMonitor",
    "BalanceStrategy",
    "Balancer",
    "CopyRule",
    "CopyTable",
    "LayerRelief",
    "Migration",
    "MigrationError",
    "Pieces",
    "RankLoad",
    "Rates",
    "SpillCosts",
    "SpillLimits",
    "SpillPlan",
    "assign",
    "assignment",
    "borrowed_slots_needed",
    "check_sizes",
    "choose",
    "copies_per_rank",
    "copy_table",
    "even_pieces",
    "level",
    "measure_rates",
    "migrate",
    "spill",
]
