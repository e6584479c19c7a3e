"""LoRA on every family: PEFT loads the adapter and computes our logits, merged weights too, on every layout."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from crossdock.checkpoint import CheckpointError, HFCheckpoint, save_hf
from crossdock.lora import LoRAConfig, LoRAError, adapters_of, add_lora, merge_lora
from crossdock.models import FAMILIES, PeftAdapter, batch_loss, build_model, materialise, save_peft_adapter
from crossdock.moe import moe_layers, set_batch_totals
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, clip_grad_norm_, parallelize, plain_name
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.models.tiny_families import SIZES, write_family
from tests.ranks import RankPool

BATCH, LENGTH = 4, 12
LORA = LoRAConfig(rank=4, alpha=6.0)


def _input_ids() -> torch.Tensor:
    return torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def _load(name: str, folder: str, ep: int, lora: LoRAConfig = LORA) -> PreTrainedModel:
    """The family's model with adapters on this rank's process group."""
    family = FAMILIES[name]
    weights = HFCheckpoint.open(Path(folder))
    moe = MoEConfig(sequence_aux_loss_coeff=0.01)
    model = build_model(family, family.hf_config_from(Path(folder)), moe, torch.float32)
    add_lora(model, lora, family.attention)
    weights.check(model, family.hf_keys)
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    materialise(family, model, torch.device("cpu"), weights=weights)
    return model


def _logits(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=_input_ids()).logits.numpy()


def _whole(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone().numpy()  # `numpy` would pin the storage that FSDP resizes


def _by_expert(model: PreTrainedModel, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with experts' rows in logical order."""
    for layer_name, layer in moe_layers(model).items():
        for name, _ in layer.experts.named_parameters():
            key = plain_name(f"{layer_name}.experts.{name}")
            if key in tensors:
                tensors[key] = tensors[key][list(layer.placement.expert_to_slot)]
    return tensors


def train_and_save(name: str, folder: str, out: str, ep: int, lora: LoRAConfig = LORA) -> dict[str, Any]:
    """One large step on the adapters; then the adapter and the merged model are written.

    Returns:
        Logits (before, trained, merged), the gradients and the new values of whatever moved.
    """
    model = _load(name, folder, ep, lora)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = _logits(model)
    own = _input_ids().tensor_split(world_size)[rank]
    set_batch_totals(model, BATCH, BATCH * LENGTH)
    labels = torch.cat([own[:, 1:], torch.full((len(own), 1), -100)], dim=1)
    # Adam moves every adapter by its learning rate: those that begin as 0, and have a gradient, first.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    gradients: dict[str, np.ndarray] = {}
    norms = []
    start = {plain_name(key): _whole(value) for key, value in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        (batch_loss(model.train(), own, labels) / (BATCH * (LENGTH - 1))).backward()
        named = {plain_name(key): value.grad for key, value in model.named_parameters() if value.grad is not None}
        gradients = _by_expert(model, {key: _whole(value) for key, value in named.items()})
        norms.append(clip_grad_norm_(model.parameters(), 1e9).item())
        optimizer.step()
    trained = _logits(model)
    moved = {
        key for key, value in model.named_parameters() if not np.array_equal(_whole(value), start[plain_name(key)])
    }
    family = FAMILIES[name]
    save_peft_adapter(model, family, lora, folder, Path(out, "adapter"))
    if rank == 0:
        Path(out, "base").mkdir()
        Path(out, "merged").mkdir()
    dist.barrier()
    save_hf(model, family.hf_keys, Path(out, "base"), {}, "F32")
    merge_lora(model)
    merged = _logits(model)
    save_hf(model, family.hf_keys, Path(out, "merged"), {}, "F32")
    return {
        "before": before,
        "trained": trained,
        "merged": merged,
        "gradients": gradients,
        "norms": norms,
        "moved": {plain_name(key) for key in moved},
        "adapters": {plain_name(key) for key in adapters_of(model)},
    }


def _peer_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=_input_ids()).logits.numpy()


