"""Arguments of a backend that cannot work, each with an error that names it."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.experts.experts import ExpertAdapters, ExpertParams
from crossdock.kernels.runtime import ALIGNMENT_BYTES

__all__ = ["ALIGNMENT_BYTES", "alignment_problem", "check_dtypes", "check_ids"]


def alignment_problem(tokens: Tensor, params: ExpertParams) -> str | None:
    """Why grouped products cannot read rows of `tokens [U, H]` and `params`, or `None` where they can."""
    for name, size in (("hidden_size", tokens.shape[1]), ("intermediate_size", params.down_projs.shape[1])):
        if size * tokens.dtype.itemsize % ALIGNMENT_BYTES:
            return f"needs rows of a multiple of {ALIGNMENT_BYTES} bytes; {name} = {size} in {tokens.dtype} is none"
    for name, matrices in (("gate_and_up_projs", params.gate_and_up_projs), ("down_projs", params.down_projs)):
        steps = [step for step in matrices.stride() if step != 1]
        if 1 not in matrices.stride()[1:] or any(step * matrices.itemsize % ALIGNMENT_BYTES for step in steps):
            return f"needs matrices aligned to {ALIGNMENT_BYTES} bytes; {name} has strides {matrices.stride()}"
    return None


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
