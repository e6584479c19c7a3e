"""Products of rows with the matrix of their slot, forward and backward: what a layer's experts compute.

Rows are sorted by slot. What surrounds a product (taking rows from tokens, the activation, the routing weight and its
gradient) happens within its kernel, so that memory sees each value once. No shape depends on the routing and nothing
is copied to the host: programs find out on the device which slot a tile belongs to.
"""

from crossdock.kernels.grouped.down_grad import DownGradients, down_gradient, down_gradient_reference
from crossdock.kernels.grouped.matrices import SlotMatrices
from crossdock.kernels.grouped.multiply import multiply, multiply_reference
from crossdock.kernels.grouped.outer import RowValues, outer, outer_reference
from crossdock.kernels.grouped.rows import RowTiles, SlotRows, row_tiles, row_tiles_reference
from crossdock.kernels.grouped.up import up_projection, up_projection_reference

__all__ = [
    "DownGradients",
    "RowTiles",
    "RowValues",
    "SlotMatrices",
    "SlotRows",
    "down_gradient",
    "down_gradient_reference",
    "multiply",
    "multiply_reference",
    "outer",
    "outer_reference",
    "row_tiles",
    "row_tiles_reference",
    "up_projection",
    "up_projection_reference",
]
