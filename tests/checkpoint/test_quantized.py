"""FP8 in blocks and MXFP4: what is loaded, on any layout, is what the numbers stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from crossdock.checkpoint import CheckpointError, HFCheckpoint
from crossdock.models import FAMILIES, build_model, export_hf, materialise, write_assets
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.checkpoint.hf_folders import differences, read_tensors, write_shards
from tests.checkpoint.quantizing import quantize_fp8, quantize_mxfp4
from tests.models.tiny_families import write_family
from tests.ranks import RankPool

# Rows and columns: the last blocks of a matrix are cut.
BLOCK = (12, 20)
MXFP4_SIZES = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen3` in FP8 and `gpt_oss` in MXFP4; beside each, `NAME-meant` with the values that are meant."""
    root = tmp_path_factory.mktemp("quantized")
    for name, sizes in (("qwen3", {}), ("gpt_oss", MXFP4_SIZES)):
        plain = write_family(root / f"{name}-meant", name, **sizes)
        shutil.copytree(plain, root / name)
        tensors = read_tensors(plain)
        stored, meant = quantize_fp8(tensors, BLOCK) if name == "qwen3" else quantize_mxfp4(tensors)
        write_shards(plain, meant, 1)
        write_shards(root / name, stored, 3)
        config = json.loads((plain / "config.json").read_text())
        method = {"quant_method": "fp8", "weight_block_size": list(BLOCK)} if name == "qwen3" else {}
        config["quantization_config"] = method or {"quant_method": "mxfp4"}
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def _load(name: str, folder: Path, ep: int) -> tuple[PreTrainedModel, HFCheckpoint]:
    family, weights = FAMILIES[name], HFCheckpoint.open(folder)
    model = build_model(family, family.hf_config_from(folder), MoEConfig(), torch.float32)
    weights.check(model, family.hf_keys)
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    materialise(family, model, torch.device("cpu"), weights=weights)
    return model.eval(), weights


def differing(name: str, folders: str, ep: int) -> list[str]:
    """The parameters of this rank that the quantised and the plain folder do not give the same bits."""
    quantized, _ = _load(name, Path(folders, name), ep)
    plain, _ = _load(name, Path(folders, f"{name}-meant"), ep)
    pairs = zip(quantized.named_parameters(), plain.parameters(), strict=True)
    return [key for (key, ours), theirs in pairs if not torch.equal(_local(ours), _local(theirs))]


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_loads_what_the_numbers_stand_for_on_every_layout(ranks: RankPool, folders: Path, name: str) -> None:
    for world_size, ep in ((1, 1), (2, 2), (2, 1), (4, 2)):
        assert ranks.run(world_size, differing, name, str(folders), ep) == [[]] * world_size


def logits_and_export(name: str, folder: str, destination: str) -> np.ndarray:
    model, weights = _load(name, Path(folder), 1)
    assets = Path(f"{destination}-assets")
    tokenizer = assets.with_suffix(".json")
    tokenizer.write_text('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    write_assets(assets, model, tokenizer, None, Path(folder), weights)
    export_hf(model, FAMILIES[name].hf_keys, assets, Path(destination))
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits.numpy()


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_equals_what_transformers_loads_and_is_exported_in_bfloat16(
    ranks: RankPool, folders: Path, tmp_path: Path, name: str
) -> None:
    destination = tmp_path / "export"
    (logits,) = ranks.run(1, logits_and_export, name, str(folders / name), str(destination))
    if name == "gpt_oss":
        options: Any = {"quantization_config": Mxfp4Config(dequantize=True)}
        peer = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32, **options)
    else:  # transformers reads no blocks that are cut
        peer = AutoModelForCausalLM.from_pretrained(folders / f"{name}-meant", dtype=torch.float32)
    with torch.no_grad():
        expected = peer.eval()(input_ids=torch.arange(3, 15)[None]).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    meant, exported = read_tensors(folders / f"{name}-meant"), read_tensors(destination)
    quantized = {key for key in meant if key not in read_tensors(folders / name)} or {k for k in meant if "proj" in k}
    assert "quantization_config" not in json.loads((destination / "config.json").read_text())
    assert (
        differences(exported, {key: tensor.bfloat16() if key in quantized else tensor for key, tensor in meant.items()})
        == []
    )


def test_fp8_of_even_blocks_equals_what_transformers_loads(ranks: RankPool, folders: Path, tmp_path: Path) -> None:
    even = tmp_path / "even"
    shutil.copytree(folders / "qwen3", even)
    tensors = read_tensors(write_family(tmp_path / "plain", "qwen3"))
    write_shards(even, quantize_fp8(tensors, (8, 16))[0], 1)
    config = json.loads((even / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    (even / "config.json").write_text(json.dumps(config))
    options: Any = {"quantization_config": FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 16))}
    peer = AutoModelForCausalLM.from_pretrained(even, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        expected = peer(input_ids=torch.arange(3, 15)[None]).logits.numpy()
    (logits,) = ranks.run(1, logits_and_export, "qwen3", str(even), str(tmp_path / "export"))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "qwen3",
            {"mlp.experts.0.up_proj.weight_scale_inv": None},
            r"up_proj\.weight is F8_E4M3; F64, .* beside their",
        ),
        ("qwen3", {"mlp.experts.0.up_proj.weight_scale_inv": torch.ones(3, 5)}, r"not one factor for each block of 12"),
        (
            "qwen3",
            {"mlp.experts.0.up_proj.weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
            r"up_proj\.weight has .*weight_scale_inv in U8; F64, .* can be read",
        ),
        ("gpt_oss", {"mlp.experts.down_proj_scales": None}, r"down_proj is missing"),
        (
            "gpt_oss",
            {"mlp.experts.down_proj_scales": torch.ones(5, 64, 2, dtype=torch.uint8)},
            r"down_proj has .*not \[E, B, A/32, 16\]",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(
    folders: Path, tmp_path: Path, name: str, change: dict[str, Tensor | None], message: str
) -> None:
    shutil.copytree(folders / name, tmp_path / "broken")
    tensors = read_tensors(folders / name)
    for key, value in change.items():
        whole = f"model.layers.0.{key}"
        tensors.pop(whole) if value is None else tensors.update({whole: value})
    write_shards(tmp_path / "broken", tensors, 2)
    family = FAMILIES[name]
    model = build_model(family, family.hf_config_from(tmp_path / "broken"), MoEConfig(), torch.float32)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint.open(tmp_path / "broken").check(model, family.hf_keys)
