"""Maps and plans of where experts live; no weights."""

from crossdock.placement.placement import EMPTY, Placement

__all__ = ["EMPTY", "Placement"]
