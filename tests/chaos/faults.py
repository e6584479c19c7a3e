"""Faults planted in a rank's process: at a step and a point of it, once in a run, however often that is started."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "POINTS", "Fault", "plant"]

POINTS = ("forward", "dispatch", "backward", "optimizer", "checkpoint", "snapshot", "migration")
KINDS = ("kill", "stop", "exit", "raise")


@dataclass(frozen=True)
class Fault:
    """What happens to a rank: killed, stopped for good, ended with exit code 1, or an exception in what it calls."""

    number: int
    step: int
    rank: int
    point: str
    kind: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plant(trainer_module: Any) -> None:
    """In this process, by CHAOS_PLAN: a folder with `plan.json`, a list of faults; records what is computed there."""
    folder, rank = Path(os.environ["CHAOS_PLAN"]), int(os.environ["RANK"])
    faults = [Fault(**values) for values in json.loads((folder / "plan.json").read_text())]
    _Planted(folder, rank, [fault for fault in faults if fault.rank == rank]).plant(trainer_module)


class _Planted:
    def __init__(self, folder: Path, rank: int, faults: list[Fault]) -> None:
        self.folder, self.rank, self.faults = folder, rank, faults
        self.step = 0  # the one that is being computed, from 1
        self.visits: dict[int, int] = {}

    def plant(self, trainer_module: Any) -> None:
        import torch

        from crossdock.balance import balancer
        from crossdock.checkpoint.dcp_writing import DCPWriter
        from crossdock.checkpoint.memory_files import MemoryFiles
        from crossdock.dispatch.alltoall import AllToAllDispatcher
        from crossdock.moe import MoE

        self._record({"start": True})
        trainer = trainer_module.Trainer
        train_step = trainer._train_step

        def counted(this: Any, batches: list[Any], *arguments: Any, **named: Any) -> Any:
            self.step = this.step + 1
            seen = hashlib.sha256(b"".join(batch.input_ids.numpy().tobytes() for batch in batches)).hexdigest()[:16]
            self._record({"step": self.step, "seen": seen})
            return train_step(this, batches, *arguments, **named)

        trainer._train_step = counted
        self._before(AllToAllDispatcher, "dispatch", "dispatch")
        self._before(DCPWriter, "write_data", "checkpoint")
        self._before(MemoryFiles, "finish", "snapshot")
        self._before(balancer, "migrate", "migration")
        self._before(torch.optim.AdamW, "step", "optimizer")
        init = MoE.__init__

        def hooked(this: Any, *arguments: Any, **named: Any) -> None:
            init(this, *arguments, **named)
            this.register_forward_hook(lambda *_: self.reach("forward"))
            this.register_full_backward_hook(lambda *_: self.reach("backward"))

        MoE.__init__ = hooked  # type: ignore[method-assign]

    def _record(self, values: dict[str, Any]) -> None:
        with open(self.folder / f"computed-{self.rank}.jsonl", "a") as file:
            print(json.dumps(values), file=file)

    def _before(self, owner: Any, name: str, point: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.reach(point)
            return original(*arguments, **named)

        setattr(owner, name, wrapped)

    def reach(self, point: str) -> None:
        for fault in self.faults:
            mark = self.folder / f"fired-{fault.number}"
            if fault.point != point or self.step < fault.step or mark.exists():
                continue
            # Not at the same visit within a step each time, but at the same for the same plan.
            self.visits[fault.number] = self.visits.get(fault.number, 0) + 1
            if point in ("forward", "dispatch", "backward") and self.visits[fault.number] <= fault.number % 2:
                continue
            mark.write_text(json.dumps({"step": self.step, "thread": threading.current_thread().name}))
            self._strike(fault.kind)

    def _strike(self, kind: str) -> None:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "exit":
            os._exit(1)
        else:
            raise RuntimeError(f"a fault at step {self.step}")
