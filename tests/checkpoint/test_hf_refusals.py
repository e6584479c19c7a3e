"""Hugging Face weights that do not fit are refused by name, before memory is taken or anything is written."""

from __future__ import annotations

import json
import re
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import crossdock.train.launch as launch
from crossdock.config import load_config, write_run_settings
from tests.checkpoint.hf_folders import INDEX, SINGLE, mixed, read_tensors, snapshot, write_shards
from tests.test_cli import call, panels
from tests.tiny import write_hf_model

SIZES = {"num_hidden_layers": 2, "mlp_only_layers": [0], "num_experts": 5}
EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
DENSE = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def _no_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before ranks are started, on a machine without GPUs."""
    monkeypatch.setattr(launch, "start_ranks", lambda *arguments: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("COLUMNS", "2000")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files with an index, bfloat16 with fp32 routers."""
    folder = write_hf_model(tmp_path_factory.mktemp("whole"), **SIZES)
    write_shards(folder, mixed(read_tensors(folder)), 3)
    return folder


def _edit(name: str, change: Callable[[torch.Tensor], torch.Tensor | None], new_name: str = "") -> Callable[..., None]:
    """A damage: one tensor changed, renamed, or (where `change` gives `None`) left out; the index says so."""

    def damage(folder: Path) -> None:
        tensors = read_tensors(folder)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[new_name or name] = changed.contiguous()
        write_shards(folder, tensors, 3)

    return damage


def _file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def _edit_header(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
    """A damage: what a file's header says of a tensor; its data stay."""

    def damage(folder: Path) -> None:
        path = _file_of(folder, name)
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header[name])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def _edit_bytes(change: Callable[[bytes], bytes]) -> Callable[..., None]:
    def damage(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def _edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def _cut_last_tensor(folder: Path) -> None:
    """End the file of `EXPERT` one byte early; its last tensor is named."""
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _put_in_two_files(folder: Path) -> None:
    tensors = read_tensors(folder)
    write_shards(folder, tensors, 3)
    path = _file_of(folder, "lm_head.weight")
    index = json.loads((folder / INDEX).read_text())
    other = next(name for name in sorted(set(index["weight_map"].values())) if name != path.name)
    held = {name: tensors[name] for name, file in index["weight_map"].items() if file == other}
    save_file(held | {"lm_head.weight": tensors["lm_head.weight"]}, folder / other)


def _without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def _fused(folder: Path) -> None:
    """Experts in one tensor, as other families have them."""
    tensors = read_tensors(folder)
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(5)]
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack([tensors.pop(name) for name in names])
    write_shards(folder, tensors, 1)


