"""Where the kernels run."""

from __future__ import annotations

import pytest
import torch

from crossdock.kernels import runtime


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU where Triton interprets; the test is skipped where neither runs kernels."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    device = torch.device("cpu" if runtime.INTERPRETED else "cuda")
    if not runtime.runs(torch.empty(1, device=device if torch.cuda.is_available() else "cpu")):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return device
