"""Arguments of a backend that cannot work, each with an error that names it."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.experts.experts import ExpertAdapters, ExpertParams

__all__ = ["check_dtypes", "check_ids"]


def check_dtypes(tokens: Tensor, *params: ExpertParams | ExpertAdapters) -> None:
    """Raises ValueError for parameters in another dtype than `tokens`."""
    for name, tensor in (named for group in params for named in group._asdict().items()):
        if tensor is not None and tensor.dtype != tokens.dtype:
            raise ValueError(f"{name} must be {tokens.dtype} as tokens, not {tensor.dtype}")


def check_ids(slot_ids: Tensor, num_slots: int) -> None:
    """Raises ValueError for ids of slots that there are none of, on a CPU, where it costs no sync."""
    if slot_ids.is_cpu and slot_ids.numel():
        least, most = torch.stack(slot_ids.aminmax()).tolist()
        if least < -1 or most >= num_slots:
            wrong = least if least < -1 else most
            raise ValueError(f"slot_ids has {wrong}; ids are 0 to {num_slots - 1}, or -1 for no route")
