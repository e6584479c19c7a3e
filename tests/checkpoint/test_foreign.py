"""Folders of torch's distributed checkpoint that others wrote: read whatever their names are, and never run."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from crossdock.checkpoint import CheckpointError, HFCheckpoint, open_foreign
from crossdock.config import ConfigError
from crossdock.models import FAMILIES, build_model, materialise
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from crossdock.tools.convert import ConvertOptions, convert, plan_conversion
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.models.tiny_families import SIZES, write_family
from tests.ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder: Path, state: Mapping[str, Any]) -> Path:
    dcp.save(dict(state), storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def converted(source: Path, destination: Path, assets: Path, **options: Any) -> dict[str, Tensor]:
    plan = plan_conversion(source, destination, ConvertOptions(assets=assets, **options))
    convert(plan, lambda line: None)
    return read_tensors(destination) if plan.to == "hf" else {}


def in_memory(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("name", SIZES)
def test_transformers_state_dict_and_its_files_names(tmp_path: Path, name: str) -> None:
    assets = write_family(tmp_path / "hf", name)
    files = read_tensors(assets)
    state = {"model": in_memory(assets), "optimizer": {"state": {"exp_avg": torch.ones(3)}}, "step": 3}
    assert differences(converted(save(tmp_path / "memory", state), tmp_path / "one", assets), files) == []
    source = save(tmp_path / "files", files | {"optim.exp_avg.model.norm.weight": torch.ones(2), "train_state": "a"})
    assert differences(converted(source, tmp_path / "two", assets), files) == []


def save_ours(source: str, folder: str, name: str, ep: int) -> None:
    """As a user of the library saves it: DTensors, each rank its shards."""
    family = FAMILIES[name]
    weights = HFCheckpoint.open(Path(source))
    model = build_model(family, family.hf_config_from(Path(source)), MoEConfig(), torch.float32)
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    materialise(family, model, torch.device("cpu"), weights=weights)
    dcp.save({"model": model.state_dict()}, storage_writer=FileSystemWriter(folder))


@pytest.mark.parametrize(("name", "experts"), [("qwen3", 6), ("gpt_oss", 6), ("deepseek_v3", 8)])
def test_our_own_names_from_two_ranks(ranks: RankPool, tmp_path: Path, name: str, experts: int) -> None:
    key = {"qwen3": "num_experts", "gpt_oss": "num_local_experts"}.get(name, "n_routed_experts")
    assets = write_family(tmp_path / "hf", name, **{key: experts})
    ranks.run(2, save_ours, str(assets), str(tmp_path / "dcp"), name, 2)
    assert differences(converted(tmp_path / "dcp", tmp_path / "back", assets), read_tensors(assets)) == []


def save_sharded(source: str, folder: str) -> None:
    """transformers' state dict, in uneven shards, as FSDP has it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {
        name: distribute_tensor(tensor, mesh, [Shard(tensor.ndim - 1)])
        for name, tensor in in_memory(Path(source)).items()
    }
    dcp.save({"state_dict": tensors}, storage_writer=FileSystemWriter(folder))


def test_shards_of_three_ranks_are_put_together(ranks: RankPool, tmp_path: Path) -> None:
    assets = write_family(tmp_path / "hf", "qwen2")
    ranks.run(3, save_sharded, str(assets), str(tmp_path / "dcp"))
    assert differences(converted(tmp_path / "dcp", tmp_path / "back", assets), read_tensors(assets)) == []


# What torchtitan's adapters say of both families; {} is a layer.
_SHARED = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.gate.weight": "moe.router.gate.weight",
}
TORCHTITAN = {
    "qwen3": _SHARED
    | {f"self_attn.{part}_proj.weight": f"attention.qkv_linear.w{part}.weight" for part in "qkv"}
    | {f"self_attn.{part}_norm.weight": f"attention.{part}_norm.weight" for part in "qk"},
    "deepseek_v3": _SHARED
    | {
        "self_attn.q_a_proj.weight": "attention.wq_a.weight",
        "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
        "self_attn.q_b_proj.weight": "attention.wq_b.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attention.wkv_a.weight",
        "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
        "self_attn.kv_b_proj.weight": "attention.wkv_b.weight",
        "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
        "mlp.shared_experts.gate_proj.weight": "moe.shared_experts.w1.weight",
        "mlp.shared_experts.down_proj.weight": "moe.shared_experts.w2.weight",
        "mlp.shared_experts.up_proj.weight": "moe.shared_experts.w3.weight",
    },
}
_EXPERTS = {"gate_proj": "w1_EFD", "down_proj": "w2_EDF", "up_proj": "w3_EFD"}


