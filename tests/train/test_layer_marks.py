"""A rank knows in which layer it is, forward and backward, whatever the blocks are wrapped in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.config import load_config, validate
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets


def spots(assets: str, folder: str, options: list[str]) -> list[str]:
    """Where this rank says that it is when experts and attention have computed, and when their gradients come."""
    settings = [
        *("--job.dump-folder", f"{folder}/run", "--model.hf-assets-path", assets),
        *("--data.source", str(speeches(assets)), "--data.cache-folder", f"{folder}/cache"),
        *("--training.seq-len", "32", "--training.local-batch-size", "2", "--training.steps", "1"),
        *("--parallelism.expert-parallel-degree", "2", "--training.tuned", "off", "--checkpoint.no-last-save-in-hf"),
    ]
    config = load_config(None, [*settings, *options])
    trainer = Trainer(
        config, validate(config, dist.get_world_size()), torch.device("cpu"), dist.get_rank() == 0, StopSignal()
    )
    seen: list[str] = []

    def note(what: str) -> None:
        seen.append(f"{what}: {trainer.place.spot()}")

    def watch(module: nn.Module, what: str) -> None:
        def after(_: nn.Module, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            note(what)
            if first.requires_grad:
                first.register_hook(lambda _: note(f"gradient of {what}"))

        module.register_forward_hook(after)

    for name, module in trainer.model.named_modules():
        if name.endswith(("self_attn", "mlp.experts")):
            watch(module, name.rpartition(".")[2])
    trainer.train()
    return seen


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_forward_and_backward_are_seen_layer_by_layer(ranks: RankPool, tmp_path: Path, mode: str) -> None:
    assets = str(write_assets(tmp_path / "assets"))
    own, _ = ranks.run(2, spots, assets, str(tmp_path), ["--activation-checkpoint.mode", mode])
    forward = [line for line in own if "step 1, forward" in line]
    assert forward == [
        f"{what}: step 1, forward, layer model.layers.{layer}{part}"
        for layer in (0, 1)
        for what, part in (("self_attn", ""), ("experts", ".mlp, combine"))
    ]
    backward = [line for line in own if "step 1, backward" in line and line.startswith("gradient")]
    assert backward == [
        f"gradient of {what}: step 1, backward, layer model.layers.{layer}.mlp{part}"
        for layer in (1, 0)
        for what, part in (("experts", ", experts"), ("self_attn", ""))
    ]
