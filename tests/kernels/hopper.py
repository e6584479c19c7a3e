"""Compile kernels for a Hopper GPU where there is none: what a launch would run, without running it.

`hopper()` makes Triton believe in an H200. Launches on CPU tensors then compile for it and stop there; results stay
unwritten. To be called in a process of its own:

    TRITON_INTERPRET=0 python -m tests.kernels.hopper MODULE FUNCTION

calls a function and prints what was compiled as JSON, a line each.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

SHARED_BYTES = 227 * 1024
"""What a block may have of shared memory on a Hopper GPU."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was compiled.

    Attributes:
        name: of its function.
        constants: its constant arguments, by name.
        registers: per thread.
        spilled_bytes: per thread, of registers that did not fit.
        shared_bytes: per block.
        tensor_cores: instructions by which a warpgroup multiplies (`wgmma`), and by which a warp does (`mma.sync`).
        bulk_copies: instructions of the copy engine.
        async_copies: instructions that copy 16 bytes to shared memory while others go on.
    """

    name: str
    constants: dict[str, Any]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: tuple[int, int]
    bulk_copies: int
    async_copies: int


@contextmanager
def hopper() -> Iterator[list[Compiled]]:
    """All that is launched is compiled for an H200 and listed, and not run."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from crossdock.kernels import runtime

    assert not runtime.INTERPRETED
    importlib.import_module("crossdock.experts")
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel: Any = run(self, *args, **{**options, "warmup": True})
        constants = {
            self.arg_names[path[0]]: value
            for path, value in kernel.src.constants.items()
            if isinstance(value, (int, float, str, bool))
        }
        compiled.append(_describe(self.__name__, constants, kernel))
        return kernel

    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for name, module in list(sys.modules.items()):
            if name.startswith("crossdock.") and hasattr(module, "runs_on"):
                # CPU tensors will do.
                patches.enter_context(mock.patch.object(module, "runs_on", return_value=True))
        yield compiled


def _describe(name: str, constants: dict[str, Any], kernel: Any) -> Compiled:
    """Reads the compiler's own report, and counts instructions."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    ptx = kernel.asm["ptx"]
    return Compiled(
        name,
        constants,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        kernel.metadata.shared,
        (ptx.count("wgmma.mma_async"), ptx.count("mma.sync")),
        ptx.count("cp.async.bulk.tensor"),
        ptx.count("cp.async.cg"),
    )


def compile_for_hopper(module: str, function: str) -> list[Compiled]:
    """What `function` of `module` would launch, by a process of its own."""
    command = [sys.executable, "-m", "tests.kernels.hopper", module, function]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [Compiled(**{**row, "tensor_cores": tuple(row["tensor_cores"])}) for row in rows]


def main() -> None:
    module, function = sys.argv[1:]
    with hopper() as compiled:
        getattr(importlib.import_module(module), function)()
    for kernel in compiled:
        print(json.dumps(asdict(kernel)))


if __name__ == "__main__":
    main()
