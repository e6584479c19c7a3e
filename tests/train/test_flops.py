"""Model FLOPs against torch's own count, and the metrics made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from crossdock.models import FAMILIES, ModelConfig, build_model, materialise, resolve_hf_config
from crossdock.moe_config import MoEConfig
from crossdock.train.flops import Speed, model_flops_per_token, peak_tflops
from crossdock.train.metrics import memory_use
from tests.tiny import write_assets

BATCH, SEQ_LEN = 2, 32


def tiny_model(folder: Path, **sizes: object) -> PreTrainedModel:
    hf_config = resolve_hf_config(ModelConfig(hf_assets_path=str(write_assets(folder, **sizes))))
    family = FAMILIES["qwen3"]
    model = build_model(family, hf_config, MoEConfig(experts="eager"), torch.float32, attn_implementation="eager")
    materialise(family, model, torch.device("cpu"), seed=0)
    return model


def counted(model: PreTrainedModel) -> float:
    """Operations per token in torch's count, forward and backward."""
    ids = torch.randint(260, (BATCH, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_experts": 4, "num_experts_per_tok": 3},
        {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        {"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 2},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_model_flops_are_torchs_count_where_attention_computes_every_pair(
    sizes: dict[str, object], tmp_path: Path
) -> None:
    model = tiny_model(tmp_path, **sizes)
    # Eager attention masks what it has computed; the rotary angles, an outer product, are all that we leave out.
    assert model_flops_per_token(model, SEQ_LEN, causal=False) == pytest.approx(counted(model), rel=2e-3)


def test_frozen_weights_count_without_their_gradients(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    whole = model_flops_per_token(model, SEQ_LEN, causal=False)
    model.get_submodule("model.layers.1").requires_grad_(False)
    frozen = model_flops_per_token(model, SEQ_LEN, causal=False)
    assert frozen < whole
    assert frozen == pytest.approx(counted(model), rel=2e-3)


def test_causal_attention_counts_half(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    attention = 12 * 2 * 2 * 16 * SEQ_LEN  # layers, heads, their size
    whole, half = (model_flops_per_token(model, SEQ_LEN, causal=causal) for causal in (False, True))
    assert whole - half == attention / 2


def test_a_known_model_takes_six_flops_per_active_parameter() -> None:
    family = FAMILIES["qwen3"]
    model = build_model(family, family.hf_config("30B-A3B"), MoEConfig(), torch.float32)
    # 3.35 billion active parameters, 0.31 of them the embedding (arXiv 2505.09388; the name says 3.3).
    assert model_flops_per_token(model, 0) / 6e9 == pytest.approx(3.35 - 0.31, abs=0.02)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Some Device", None),
    ],
)
def test_peak_of_a_device_is_found_by_its_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_tflops_and_mfu_follow_from_tokens_per_second() -> None:
    metrics = Speed(flops_per_token=2e10, peak=989.0).metrics(12_040.0)
    assert metrics["tflops"] == pytest.approx(240.8)
    assert metrics["mfu"] == pytest.approx(100 * 240.8 / 989)
    assert Speed(flops_per_token=2e10, peak=None).metrics(1.0)["mfu"] is None


def test_memory_on_cpu_is_the_resident_set() -> None:
    gib, percent = memory_use(torch.device("cpu"))
    block = torch.ones(2**26)  # 256 MiB of float32
    more_gib, more_percent = memory_use(torch.device("cpu"))
    assert more_gib - gib == pytest.approx(0.25, rel=0.1)
    physical = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    total = int(physical.split()[1]) / 2**20
    assert more_percent - percent == pytest.approx(100 * (more_gib - gib) / total, rel=0.01)
    del block
