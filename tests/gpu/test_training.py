"""The debug preset trained on a GPU beside a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossdock.models import FAMILIES, batch_loss, build_model, materialise
from crossdock.moe import finish_step, set_batch_totals
from crossdock.moe_config import MoEConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

STEPS, BATCH, SEQ_LEN = 48, 4, 128
NUM_BATCHES, WINDOW = 4, 4


def batches() -> list[Tensor]:
    """A few in turn, to be learned by heart."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 8192, (BATCH, SEQ_LEN + 1), generator=generator) for _ in range(NUM_BATCHES)]


def losses(device: str, dtype: torch.dtype, moe: MoEConfig) -> list[float]:
    """Means over each round of the batches; parameters stay in float32, bfloat16 is autocast's."""
    family = FAMILIES["qwen3"]
    model = build_model(family, family.hf_config("debug"), moe, torch.float32)
    materialise(family, model, torch.device(device))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    values = []
    given = batches()
    for number in range(STEPS):
        tokens = given[number % NUM_BATCHES].to(device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        set_batch_totals(model, BATCH, labels.numel())
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = batch_loss(model, inputs, labels) / labels.numel()
        loss.backward()
        optimizer.step()
        finish_step(model)
        optimizer.zero_grad()
        values.append(loss.item())
    return [sum(values[first : first + WINDOW]) / WINDOW for first in range(0, STEPS, WINDOW)]


def test_the_debug_preset_learns_on_a_gpu_as_on_a_cpu() -> None:
    """Within 2 % of the CPU's losses in float32, all along, in float32 and in bfloat16."""
    wanted = losses("cpu", torch.float32, MoEConfig())
    assert wanted[-1] < 0.7 * wanted[0]
    for dtype in (torch.float32, torch.bfloat16):
        got = losses("cuda", dtype, MoEConfig(experts="triton", router_kernel="triton"))
        assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(got, wanted, strict=True)), (dtype, got, wanted)
