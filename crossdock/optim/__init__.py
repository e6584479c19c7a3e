"""Optimizers: Muon, which torch has for plain matrices alone, for sharded ones and those of experts."""

from crossdock.optim.hidden_matrices import MatrixForm, hidden_matrices
from crossdock.optim.muon import AdjustLR, Muon

__all__ = ["AdjustLR", "MatrixForm", "Muon", "hidden_matrices"]
