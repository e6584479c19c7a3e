"""A look into the trainer's module once a rank has imported it; for programs that Python imports at its start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

__all__ = ["after_trainer"]


def after_trainer(act: Callable[[Any], object]) -> None:
    """Have `act` called with the module `crossdock.train.trainer` as soon as it has been executed."""

    class AfterTrainer:
        def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
            if name != "crossdock.train.trainer":
                return None
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            spec = PathFinder.find_spec(name, path, target)
            assert spec is not None
            assert spec.loader is not None
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                act(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, AfterTrainer())  # type: ignore[arg-type]
