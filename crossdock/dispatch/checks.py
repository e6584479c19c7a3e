"""Arguments of `dispatch` and `combine` that cannot work, each with an error that names it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_inputs", "check_results", "wrong_id"]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(x: Tensor, slot_ids: Tensor, weights: Tensor, num_slots: int | None) -> None:
    """Shapes, dtypes and devices of `x [T, H]`, `slot_ids [T, K]` int64 and `weights [T, K]`.

    Weights are fp32, float64 in a float64 model, or in the dtype of `x`.

    Args:
        num_slots: `P`; ids must be `-1` to `P - 1`. Looking costs a sync on a GPU; `None` does not look.

    Raises:
        ValueError: for the first argument that is wrong.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [T, H], not {_shape(x)}")
    if x.dtype not in _FLOATING:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, not {x.dtype}")
    if slot_ids.dim() != 2 or len(slot_ids) != len(x):
        raise ValueError(f"slot_ids must be [T, K] with T = {len(x)}, the rows of x, not {_shape(slot_ids)}")
    if slot_ids.dtype != torch.int64:
        raise ValueError(f"slot_ids must be torch.int64, not {slot_ids.dtype}")
    if weights.shape != slot_ids.shape:
        raise ValueError(f"weights must be {_shape(slot_ids)} as slot_ids, not {_shape(weights)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if weights.dtype not in (wide, x.dtype):
        raise ValueError(f"weights must be {wide} where x is {x.dtype}, not {weights.dtype}")
    for name, tensor in (("slot_ids", slot_ids), ("weights", weights)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must be on one device")
    if num_slots is not None and (wrong := wrong_id(slot_ids, num_slots)) is not None:
        raise ValueError(f"slot_ids has {wrong}; ids are 0 to {num_slots - 1}, or -1 for no route")


def wrong_id(ids: Tensor, count: int) -> int | None:
    """One of `ids` that is not `-1` to `count - 1`, if there is any. A sync on a GPU."""
    if not ids.numel():
        return None
    least, most = (int(end) for end in torch.stack(ids.aminmax()).tolist())
    if least < -1:
        return least
    return most if most >= count else None


def check_results(y: Tensor, rows: int, hidden_size: int) -> None:
    """Shape and dtype of `combine`'s `y [U, H]`.

    Raises:
        ValueError: names `y`.
    """
    if y.shape != (rows, hidden_size):
        raise ValueError(f"y must be [{rows}, {hidden_size}], a row for each that arrived, not {_shape(y)}")
    if y.dtype not in _FLOATING:
        raise ValueError(f"y must be float16, bfloat16, float32 or float64, not {y.dtype}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