# Each damages a folder; the expressions are all searched in the message.
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a missing expert": (_edit(EXPERT, lambda tensor: None), [f"{EXPERT} is missing"]),
    "a missing router": (_edit(ROUTER, lambda tensor: None), [f"{ROUTER} is missing"]),
    "an extra expert": (
        _edit(EXPERT, lambda tensor: tensor, EXPERT.replace("4", "5")),
        [f"{EXPERT} is missing", f"{EXPERT.replace('4', '5')} is unexpected"],
    ),
    "an extra bias": (
        _edit("lm_head.weight", lambda tensor: tensor[:, 0], "lm_head.bias"),
        ["lm_head.bias is unexpected", "lm_head.weight is missing"],
    ),
    "transposed": (
        _edit(EXPERT, lambda tensor: tensor.T),
        [rf"{EXPERT} has shape \[32, 16\], the model needs \[16, 32\]"],
    ),
    "one row short": (
        _edit("model.embed_tokens.weight", lambda tensor: tensor[1:]),
        [r"model\.embed_tokens\.weight has shape \[259, 32\], the model needs \[260, 32\]"],
    ),
    "one dimension more": (_edit(DENSE, lambda tensor: tensor[None]), [rf"{DENSE} has shape \[1, 32, 48\]"]),
    "eight bits": (_edit(EXPERT, lambda tensor: tensor.to(torch.float8_e4m3fn)), [f"{EXPERT} is F8_E4M3; F64, F32"]),
    "integers": (_edit(ROUTER, lambda tensor: tensor.long()), [f"{ROUTER} is I64; F64, F32, F16, BF16 can be read"]),
    "experts in one tensor": (
        _fused,
        [r"experts\.0\.down_proj\.weight is missing", r"experts\.down_proj is unexpected"],
    ),
    "a cut file": (_cut_last_tensor, [r"model-00002-of-00003\.safetensors is cut off: \S+weight reach beyond its end"]),
    "a file cut in half": (
        _edit_bytes(lambda raw: raw[: len(raw) // 2]),
        [r"model-00002-of-00003\.safetensors is cut off: (\S+weight,? ?){8} and \d+ more reach beyond its end"],
    ),
    "a file cut in its header": (_edit_bytes(lambda raw: raw[:100]), [r"model-00002-of-00003\.safetensors is no "]),
    "an empty file": (_edit_bytes(lambda raw: b""), [r"model-00002-of-00003\.safetensors is no safetensors file"]),
    "a file of another kind": (_edit_bytes(lambda raw: b"PK\3\4" + raw), [r"model-00002-of-00003\.safetensors is no "]),
    "a header that claims a long one": (
        _edit_bytes(lambda raw: struct.pack("<Q", 2**62) + raw[8:]),
        [r"model-00002-of-00003\.safetensors is no safetensors file"],
    ),
    "bytes too many": (_edit_bytes(lambda raw: raw + b"\0"), [r"model-00002-of-00003\.safetensors is .*damaged"]),
    "fewer bytes than the shape needs": (
        _edit_header(EXPERT, lambda about: about["data_offsets"].__setitem__(1, about["data_offsets"][1] - 2)),
        [rf"is damaged: its header gives {EXPERT} another size"],
    ),
    "more values than bytes": (
        _edit_header(EXPERT, lambda about: about.update(dtype="F32")),
        [rf"is damaged: its header gives {EXPERT} another size"],
    ),
    "a file that the index names is missing": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        [r"cannot read \S+model-00002-of-00003\.safetensors: No such file"],
    ),
    "a tensor in two files": (_put_in_two_files, [r"lm_head\.weight is in model-0000\d\S+ and in model-0000\d"]),
    "an index that names another file": (
        _edit_index(lambda index: index["weight_map"].update({EXPERT: "model-00001-of-00003.safetensors"})),
        [f"says that {EXPERT} is in model-00001-of-00003.safetensors, where it is not"],
    ),
    "an index that names what no file has": (
        _edit_index(lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors")),
        ["says that ghost is in model-00001-of-00003.safetensors, where it is not"],
    ),
    "an index that leads elsewhere": (
        _edit_index(lambda index: index["weight_map"].update({EXPERT: "../secret.safetensors"})),
        [rf"{re.escape(EXPERT)} is in '../secret.safetensors'; it must be the name of a file in the same folder"],
    ),
    "an index that leads to the root": (
        _edit_index(lambda index: index["weight_map"].update({EXPERT: "/secret.safetensors"})),
        ["it must be the name of a file in the same folder"],
    ),
    "an index that leads to the folder above": (
        _edit_index(lambda index: index["weight_map"].update({EXPERT: ".."})),
        [r"is in .\.\..; it must be the name of a file in the same folder"],
    ),
    "files without their index": (
        lambda folder: (folder / INDEX).unlink(),
        [f"holds no weights: neither {INDEX} nor {SINGLE}"],
    ),
    "an index that was not written to its end": (
        lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:200]),
        [rf"{INDEX} .*weight_map"],
    ),
    "the first of its files alone": (
        lambda folder: [(folder / f"model-0000{number}-of-00003.safetensors").unlink() for number in (2, 3)],
        [r"cannot read \S+model-0000[23]-of-00003\.safetensors: No such file"],
    ),
    "an index without a map": (_edit_index(lambda index: index.pop("weight_map")), ["must hold a weight_map"]),
    "an index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), [rf"{INDEX} .*weight_map"]),
    "no weights": (_without_weights, [rf"holds no weights: neither {INDEX} nor {SINGLE}"]),
}


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A run folder that was laid out and has no checkpoint yet, so that its weights are still to be loaded."""
    settings = ["--model.hf-assets-path", str(tmp_path / "damaged"), "--job.dump-folder", str(tmp_path / "run")]
    config = load_config(None, [*settings, "--training.seq-len", "32", "--checkpoint.initial-load-in-hf"])
    (tmp_path / "run" / "hf_assets").mkdir(parents=True)
    write_run_settings(config, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "hf_assets" / "config.json").write_text("{}")
    shutil.copytree(whole, tmp_path / "damaged")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_nothing_is_touched(
    run: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expressions = DAMAGES[damage]
    make(tmp_path / "damaged")
    before = snapshot(tmp_path)
    for arguments, field in (
        (f"train --job.dump-folder {run}", "model.hf_assets_path"),
        (f"config --job.dump-folder {run} --checkpoint.initial-load-path damaged", "checkpoint.initial_load_path"),
        (f"generate {tmp_path / 'damaged'} --prompt Hello", "model"),
    ):
        assert call(arguments) == 2
        output, message = capsys.readouterr()
        assert output == ""
        assert panels(message) == 1
        assert "Traceback" not in message
        assert f"{field} = '{tmp_path / 'damaged'}'" in message
        for expression in expressions:
            assert re.search(expression, message), message
    assert snapshot(tmp_path) == before


def test_the_undamaged_folder_starts_ranks(run: Path, tmp_path: Path) -> None:
    assert call(f"train --job.dump-folder {run}") == 0
    assert call(f"generate {tmp_path / 'damaged'} --prompt Hello") == 0


def test_weights_that_nobody_needs_are_not_refused(run: Path, tmp_path: Path) -> None:
    tensors = read_tensors(tmp_path / "damaged")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_shards(tmp_path / "damaged", tensors, 2)
    assert call(f"train --job.dump-folder {run}") == 0


def test_many_problems_are_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = read_tensors(tmp_path / "damaged")
    write_shards(tmp_path / "damaged", {f"another.{name}": tensor for name, tensor in tensors.items()}, 2)
    assert call(f"train --job.dump-folder {run}") == 2
    message = " ".join(capsys.readouterr().err.split())
    named = message.count(" is missing")
    assert 5 <= named <= 10
    assert f"and {2 * len(tensors) - named} more" in message


def test_a_model_larger_than_memory_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 8192, "moe_intermediate_size": 8192, "num_hidden_layers": 1, "num_experts": 512}
    folder = tmp_path / "huge"
    write_hf_model(folder, num_hidden_layers=1, num_experts=1, num_experts_per_tok=1)
    config = json.loads((folder / "config.json").read_text())
    config.pop("num_local_experts", None)
    (folder / "config.json").write_text(json.dumps(config | sizes | {"num_experts_per_tok": 8}))
    shapes = {
        "model.embed_tokens.weight": [260, 8192],
        "lm_head.weight": [260, 8192],
        "model.norm.weight": [8192],
        "model.layers.0.input_layernorm.weight": [8192],
        "model.layers.0.post_attention_layernorm.weight": [8192],
        "model.layers.0.self_attn.q_proj.weight": [32, 8192],
        "model.layers.0.self_attn.k_proj.weight": [16, 8192],
        "model.layers.0.self_attn.v_proj.weight": [16, 8192],
        "model.layers.0.self_attn.o_proj.weight": [8192, 32],
        "model.layers.0.self_attn.q_norm.weight": [16],
        "model.layers.0.self_attn.k_norm.weight": [16],
        "model.layers.0.mlp.gate.weight": [512, 8192],
    }
    for expert in range(512):
        for kind in ("gate", "up", "down"):
            shapes[f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"] = [8192, 8192]
    lacking = "model.layers.0.mlp.experts.300.up_proj.weight"
    for name, complete in (("complete", True), ("lacking", False)):
        if not complete:
            shapes.pop(lacking)
        header, end = {}, 0
        for tensor, shape in shapes.items():
            first, end = end, end + 2 * torch.Size(shape).numel()
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
        text = json.dumps(header).encode()
        with open(folder / SINGLE, "wb") as file:  # All of it a hole, that takes no room.
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        assert end > 150 * 2**30
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        arguments = f"train --model.hf-assets-path {folder} --training.seq-len 32 --checkpoint.initial-load-in-hf"
        assert call(f"{arguments} --job.dump-folder {tmp_path / name}") == (0 if complete else 2)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert taken < 100 * 2**10, "KiB were taken"
    assert f"{lacking} is missing" in capsys.readouterr().err
    assert not (tmp_path / "lacking").exists()