def _with_peft(source: Path, adapter: Path) -> np.ndarray:
    """The logits of transformers' model with the adapter that PEFT has loaded, every tensor of it in its place."""
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with warnings.catch_warnings():
        # PEFT warns of keys that it has not found.
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        model = PeftModel.from_pretrained(base, adapter).eval()
    stored, held = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[name], held[name]) for name in stored)
    return _peer_logits(model)


def _check(results: list[dict[str, Any]], source: Path, out: Path) -> None:
    expected = _with_peft(source, out / "adapter")
    shutil.copy(source / "config.json", out / "merged")
    merged = _peer_logits(AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32))
    for result in results:
        assert np.abs(result["trained"] - result["before"]).max() > 1e-2, "the adapter has no effect"
        np.testing.assert_allclose(result["trained"], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(result["merged"], result["trained"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(merged, result["trained"], rtol=0, atol=1e-5)
        assert result["gradients"].keys() == result["adapters"] == result["moved"]
        assert all(grad.any() for grad in result["gradients"].values())
    original = read_tensors(source)
    assert differences(read_tensors(out / "base"), original) == [], "the weights beside the adapters have moved"
    assert read_tensors(out / "merged").keys() == original.keys()


@pytest.mark.parametrize("name", SIZES)
def test_peft_loads_the_adapter_and_gives_our_logits(ranks: RankPool, tmp_path: Path, name: str) -> None:
    source = write_family(tmp_path / "source", name)
    _check(ranks.run(1, train_and_save, name, str(source), str(tmp_path), 1), source, tmp_path)


LAYOUTS = [
    ("qwen3", 2, 2),
    ("qwen3", 2, 1),
    ("qwen3", 4, 2),
    ("gpt_oss", 2, 2),
    ("deepseek_v3", 2, 2),
    pytest.param("gpt_oss", 4, 2, marks=pytest.mark.slow),
    pytest.param("llama4", 4, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "world_size", "ep"), LAYOUTS)
def test_a_step_on_a_layout_equals_one_on_one_rank(
    ranks: RankPool, tmp_path: Path, name: str, world_size: int, ep: int
) -> None:
    source = write_family(tmp_path / "source", name)
    for folder in ("alone", "spread"):
        (tmp_path / folder).mkdir()
    (alone,) = ranks.run(1, train_and_save, name, str(source), str(tmp_path / "alone"), 1)
    spread = ranks.run(world_size, train_and_save, name, str(source), str(tmp_path / "spread"), ep)
    _check(spread, source, tmp_path / "spread")
    for result in spread:
        np.testing.assert_allclose(result["norms"], alone["norms"], rtol=1e-4)
        for key, grad in alone["gradients"].items():
            error = np.linalg.norm(result["gradients"][key] - grad)
            assert error <= 1e-3 * np.linalg.norm(grad) + 1e-9, key
        np.testing.assert_allclose(result["trained"], alone["trained"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", ["attention", "experts"])
def test_one_target_alone(ranks: RankPool, tmp_path: Path, target: Any) -> None:
    source = write_family(tmp_path / "source", "qwen3")
    lora = LoRAConfig(rank=3, alpha=6.0, targets=(target,))
    results = ranks.run(2, train_and_save, "qwen3", str(source), str(tmp_path), 2, lora)
    assert all((".experts." in name) == (target == "experts") for name in results[0]["adapters"])
    _check(results, source, tmp_path)


def load_adapter(name: str, folder: str, adapter: str, out: str, ep: int) -> np.ndarray:
    """The logits with an adapter that was read, which is written again."""
    model = _load(name, folder, ep)
    opened = PeftAdapter.open(Path(adapter))
    opened.check(model, FAMILIES[name], LORA)
    opened.load(model, FAMILIES[name])
    save_peft_adapter(model, FAMILIES[name], LORA, folder, Path(out))
    return _logits(model)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "llama4"])
def test_an_adapter_comes_back_bit_for_bit_on_another_layout(ranks: RankPool, tmp_path: Path, name: str) -> None:
    source = write_family(tmp_path / "source", name)
    (alone,) = ranks.run(1, train_and_save, name, str(source), str(tmp_path), 1)
    for world_size, ep in ((2, 2), (4, 2)):
        out = tmp_path / f"again-{world_size}"
        for logits in ranks.run(world_size, load_adapter, name, str(source), str(tmp_path / "adapter"), str(out), ep):
            np.testing.assert_allclose(logits, alone["trained"], rtol=0, atol=1e-5)
        saved, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", out))
        assert differences(saved, again) == []


def _model(name: str, source: Path, lora: LoRAConfig = LORA) -> PreTrainedModel:
    """On the meta device."""
    family = FAMILIES[name]
    model = build_model(family, family.hf_config_from(source), MoEConfig(), torch.float32)
    return add_lora(model, lora, family.attention)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def adapter(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` is a model, `adapter` one of it."""
    folder = tmp_path_factory.mktemp("adapter")
    source = write_family(folder / "source", "qwen3")
    ranks.run(1, train_and_save, "qwen3", str(source), str(folder), 1)
    return folder


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(kept))


FAULTS = {
    "other names": (lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()}, {}, "none of its"),
    "one is missing": (lambda tensors: dict([*tensors.items()][1:]), {}, "is missing"),
    "one too many": (lambda tensors: tensors | {"more": torch.zeros(1)}, {}, "more is unexpected"),
    "another shape": (lambda tensors: {name: tensor[:-1] for name, tensor in tensors.items()}, {}, "has shape"),
    "another rank": (dict, {"r": 8}, "has r 8, not 4"),
    "another scale": (dict, {"lora_alpha": 8}, "has lora_alpha 8, not 6.0"),
    "scaled by the root": (dict, {"use_rslora": True}, "use_rslora"),
    "ranks of their own": (dict, {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "another method": (dict, {"peft_type": "LOHA"}, "peft_type"),
    "the other way round": (dict, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    "some layers": (dict, {"layers_to_transform": [0]}, "layers_to_transform"),
    "a beginning taken off the weights": (dict, {"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', not True"),
    "a setting of a later release": (dict, {"kasa_config": {}}, "kasa_config {}, which is not known"),
    "other modules": (dict, {"target_modules": ["nothing"]}, r"target_modules .*, without model\S+self_attn.q_proj"),
    "no modules": (dict, {"target_modules": None}, "target_modules None, without "),
    "no experts": (dict, {"target_parameters": None}, r"target_parameters None, without \S+experts.gate_up_proj"),
    "some experts": (dict, {"target_parameters": ["experts.gate_up_proj"]}, r"without \S+experts.down_proj"),
    "a rank that goes without saying": (dict, {"r": ...}, "has r 8, not 4"),
    "a scale that goes without saying": (dict, {"lora_alpha": ...}, "has lora_alpha 8, not 6.0"),
    "after some tokens": (dict, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused(adapter: Path, tmp_path: Path, fault: str) -> None:
    change, settings, message = FAULTS[fault]
    folder = tmp_path / "adapter"
    shutil.copytree(adapter / "adapter", folder)
    model = _model("qwen3", adapter / "source")
    PeftAdapter.open(folder).check(model, FAMILIES["qwen3"], LORA)
    _rewrite(folder, change(load_file(folder / "adapter_model.safetensors")), **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        PeftAdapter.open(folder).check(model, FAMILIES["qwen3"], LORA)
    assert str(folder) in str(caught.value)


def test_what_is_no_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        PeftAdapter.open(adapter / "source")
    shutil.copytree(adapter / "adapter", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot read the adapter"):
        PeftAdapter.open(tmp_path / "cut")


def test_a_target_that_the_model_has_not_is_refused(adapter: Path) -> None:
    family = FAMILIES["qwen3"]
    model = build_model(family, family.hf_config_from(adapter / "source"), MoEConfig(), torch.float32)
    with pytest.raises(LoRAError, match="no layer that is 'attention'"):
        add_lora(model, LORA, attention=("no_such",))
    with pytest.raises(ValueError, match="without adapters"):
        add_lora(_model("qwen3", adapter / "source"), LORA)
