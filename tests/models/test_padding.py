"""Padding: a padded batch gives the loss, the gradients and the counts of its sequences without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from crossdock.checkpoint import HFCheckpoint
from crossdock.data import IGNORED_LABEL
from crossdock.models import FAMILIES, batch_loss, build_model, materialise
from crossdock.moe import moe_layers, set_batch_totals
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ActivationCheckpointConfig, CompileConfig, ParallelDims, parallelize, plain_name
from tests.ranks import RankPool
from tests.tiny import write_hf_model

LENGTHS = [20, 7, 1, 13, 20, 2, 16, 9]
FAMILY = FAMILIES["qwen3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding")
    return write_hf_model(folder, num_hidden_layers=3, mlp_only_layers=[1], num_experts=5, initializer_range=0.2)


def _model(folder: str, ep: int, mode: Any, compiled: bool) -> PreTrainedModel:
    weights = HFCheckpoint.open(Path(folder))
    moe = MoEConfig(experts="eager", sequence_aux_loss_coeff=0.1, z_loss_coeff=0.1)
    model = build_model(FAMILY, FAMILY.hf_config_from(Path(folder)), moe, torch.float64)
    parallelize(
        model,
        ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"),
        activation_checkpoint=ActivationCheckpointConfig(mode),
        compile_config=CompileConfig(compiled, "aot_eager"),
    )
    materialise(FAMILY, model, torch.device("cpu"), weights=weights)
    set_batch_totals(model, len(LENGTHS), sum(LENGTHS))
    return model.train()


def _sequences() -> list[torch.Tensor]:
    """Tokens and the label after each: `[2, length]`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(260, (2, length), generator=generator) for length in LENGTHS]


def _outcome(model: PreTrainedModel, loss: float) -> dict[str, np.ndarray]:
    """The loss and the counts over all ranks, and every gradient whole, experts in slots."""
    layers = list(moe_layers(model).values())
    counts = torch.stack([layer.load.tokens_per_expert for layer in layers])
    auxiliary = torch.stack([value for layer in layers for value in layer.load.losses.values()])
    for sums in (total := torch.tensor(loss, dtype=torch.float64)), counts, auxiliary:
        dist.all_reduce(sums)
    outcome = {"loss": total.numpy(), "counts": counts.numpy(), "auxiliary": auxiliary.detach().numpy()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        outcome[f"gradient of {plain_name(name)}"] = whole.numpy().copy()
        parameter.grad = None
    for layer in layers:
        layer.load.reset()
    return outcome


def padded_and_not(folder: str, ep: int, mode: str, side: str, compiled: bool = False) -> list[dict[str, np.ndarray]]:
    """One step of this rank's share of the sequences: one after the other, then as one batch, then the first again."""
    model = _model(folder, ep, mode, compiled)
    own = _sequences()[dist.get_rank() :: dist.get_world_size()]

    def one_by_one() -> dict[str, np.ndarray]:
        loss = 0.0
        for ids, labels in own:
            summed = batch_loss(model, ids[None], labels[None]) / sum(LENGTHS)
            summed.backward()
            loss += summed.item()
        return _outcome(model, loss)

    def padded() -> dict[str, np.ndarray]:
        length = max(LENGTHS) + 3
        input_ids = torch.full((len(own), length), 9)
        labels = torch.full((len(own), length), IGNORED_LABEL)
        mask = torch.ones(len(own), length, dtype=torch.bool)
        for row, (ids, targets) in enumerate(own):
            place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
            input_ids[row, place], labels[row, place], mask[row, place] = ids, targets, False
        inputs = {} if side == "right" else {"attention_mask": ~mask, "position_ids": ((~mask).cumsum(1) - 1).clamp(0)}
        summed = batch_loss(model, input_ids, labels, padding_mask=mask, **inputs) / sum(LENGTHS)
        summed.backward()
        return _outcome(model, summed.item())

    return [one_by_one(), padded(), one_by_one()]


@pytest.mark.parametrize(
    ("world_size", "ep", "mode", "side", "compiled"),
    [
        (1, 1, "none", "right", False),
        (1, 1, "full", "left", False),
        (2, 2, "full", "right", False),
        (2, 2, "selective", "left", False),
        pytest.param(2, 2, "full", "right", True, marks=pytest.mark.slow),
    ],
)
def test_padding_changes_nothing(
    ranks: RankPool, folder: Path, world_size: int, ep: int, mode: str, side: str, compiled: bool
) -> None:
    plain, padded, again = ranks.run(world_size, padded_and_not, str(folder), ep, mode, side, compiled)[0]
    assert plain["counts"].sum(axis=1).tolist() == [2 * sum(LENGTHS)] * 2
    for outcome in (padded, again):
        assert outcome.keys() == plain.keys()
        np.testing.assert_array_equal(outcome["counts"], plain["counts"])
        for name, value in plain.items():
            np.testing.assert_allclose(outcome[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
