"""Families of transformers that keep their own router: its logits, one step on two ranks as on one, its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import CheckpointError, HFCheckpoint, save_hf
from crossdock.config import ConfigError
from crossdock.models import (
    FAMILIES,
    ModelConfig,
    ModelError,
    batch_loss,
    build_model,
    materialise,
    replace_experts,
    resolve_hf_config,
)
from crossdock.models.hf_experts import UnknownExperts
from crossdock.models.hf_keys import converted_keys
from crossdock.moe import finish_step, moe_layers
from crossdock.moe_config import MoEConfig, MoEConfigError
from crossdock.parallel import ParallelDims, clip_grad_norm_, parallelize, plain_name
from crossdock.tools.opening import find_model
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.models.tiny_generic import families_with_a_plan, model_class, tiny_config, tiny_model
from tests.ranks import RankPool

BATCH, LENGTH = 4, 12
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def input_ids() -> Tensor:
    return torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def own_rows(tensor: Tensor) -> Tensor:
    return tensor.tensor_split(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else tensor


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of all parameters, experts in logical order."""
    found = {}
    slots = {p: layer for layer in moe_layers(model).values() for p in layer.experts.slot_parameters().values()}
    for name, parameter in model.named_parameters():
        grad = torch.zeros(parameter.shape) if parameter.grad is None else whole(parameter.grad)
        if parameter in slots:
            grad = grad[torch.tensor(slots[parameter].placement.expert_to_slot)]
        found[plain_name(name)] = grad.numpy()
    return found


def step(model: Any, labels: Tensor) -> dict[str, Any]:
    """Logits of all tokens; then loss and gradients of this rank's."""
    with torch.no_grad():
        logits = model(input_ids=input_ids(), use_cache=False)[0]
    own = own_rows(input_ids())
    output = model(input_ids=own, use_cache=False)[0]
    loss = F.cross_entropy(output.flatten(0, 1), own_rows(labels).flatten(), reduction="sum") / labels.numel()
    loss.backward()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return {"logits": logits.numpy(), "loss": total.item(), "gradients": gradients(model)}