def torchtitan_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        if match is None:
            state[TORCHTITAN[name][key]] = tensor
        elif expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)\.weight", match[2]):
            packed = f"layers.{match[1]}.moe.routed_experts.inner_experts.{_EXPERTS[expert[2]]}"
            experts.setdefault(packed, {})[int(expert[1])] = tensor
        else:
            state[f"layers.{match[1]}.{TORCHTITAN[name][match[2]]}"] = tensor
    packs = {key: torch.stack([rows[expert] for expert in range(len(rows))]) for key, rows in experts.items()}
    return state | packs


@pytest.mark.parametrize("name", TORCHTITAN)
def test_torchtitans_names(tmp_path: Path, name: str) -> None:
    assets = write_family(tmp_path / "hf", name)
    files = read_tensors(assets)
    state: dict[str, Any] = torchtitan_state(files, name)
    optimizer = {"optimizer": {"state": {key: {"exp_avg": tensor} for key, tensor in state.items()}}}
    source = save(tmp_path / "dcp", state | optimizer | {"dataloader": {"dp_rank_0": b"0"}, "train_state": {"step": 1}})
    assert differences(converted(source, tmp_path / "one", assets), files) == []
    older = {
        re.sub(r"routed_experts\.inner_experts\.(w\d)_E..", r"experts.\1", key)
        .replace("qkv_linear.", "")
        .replace("expert_bias_E", "expert_bias")
        .replace("lm_head", "output"): tensor
        for key, tensor in state.items()
    }
    assert older.keys() != state.keys()
    assert differences(converted(save(tmp_path / "older", older), tmp_path / "two", assets), files) == []


def test_a_foreign_folder_becomes_a_run(tmp_path: Path) -> None:
    assets = write_family(tmp_path / "hf", "mixtral")
    half = {name: tensor.bfloat16() for name, tensor in in_memory(assets).items()}
    source = save(tmp_path / "dcp", {"app": {"model": half}})
    files = converted(source, tmp_path / "one", assets)
    assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}
    converted(source, tmp_path / "run", assets, to="dcp")
    convert(plan_conversion(tmp_path / "run", tmp_path / "back", ConvertOptions()), lambda line: None)
    assert differences(read_tensors(tmp_path / "back"), files) == []


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("qwen3") / "hf"
    return write_family(folder, "qwen3"), read_tensors(folder)


def without(state: dict[str, Any]) -> None:
    del state["model.layers.2.mlp.experts.3.up_proj.weight"]


def misshapen(state: dict[str, Any]) -> None:
    state["model.layers.2.mlp.gate.weight"] = torch.ones(4, 32)


def unknown(state: dict[str, Any]) -> None:
    state["model.layers.2.mlp.gate.extra"] = torch.ones(2)


def integers(state: dict[str, Any]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)


def nothing_known(state: dict[str, Any]) -> None:
    renamed = {f"net.{name}": tensor for name, tensor in state.items()}
    state.clear()
    state.update(renamed)


