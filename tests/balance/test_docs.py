"""What docs/balance.md shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.config import load_config, validate
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.parallel.test_gradients import HIDDEN, LENGTH, build
from tests.ranks import RankPool

PAGE = (Path(__file__).parents[2] / "docs" / "balance.md").read_text()
(SETTINGS,), (PLANNING, LOOP) = (
    re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for language in ("toml", "python")
)


def test_settings_are_valid_on_four_ranks(tmp_path: Path) -> None:
    (tmp_path / "balance.toml").write_text(SETTINGS)
    assert validate(load_config(tmp_path / "balance.toml"), 4).ep == 4


def test_planning_runs() -> None:
    exec(PLANNING, {})


def _run_loop() -> list[float]:
    model = build(8, torch.float32, MoEConfig(debug_force_zipf=1.5))
    parallelize(model, ParallelDims(2, ep=2).build_mesh("cpu"))
    losses = []

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        loss = model(batch).square().mean() / dist.get_world_size()
        losses.append(loss.item())
        return loss

    batches = [torch.randn(4, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))] * 6
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "batches": batches,
        "loss_of": loss_of,
        "dist": dist,
    }
    settings = 'strategy="eplb+spill"'
    assert settings in LOOP
    # Tiny experts: it would not pay.
    exec(LOOP.replace(settings, f"{settings}, spill_if_it_pays=False, min_spilled_routes=0"), names)
    assert names["metrics"]["rank_max_mean"] < names["metrics"]["rank_max_mean_before"]
    return losses


def test_the_loop_runs_and_learns(ranks: RankPool) -> None:
    for losses in ranks.run(2, _run_loop):
        assert losses[-1] < losses[0]
