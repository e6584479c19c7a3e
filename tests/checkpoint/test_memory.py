"""Loading and exporting Hugging Face weights takes little memory beside the rank's own part of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, PreTrainedModel

from crossdock.checkpoint import HFCheckpoint, save_hf, tensor_shapes
from crossdock.checkpoint.hf_writing import Entry, ShardWriter
from crossdock.models import FAMILIES, Family, build_model, materialise
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.ranks import RankPool

MIB = 2**20
COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 5},
    "gpt_oss": {
        "intermediate_size": 256,
        "num_local_experts": 32,
        "num_hidden_layers": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def _build(family: Family, sizes: dict[str, Any]) -> PreTrainedModel:
    """On the meta device."""
    config = CONFIG_MAPPING[family.model_type](**COMMON, **sizes)
    return build_model(family, config, MoEConfig(), torch.float32)


def _anonymous() -> int:
    """Bytes of this process that are no pages of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def _peak(action: Callable[[], object]) -> int:
    """How far the anonymous memory of this process rises while `action` runs."""
    before = _anonymous()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    peak = max(peak, _anonymous())
    done.set()
    watcher.join()
    return peak - before


def load_and_save(name: str, sizes: dict[str, Any], folder: str) -> dict[str, int]:
    """Peaks of loading, and of writing again, in bytes; and the sizes of the model and of a layer's experts."""
    family = FAMILIES[name]
    weights = HFCheckpoint.open(Path(folder))
    model = _build(family, sizes)
    weights.check(model, family.hf_keys)
    size = sum(parameter.nbytes for parameter in model.parameters())
    layer = sum(parameter.nbytes for parameter in next(iter(moe_layers(model).values())).experts.parameters())
    parallelize(model, ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu"))
    dist.barrier()
    load = _peak(lambda: materialise(family, model, torch.device("cpu"), weights=weights))
    destination = Path(folder, "again")
    destination.mkdir(exist_ok=True)
    dist.barrier()
    save = _peak(lambda: save_hf(model, family.hf_keys, destination, {}, "F32", 64 * MIB))
    return {"size": size, "layer": layer, "load": load, "save": save}


def _write(name: str, sizes: dict[str, Any], folder: Path) -> None:
    shapes = tensor_shapes(_build(FAMILIES[name], sizes), FAMILIES[name].hf_keys)
    entries = [Entry(key, "F32", shape) for key, shape in shapes.items()]
    with ShardWriter(folder, entries, 256 * MIB) as writer:
        for entry in entries:
            writer.write(torch.full(entry.shape, 0.01))
        writer.write_index()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("qwen3", {}),
        ("gpt_oss", {}),
        # 2 GB.
        pytest.param("qwen3", {"num_experts": 64, "num_hidden_layers": 20}, marks=pytest.mark.slow),
    ],
)
def test_a_rank_of_four_holds_a_quarter_and_no_more_than_a_layer(
    ranks: RankPool, tmp_path: Path, name: str, more: dict[str, int]
) -> None:
    sizes = SIZES[name] | more
    _write(name, sizes, tmp_path)
    for result in ranks.run(4, load_and_save, name, sizes, str(tmp_path)):
        print({key: f"{value / MIB:.0f} MiB" for key, value in result.items()})
        assert result["load"] <= result["size"] / 4 + result["layer"]
        assert result["save"] <= result["layer"]
