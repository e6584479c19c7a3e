"""Every family: transformers' logits from transformers' checkpoint, back bit for bit, and a step on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from crossdock.checkpoint import HFCheckpoint, save_hf
from crossdock.models import FAMILIES, batch_loss, build_model, materialise
from crossdock.moe import finish_step, moe_layers, set_batch_totals
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize, plain_name
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.models.tiny_families import SIZES, write_family
from tests.ranks import RankPool

BATCH, LENGTH = 4, 12


def _input_ids() -> torch.Tensor:
    return torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def _load(name: str, folder: Path, ep: int) -> PreTrainedModel:
    family = FAMILIES[name]
    weights = HFCheckpoint.open(folder)
    model = build_model(family, family.hf_config_from(folder), MoEConfig(sequence_aux_loss_coeff=0.01), torch.float32)
    weights.check(model, family.hf_keys)
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    materialise(family, model, torch.device("cpu"), weights=weights)
    return model


def load_export_and_train(name: str, folder: str, export: str, ep: int) -> dict[str, Any]:
    """Logits; then the weights, exported; then loss, all gradients and the counts of one step."""
    model = _load(name, Path(folder), ep)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        logits = model.eval()(input_ids=_input_ids()).logits.numpy()
    if rank == 0:
        Path(export).mkdir(parents=True)
    dist.barrier()
    save_hf(model, FAMILIES[name].hf_keys, Path(export), {}, "F32")
    own = _input_ids().tensor_split(world_size)[rank]
    tokens = BATCH * (LENGTH - 1)
    set_batch_totals(model, BATCH, BATCH * LENGTH)
    labels = torch.cat([own[:, 1:], torch.full((len(own), 1), -100)], dim=1)
    loss = batch_loss(model.train(), own, labels) / tokens
    loss.backward()
    gradients = {}
    for parameter_name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, parameter_name
        gradients[plain_name(parameter_name)] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    for layer_name, layer in moe_layers(model).items():
        slots = torch.tensor(layer.placement.expert_to_slot)
        for part, _ in layer.experts.named_parameters():
            key = plain_name(f"{layer_name}.experts.{part}")
            gradients[key] = gradients[key][slots]
    total = loss.detach().clone()
    dist.all_reduce(total)
    counts = finish_step(model, dist.group.WORLD).routes
    return {
        "logits": logits,
        "loss": total.numpy(),
        "counts": counts.numpy(),
        "gradients": {key: value.numpy() for key, value in gradients.items()},
    }


@pytest.mark.parametrize("name", SIZES)
def test_loads_exports_and_trains_as_transformers_does(ranks: RankPool, tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path / "source", name)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = peer(input_ids=_input_ids()).logits.numpy()
    (alone,) = ranks.run(1, load_export_and_train, name, str(folder), str(tmp_path / "one"), 1)
    both = ranks.run(2, load_export_and_train, name, str(folder), str(tmp_path / "two"), 2)
    for result in (alone, *both):
        np.testing.assert_allclose(result["logits"], expected, rtol=0, atol=1e-5)
    original = read_tensors(folder)
    for export in ("one", "two"):
        assert differences(read_tensors(tmp_path / export), original) == []
    for result in both:
        np.testing.assert_allclose(result["loss"], alone["loss"], rtol=1e-6)
        np.testing.assert_array_equal(result["counts"], alone["counts"])
        assert result["gradients"].keys() == alone["gradients"].keys()
        for key, grad in alone["gradients"].items():
            error = np.linalg.norm(result["gradients"][key] - grad)
            assert error <= 1e-5 * np.linalg.norm(grad) + 1e-9, key
