"""What ran, in order: collectives and chosen other ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recorder"]


class Recorder(TorchDispatchMode):
    """Names the collectives that run, `kind dtype width`, and chosen other ops."""

    def __init__(self, *others: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self._others = others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("_c10d_functional", "c10d", "_c10d_functional_autograd"):
            tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
            kind = "wait" if name == "wait_tensor" else name
            self.names.append(f"{kind} {tensor.dtype} {tensor.shape[-1]}")
        elif name in self._others:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def collectives(self) -> list[str]:
        return [name for name in self.names if "." in name and not name.startswith("wait")]
