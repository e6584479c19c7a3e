"""Tensor parallelism of all families: a step's loss, gradients and logits are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from crossdock.checkpoint import HFCheckpoint
from crossdock.models import FAMILIES, accept_context_parallel, batch_loss, build_model, materialise
from crossdock.moe import moe_layers, set_batch_totals
from crossdock.moe_config import MoEConfig
from crossdock.parallel import (
    ActivationCheckpointConfig,
    CompileConfig,
    GradientManager,
    ParallelDims,
    ParallelismConfig,
    parallelize,
    plain_name,
)
from tests.models.tiny_families import SIZES, write_family
from tests.ranks import RankPool

BATCH, LENGTH = 2, 12


def step(name: str, folder: str, layout: dict[str, int], mode: Any = "none", **options: Any) -> dict[str, Any]:
    """Logits, then loss and all gradients of a step in float64, with padding, on a layout of these ranks."""
    family = FAMILIES[name]
    dims = ParallelDims(dist.get_world_size(), **layout)
    meshes = dims.build_mesh("cpu")
    config = MoEConfig(sequence_aux_loss_coeff=0.01, z_loss_coeff=0.01, experts="eager")
    model = build_model(family, family.hf_config_from(Path(folder)), config, torch.float64, attn_implementation="eager")
    if family.own_attention or meshes.cp is not None:
        accept_context_parallel(model)
    parallelize(
        model,
        meshes,
        tensor_plan=family.tensor_plan(model.config),
        activation_checkpoint=ActivationCheckpointConfig(mode),
        **options,
    )
    materialise(family, model, torch.device("cpu"), weights=HFCheckpoint.open(Path(folder)))
    gradients = GradientManager(model, meshes)
    reader = dims.reader(dist.get_rank())
    ids = torch.randint(3, 64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -3:] = True
    ids, padding = (tensor.tensor_split(reader.degree)[reader.rank] for tensor in (ids, padding))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[:, :-1], padding_mask=padding).logits
    set_batch_totals(model, BATCH, BATCH * LENGTH, dist.group.WORLD, meshes.sequence)
    labels = ids[:, 1:].masked_fill(padding, -100)
    gradients.before_backward(is_last=True)
    loss = batch_loss(model.train(), ids[:, :-1], labels, padding_mask=padding) / (BATCH * LENGTH)
    loss.backward()
    norm = gradients.clip(1e9)
    total = loss.detach().clone()
    dist.all_reduce(total)
    whole = {}
    layers = moe_layers(model).values()
    slots = {p: layer.placement.expert_to_slot for layer in layers for p in layer.experts.parameters()}
    for parameter_name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), parameter_name
        value = parameter.grad.full_tensor()
        value = value[torch.tensor(slots[parameter])] if parameter in slots else value
        whole[plain_name(parameter_name)] = value.numpy()
    return {"logits": logits.numpy(), "loss": total.item(), "norm": norm.item(), "gradients": whole}


def _with(options: dict[str, Any], *args: Any) -> dict[str, Any]:
    return step(*args, **options)


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in known:
            folder = write_family(tmp_path_factory.mktemp("tensor") / name, name)
            known[name] = (folder, ranks.run(1, step, name, str(folder), {})[0])
        return known[name]

    return run


def compare(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    for result in results:
        np.testing.assert_allclose(result["loss"], expected["loss"], rtol=tolerance)
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = np.linalg.norm(result["gradients"][name] - gradient) / max(np.linalg.norm(gradient), 1e-30)
            assert error < tolerance, f"{name}: {error}"
        np.testing.assert_allclose(result["norm"], expected["norm"], rtol=tolerance)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_a_step_equals_one_process(ranks: RankPool, one_process: Any, name: str, sequence_parallel: bool) -> None:
    folder, expected = one_process(name)
    options = {"config": ParallelismConfig(sequence_parallel=sequence_parallel)}
    results = ranks.run(2, _with, options, name, str(folder), {"tp": 2})
    # These rotate queries and keys in complex fp32, whatever the model's dtype.
    tolerance = 1e-6 if name in ("deepseek_v2", "llama4") else 1e-9
    compare(results, expected, tolerance)
    for result in results:
        np.testing.assert_allclose(result["logits"], expected["logits"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "layout", "mode"),
    [
        ("qwen3", {"tp": 2, "ep": 4}, "selective"),
        ("deepseek_v3", {"tp": 2, "ep": 2, "dp_replicate": 2}, "full"),
        ("qwen2", {"tp": 4, "ep": 2}, "none"),
    ],
)
def test_a_step_on_four_ranks_equals_one_process(
    ranks: RankPool, one_process: Any, name: str, layout: dict[str, int], mode: str
) -> None:
    folder, expected = one_process(name)
    compare(ranks.run(4, _with, {}, name, str(folder), layout, mode), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_step_of_compiled_blocks_equals_one_process(
    ranks: RankPool, one_process: Any, sequence_parallel: bool
) -> None:
    folder, expected = one_process("qwen3")
    options = {
        "config": ParallelismConfig(sequence_parallel=sequence_parallel),
        "compile_config": CompileConfig(enable=True),
    }
    compare(ranks.run(2, _with, options, "qwen3", str(folder), {"tp": 2}), expected)