def labels_of(width: int) -> Tensor:
    return torch.randint(width, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def step_on_ranks(config: PreTrainedConfig, width: int) -> dict[str, Any]:
    model = tiny_model(config)
    replace_experts(model, model.config.get_text_config(), MoEConfig(dispatcher="alltoall"))
    parallelize(model, ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu"))
    return step(model, labels_of(width))


def listed() -> dict[str, set[str]]:
    """The families in the table of the docs, by what it says of them."""
    rows = re.findall(r"^\| (.+?) \| ((?:`\w+`(?:, )?)+) \|$", DOCS.read_text(), re.MULTILINE)
    return {what: set(re.findall(r"`(\w+)`", families)) for what, families in rows}


def said(model_type: str) -> str:
    (what,) = [what for what, families in listed().items() if model_type in families]
    return what


def check_step(ranks: RankPool, config: PreTrainedConfig) -> None:
    """transformers' logits and gradients, and two ranks' step equal to one's."""
    theirs = tiny_model(config)
    with torch.no_grad():
        width = theirs(input_ids=input_ids(), use_cache=False)[0].shape[-1]
    peer = step(theirs, labels_of(width))
    ours = tiny_model(config)
    replace_experts(ours, ours.config.get_text_config())
    assert moe_layers(ours)
    one = step(ours, labels_of(width))
    both = ranks.run(2, step_on_ranks, config, width)
    assert one["gradients"].keys() == both[0]["gradients"].keys()
    total = np.sqrt(sum((gradient**2).sum() for gradient in one["gradients"].values()))
    for result in (one, *both):
        np.testing.assert_allclose(result["logits"], peer["logits"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(result["loss"], peer["loss"], rtol=1e-5)
        for name, gradient in one["gradients"].items():
            expected = peer["gradients"].get(name, gradient)  # those of experts lie another way
            error = np.linalg.norm(result["gradients"][name] - expected)
            assert error <= 1e-4 * np.linalg.norm(expected) + 1e-6 * total, name


def check_files(config: PreTrainedConfig, folder: Path) -> None:
    """What transformers has saved is read, and written again bit for bit."""
    source, export = folder / "source", folder / "export"
    peer = tiny_model(config)
    peer.save_pretrained(source)
    with torch.device("meta"):
        keys = converted_keys(model_class(config)._from_config(config))
    model = replace_experts(tiny_model(config), peer.config.get_text_config())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    weights = HFCheckpoint.open(source)
    weights.check(model, keys)
    weights.load(model, keys)
    with torch.no_grad():
        logits = [each(input_ids=input_ids(), use_cache=False)[0] for each in (model, peer)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    export.mkdir()
    save_hf(model, keys, export, {}, "F32")
    assert differences(read_tensors(export), read_tensors(source)) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", families_with_a_plan())
def test_every_family_is_as_the_docs_say(ranks: RankPool, tmp_path: Path, model_type: str) -> None:
    what = said(model_type)
    if what.startswith("not "):
        pytest.skip(what)
    config = tiny_config(families_with_a_plan()[model_type])
    if what.startswith("refused"):
        model = tiny_model(config)
        if "does not know" in what:
            assert not moe_layers(replace_experts(model, model.config.get_text_config()))
            return
        with pytest.raises(UnknownExperts, match=what.removeprefix("refused: ")):
            replace_experts(model, model.config.get_text_config())
        return
    check_step(ranks, config)
    if "no files" in what:
        with pytest.raises(CheckpointError, match=r"hold (another tensor|integers)"), torch.device("meta"):
            converted_keys(model_class(config)._from_config(config))
    else:
        check_files(config, tmp_path)


@pytest.mark.slow
def test_the_docs_list_every_family() -> None:
    rows = list(listed().values())
    assert sum(map(len, rows)) == len(set().union(*rows))
    assert set().union(*rows) == families_with_a_plan().keys()


# Apart in files, with a bias on the choice, which is a buffer; packed in files, with a clamped gate.
QUICK = ("ernie4_5_moe", "minimax_m3_vl_text")


@pytest.mark.parametrize("model_type", QUICK)
def test_a_step_equals_transformers_own(ranks: RankPool, model_type: str) -> None:
    check_step(ranks, tiny_config(families_with_a_plan()[model_type]))


def load(folder: str, ep: int) -> PreTrainedModel:
    """As `crossdock train` does."""
    family = FAMILIES["generic"]
    model = build_model(family, family.hf_config_from(Path(folder)), MoEConfig(), torch.float32)
    weights = HFCheckpoint.open(Path(folder))
    weights.check(model, family.keys(model))
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    materialise(family, model, torch.device("cpu"), weights=weights)
    return model


def load_train_and_export(folder: str, export: str, ep: int) -> dict[str, Any]:
    model = load(folder, ep)
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids()).logits.numpy()
    if dist.get_rank() == 0:
        Path(export).mkdir(parents=True)
    dist.barrier()
    save_hf(model, FAMILIES["generic"].keys(model), Path(export), {}, "F32")
    own = own_rows(input_ids())
    mask = own_rows(torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH], [7], [LENGTH]]))
    labels = torch.cat([own[:, 1:], torch.full((len(own), 1), -100)], dim=1).masked_fill(mask, -100)
    loss = batch_loss(model.train(), own, labels, padding_mask=mask)
    (loss / 30).backward()
    norm = clip_grad_norm_(model.parameters(), 1e9).item()
    total = loss.detach().clone()
    dist.all_reduce(total)
    routes = finish_step(model, dist.group.WORLD).routes
    return {"logits": logits, "loss": total.item(), "norm": norm, "routes": routes.numpy()}


@pytest.mark.parametrize("model_type", QUICK)
def test_a_folder_loads_trains_and_is_exported(ranks: RankPool, tmp_path: Path, model_type: str) -> None:
    config = tiny_config(families_with_a_plan()[model_type])
    peer = tiny_model(config)
    with torch.no_grad():
        for name, buffer in peer.named_buffers():
            if "correction" in name:
                buffer.normal_(std=0.1)
        expected = peer(input_ids=input_ids()).logits.numpy()
    peer.save_pretrained(tmp_path / "source")
    (alone,) = ranks.run(1, load_train_and_export, str(tmp_path / "source"), str(tmp_path / "1"), 1)
    both = ranks.run(2, load_train_and_export, str(tmp_path / "source"), str(tmp_path / "2"), 2)
    for result in (alone, *both):
        np.testing.assert_allclose(result["logits"], expected, rtol=0, atol=1e-5)
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        np.testing.assert_array_equal(result["routes"], alone["routes"])
        layers = len(result["routes"])
        assert result["routes"].sum() == layers * 2 * (BATCH * LENGTH - 5), "padding counts nowhere"
    for export in ("1", "2"):
        assert differences(read_tensors(tmp_path / export), read_tensors(tmp_path / "source")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("z_loss_coeff", 0.1), ("expert_bias", True), ("capacity_factor", 1.0), ("debug_force_zipf", 1.0)],
)
def test_settings_of_a_router_are_refused_by_name(name: str, value: Any) -> None:
    config = tiny_config(families_with_a_plan()["granitemoe"])
    with torch.device("meta"):
        model = model_class(config)(config)
    with pytest.raises(MoEConfigError, match=f"{name} = .*model.name = generic keeps the family's own"):
        replace_experts(model, config, MoEConfig(**{name: value}))


def test_the_program_in_the_docs_runs(tmp_path: Path) -> None:
    tiny_model(tiny_config(families_with_a_plan()["granitemoe"])).save_pretrained(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (program,) = (block for block in blocks if "replace_experts" in block)
    names: dict[str, Any] = {"folder": tmp_path}
    exec(compile(program, "docs/models.md", "exec"), names)
    assert len(moe_layers(names["model"])) == 2


def test_a_family_without_an_adapter_is_told_of_the_generic_one(tmp_path: Path) -> None:
    tiny_model(tiny_config(families_with_a_plan()["granitemoe"])).save_pretrained(tmp_path)
    told = r"adapters for .*qwen3_moe.*; {} granitemoe"
    with pytest.raises(ModelError, match=told.format("set model.name = generic for")):
        resolve_hf_config(ModelConfig(hf_assets_path=str(tmp_path)))
    with pytest.raises(ConfigError, match=told.format("--family generic takes")):
        find_model(tmp_path)
    assert find_model(tmp_path, "generic").hf_config.model_type == "granitemoe"
