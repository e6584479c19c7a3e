"""How many programs run, and with what tiles."""

from __future__ import annotations

from typing import Any

import torch

from crossdock.kernels.runtime import INTERPRETED, num_sms
from crossdock.kernels.tiles import Tiles

__all__ = ["persistent"]


def persistent(tiles: Tiles, blocks: int, device: torch.device) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constant arguments of programs that stay, and take up to `blocks` blocks in turn.

    No constant depends on how many rows there are: each value would be compiled for itself.
    """
    programs = min(blocks, num_sms(device) * tiles.programs_per_sm)
    return (programs,), {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "UPCAST": INTERPRETED,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