def other_packed(state: dict[str, Any]) -> None:
    packed = torchtitan_state(state, "qwen3")
    state.clear()
    state.update({name: tensor[:4] if "w1_EFD" in name else tensor for name, tensor in packed.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, r"Hugging Face's naming fits best, .*1 of .*: model.layers.2.mlp.experts.3.up_proj.weight"),
        (misshapen, r"model.layers.2.mlp.gate.weight has shape \[4, 32\], the model needs \[5, 32\]"),
        (unknown, "model.layers.2.mlp.gate.extra is unexpected"),
        (integers, "lm_head.weight is torch.int8"),
        (nothing_known, r"There are net\.lm_head\.weight, net\.model"),
        (other_packed, r"w1_EFD, which has shape \[4, 16, 32\], not a row for each of 5 experts"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_names_and_shapes_that_do_not_fit(
    qwen3: tuple[Path, dict[str, Tensor]], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    assets, files = qwen3
    state: dict[str, Any] = dict(files)
    change(state)
    source = save(tmp_path / "dcp", state)
    with pytest.raises(ConfigError, match=message):
        plan_conversion(source, tmp_path / "out", ConvertOptions(assets=assets))


class Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "dcp", {"a": torch.ones(3)})
    metadata = FileSystemReader(folder).read_metadata()
    written = tmp_path / "written"
    for harm in (
        Runs(os.system, f"touch {written}"),
        Runs(eval, f"open({str(written)!r}, 'w')"),
        Runs(torch.load, str(folder / "__0_0.distcp")),
    ):
        metadata.planner_data = harm
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=r"names (posix.system|builtins.eval|torch.serialization.load)"):
            open_foreign(folder)
    assert not written.exists()


class _OtherPython(pickle.Pickler):
    """Pickles as Python 3.11.2 does, which looks enumerations up by name."""

    def reducer_override(self, obj: Any) -> Any:  # type: ignore[override]
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_metadata_of_other_pythons(tmp_path: Path) -> None:
    folder = save(tmp_path / "dcp", {"a": torch.ones(3)})
    metadata = FileSystemReader(folder).read_metadata()
    written = io.BytesIO()
    _OtherPython(written, protocol=2, fix_imports=False).dump(metadata)
    # Paths have a module of their own in Python 3.13.
    moved = written.getvalue().replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")
    assert moved != written.getvalue()
    (folder / ".metadata").write_bytes(moved)
    assert torch.equal(open_foreign(folder).read("a"), torch.ones(3))


def test_a_pickle_changes_no_class_of_torchs(tmp_path: Path) -> None:
    folder = save(tmp_path / "dcp", {"a": torch.ones(3)})
    # The class itself, then BUILD with attributes to set on it.
    module = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (folder / ".metadata").write_bytes(b"\x80\x02" + module + b"N}X\x06\x00\x00\x00marked" + b"K\x01s\x86b.")
    with pytest.raises(CheckpointError, match="cannot read"):
        open_foreign(folder)
    assert not hasattr(Metadata, "marked")


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/hostname", "..", ".", "sub/__0_0.distcp", ""])
def test_a_place_outside_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    save(tmp_path / "other", {"a": torch.ones(3)})
    folder = save(tmp_path / "dcp", {"a": torch.ones(3)})
    metadata = FileSystemReader(folder).read_metadata()
    (index, info), *_ = metadata.storage_data.items()
    metadata.storage_data = {index: _StorageInfo(path, info.offset, info.length)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        open_foreign(folder)


def changed(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def beyond(metadata: Metadata) -> None:
    (info,) = metadata.storage_data.values()
    info.offset += 1


def negative(metadata: Metadata) -> None:
    (info,) = metadata.storage_data.values()
    info.offset = -8


def compressed(metadata: Metadata) -> None:
    (info,) = metadata.storage_data.values()
    info.transform_descriptors = ["zstd"]


def nowhere(metadata: Metadata) -> None:
    metadata.storage_data = {MetadataIndex("b", torch.Size([0])): next(iter(metadata.storage_data.values()))}


def too_large(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([4])  # type: ignore[union-attr]


def twice(metadata: Metadata) -> None:
    about: Any = metadata.state_dict_metadata["a"]
    about.chunks = [ChunkStorageMetadata(torch.Size([start]), torch.Size([2])) for start in (0, 1)]


def shared(metadata: Metadata) -> None:
    place = next(iter(metadata.storage_data.values()))
    metadata.storage_data = {MetadataIndex(name, torch.Size([0])): place for name in ("a", "b")}
    metadata.state_dict_metadata["b"] = metadata.state_dict_metadata["a"]


def no_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata = {"a": metadata.storage_data}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (beyond, "cut off: a reaches beyond"),
        (negative, "sizes are"),
        (compressed, "zstd"),
        (nowhere, "a has a piece at .* in no file"),
        (too_large, "a has a piece from"),
        (twice, "a has pieces that lie over each other"),
        (shared, "b and a share bytes of"),
        (no_dtype, "where TensorStorageMetadata should be"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_metadata_that_cannot_be_true(tmp_path: Path, change: Callable[[Metadata], None], message: str) -> None:
    folder = save(tmp_path / "dcp", {"a": torch.ones(3)})
    assert torch.equal(open_foreign(folder).read("a"), torch.ones(3))
    changed(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_foreign(folder)


def test_a_checkpoint_with_a_piece_missing_is_not_whole(qwen3: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    assets, files = qwen3
    folder = save(tmp_path / "dcp", files)

    def halved(metadata: Metadata) -> None:
        about: Any = metadata.state_dict_metadata["lm_head.weight"]
        about.chunks[0].sizes = torch.Size([32, 32])

    changed(folder, halved)
    with pytest.raises(ConfigError, match=r"lm_head.weight is not whole: .* hold 1024 of 2048 values"):
        plan_conversion(folder, tmp_path / "out", ConvertOptions(assets=assets))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1]), pickle.dumps({"a": torch.float32})])
def test_metadata_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        open_foreign(tmp_path)


def test_a_missing_or_damaged_file_is_named(qwen3: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    assets, files = qwen3
    folder = save(tmp_path / "dcp", files)
    (data,) = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"__0_0.distcp is cut off"):
        plan_conversion(folder, tmp_path / "out", ConvertOptions(assets=assets))
    data.write_bytes(bytes(len(whole)))
    plan = plan_conversion(folder, tmp_path / "out", ConvertOptions(assets=assets))
    with pytest.raises(CheckpointError, match=r"cannot read .* in "):
        convert(plan, lambda line: None)
    data.unlink()
    with pytest.raises(ConfigError, match=r"__0_0.distcp, which holds .*, is missing"):
        plan_conversion(folder, tmp_path / "out", ConvertOptions(assets=assets))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]
