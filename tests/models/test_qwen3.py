"""Qwen3-MoE: the same model as transformers', and the same initial weights on every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from crossdock.models import FAMILIES, build_model, materialise
from crossdock.moe import MoE, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.ranks import RankPool

TINY = Qwen3MoeConfig.from_dict(
    {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "initializer_range": 0.1,
        "head_dim": 16,
    }
)


def _input_ids() -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_logits_equal_those_of_transformers(experts: str, norm_topk_prob: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig.from_dict(TINY.to_dict() | {"norm_topk_prob": norm_topk_prob})
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        expected = model(input_ids=_input_ids()).logits
        adapted = FAMILIES["qwen3"].adapt(model, MoEConfig(experts=experts))  # type: ignore[arg-type]
        logits = adapted(input_ids=_input_ids()).logits
    assert list(moe_layers(adapted)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_float64_model_computes_nothing_in_float32() -> None:
    torch.manual_seed(0)
    model = FAMILIES["qwen3"].adapt(Qwen3MoeForCausalLM(TINY), MoEConfig(experts="eager")).double()  # type: ignore[operator]
    with torch.no_grad():
        logits = model(input_ids=_input_ids()).logits
        # A perturbation far below fp32's resolution must come through: any cast to fp32 on the way would drop it.
        model.get_parameter("model.layers.0.input_layernorm.weight")[0] *= 1 + 1e-11
        moved = (model(input_ids=_input_ids()).logits - logits).abs().max()
    assert logits.dtype == torch.float64
    assert 1e-14 < moved < 1e-9


def _materialise(world_size: int, ep: int) -> dict[str, np.ndarray]:
    family = FAMILIES["qwen3"]
    model = build_model(family, TINY, MoEConfig(), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    parallelize(model, ParallelDims(world_size, ep=ep).build_mesh("cpu"))
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert own <= whole / world_size * 1.1, "a rank holds more than its share"
    materialise(family, model, torch.device("cpu"), seed=3)
    layers = moe_layers(model)
    rows = {id(p): layer.placement.expert_to_slot for layer in layers.values() for p in layer.experts.parameters()}
    values = {}
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        values[name] = (value[list(rows[id(parameter)])] if id(parameter) in rows else value).detach().numpy()
    with torch.no_grad():
        values["logits"] = model(input_ids=_input_ids()).logits.numpy()
    return values


def test_initial_weights_are_the_same_on_every_layout(ranks: RankPool) -> None:
    whole = ranks.run(1, _materialise, 1, 1)[0]
    for world_size, ep in ((2, 1), (2, 2), (4, 2), (4, 4)):
        for result in ranks.run(world_size, _materialise, world_size, ep):
            for name, value in whole.items():
                if name != "logits":
                    np.testing.assert_array_equal(result[name], value, err_msg=name)
            np.testing.assert_allclose(result["logits"], whole["logits"], rtol=0, atol=1e-5)
    assert whole["model.embed_tokens.weight"].std() == pytest.approx(0.1, rel=0.1)
    assert np.unique(whole["model.layers.0.mlp.experts.down_projs"]).size > 0.99 * TINY.num_experts * 16 * 32


@pytest.mark.parametrize(
    ("flavor", "billions", "active_billions"),
    [("debug", 0.00864, 0.0055), ("10B-A1B", 10, 1.2), ("30B-A3B", 30.5, 3.3), ("235B-A22B", 235, 22)],
)
def test_flavors_have_the_size_they_are_named_after(flavor: str, billions: float, active_billions: float) -> None:
    family = FAMILIES["qwen3"]
    config = family.hf_config(flavor)
    model = build_model(family, config, MoEConfig(), torch.float32)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for m in model.modules() if isinstance(m, MoE) for p in m.experts.parameters())
    active = total - experts + experts * config.num_experts_per_tok // config.num_experts
    assert total / 1e9 == pytest.approx(billions, rel=0.03)
    assert active / 1e9 == pytest.approx(active_billions, rel=0.05)
