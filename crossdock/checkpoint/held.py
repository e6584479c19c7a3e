"""What a rank holds of a model and its optimizer, and where that lies in the whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Held", "Place"]


class Place(NamedTuple):
    """A part of a tensor, as JSON can hold it.

    Attributes:
        name: of the whole, `kind.parameter`.
        dtype: of its elements, `float32` and so on.
        shape: of the part.
        offsets: of its first element in the whole.
        experts: of experts' rows: the logical expert of each, or `EMPTY`; in a checkpoint each is a tensor of its own,
            `name.expert`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    experts: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, values: Any) -> Place:
        """Of what `json` made of one. Raises TypeError or ValueError for anything else."""
        name, dtype, shape, offsets, experts = values
        place = cls(str(name), dtype, tuple(shape), tuple(offsets), None if experts is None else tuple(experts))
        if not isinstance(getattr(torch, dtype, None), torch.dtype) or min(shape, default=0) < 0:
            raise ValueError(f"{name} is of dtype {dtype!r}, shape {shape}")
        return place

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


class Held(NamedTuple):
    """A rank's part of a tensor, and its place."""

    place: Place
    local: Tensor
