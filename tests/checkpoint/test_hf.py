"""Hugging Face weights in and out: bit-equal on every layout, the same logits, each rank its own part."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen3MoeConfig

from crossdock.checkpoint import CheckpointError, HFCheckpoint, hf_files, hf_writing
from crossdock.models import FAMILIES, build_model, export_hf, materialise, write_assets
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.checkpoint.hf_folders import differences, mixed, read_tensors, snapshot, write_shards
from tests.models.oracle import qwen3_logits
from tests.ranks import RankPool
from tests.tiny import write_hf_model

FAMILY = FAMILIES["qwen3"]
# Nine experts divide over no layout; the second layer is dense.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
    "eos_token_id": 0,
}
SHARD_BYTES = 30_000
HEADER_BYTES = 10_000
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide` is fp32; `single` and `shards` have mixed dtypes; `tied` and `tied_twice` share embeddings."""
    folder = tmp_path_factory.mktemp("hf")
    wide = write_hf_model(folder / "wide", **SIZES)
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [0, 7]}
    (wide / "generation_config.json").write_text(json.dumps(generation))
    for name, shards in (("single", 1), ("shards", 5)):
        shutil.copytree(wide, folder / name)
        write_shards(folder / name, mixed(read_tensors(wide)), shards)
    tied = write_hf_model(folder / "tied", **SIZES, tie_word_embeddings=True)
    shutil.copytree(tied, folder / "tied_twice")
    tensors = read_tensors(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_shards(folder / "tied_twice", tensors, 2)
    return folder


def _input_ids() -> torch.Tensor:
    return torch.randint(260, (2, 24), generator=torch.Generator().manual_seed(0))


def _load(
    source: Path, ep: int, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", experts: Any = "grouped_mm"
) -> tuple[PreTrainedModel, HFCheckpoint]:
    """The model in `source` on this rank's process group."""
    weights = HFCheckpoint.open(source)
    hf_config = FAMILY.hf_config_from(source)
    model = build_model(FAMILY, hf_config, MoEConfig(experts=experts), dtype, attn_implementation=attention)
    weights.check(model, FAMILY.hf_keys)
    assert all(parameter.is_meta for parameter in model.parameters()), "checking took memory"
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    materialise(FAMILY, model, torch.device("cpu"), weights=weights)
    return model.eval(), weights


@torch.no_grad()
def _logits(model: PreTrainedModel) -> np.ndarray:
    return model(input_ids=_input_ids()).logits.numpy()


def _export(model: PreTrainedModel, weights: HFCheckpoint, destination: Path, **options: Any) -> None:
    source, assets = weights.folder, destination.with_name(f"{destination.name}-assets")
    if dist.get_rank() == 0:
        write_assets(assets, model, source / "tokenizer.json", 0, source, weights)
    dist.barrier()
    export_hf(model, FAMILY.hf_keys, assets, destination, **options)


def load_and_export(folder: str, exports: str, ep: int, sources: list[str]) -> dict[str, np.ndarray]:
    """Load each source, compute, export it below `exports`; the logits."""
    logits = {}
    for source in sources:
        model, weights = _load(Path(folder, source), ep)
        logits[source] = _logits(model)
        options = {"max_shard_bytes": SHARD_BYTES} if source == "shards" else {}
        _export(model, weights, Path(exports, source), **options)
    return logits


def _transformers_logits(folder: Path, **options: Any) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return _logits(model)


@pytest.mark.parametrize(("world_size", "ep"), LAYOUTS)
def test_load_then_save_is_bit_equal_and_the_same_model(
    ranks: RankPool, folders: Path, tmp_path: Path, world_size: int, ep: int
) -> None:
    results = ranks.run(world_size, load_and_export, str(folders), str(tmp_path), ep, ["single", "shards"])
    expected = _transformers_logits(folders / "single")
    for source in ("single", "shards"):
        original, exported = read_tensors(folders / source), read_tensors(tmp_path / source)
        assert Counter(str(tensor.dtype) for tensor in original.values()) == {"torch.bfloat16": 84, "torch.float32": 2}
        assert differences(exported, original) == []
        for result in results:
            np.testing.assert_allclose(result[source], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(_transformers_logits(tmp_path / source), expected, rtol=0, atol=1e-5)
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) >= 4, "too few files to say anything"
    assert all(path.stat().st_size <= SHARD_BYTES + HEADER_BYTES for path in files)


def test_tied_embeddings_in_both_forms(ranks: RankPool, folders: Path, tmp_path: Path) -> None:
    expected = _transformers_logits(folders / "tied")
    original = read_tensors(folders / "tied")
    for world_size, ep in ((1, 1), (2, 2)):
        exports = tmp_path / str(world_size)
        for result in ranks.run(world_size, load_and_export, str(folders), str(exports), ep, ["tied", "tied_twice"]):
            for source in ("tied", "tied_twice"):
                np.testing.assert_allclose(result[source], expected, rtol=0, atol=1e-5)
        for source in ("tied", "tied_twice"):
            assert differences(read_tensors(exports / source), original) == []
            np.testing.assert_allclose(_transformers_logits(exports / source), expected, rtol=0, atol=1e-5)


def logits_of(folder: str, ep: int, dtype: str, attention: str) -> np.ndarray:
    experts = "eager" if dtype == "float64" else "grouped_mm"
    return _logits(_load(Path(folder), ep, dtype=getattr(torch, dtype), attention=attention, experts=experts)[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_those_of_transformers(ranks: RankPool, folders: Path, attention: str) -> None:
    expected = _transformers_logits(folders / "wide", attn_implementation=attention)
    for world_size, ep in ((1, 1), (2, 2)):
        for logits in ranks.run(world_size, logits_of, str(folders / "wide"), ep, "float32", attention):
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float64_logits_equal_an_independent_reference(ranks: RankPool, folders: Path, attention: str) -> None:
    config = Qwen3MoeConfig.from_pretrained(folders / "shards")
    expected = qwen3_logits(read_tensors(folders / "shards"), config, _input_ids()).numpy()
    for world_size, ep in ((1, 1), (2, 2)):
        for logits in ranks.run(world_size, logits_of, str(folders / "shards"), ep, "float64", attention):
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


class CountingSlice:
    """A tensor in a file, which counts the values that are taken from it."""

    def __init__(self, stored: Any, name: str, counts: Counter[str]) -> None:
        self.stored, self.name, self.counts = stored, name, counts

    def __getitem__(self, slices: Any) -> Any:
        values = self.stored[slices]
        self.counts[self.name] += values.numel()
        return values


class CountingFile:
    """A safetensors file that can only be read slice by slice."""

    def __init__(self, counts: Counter[str], path: Path, framework: str) -> None:
        self.counts = counts
        self.file = safe_open(path, framework)

    def __enter__(self) -> CountingFile:
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.__exit__(*_)

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self.opened.get_slice(name), name, self.counts)


def values_read(source: str, ep: int) -> tuple[dict[str, int], dict[str, int]]:
    """How many values of each tensor this rank has read; and of each parameter, how many it holds."""
    counts: Counter[str] = Counter()
    with mock.patch.object(hf_files, "safe_open", partial(CountingFile, counts)):
        model, _ = _load(Path(source), ep)
    held = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held[name] = local.numel()
    for name, layer in moe_layers(model).items():
        for part in ("gate_and_up_projs", "down_projs"):
            held[f"{name}.experts.{part}"] -= (
                held[f"{name}.experts.{part}"] * layer.local_expert_ids.count(-1) // len(layer.local_expert_ids)
            )
    return dict(counts), held


@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 2), (4, 1)])
def test_each_rank_reads_the_values_that_it_holds_and_each_is_read_once(
    ranks: RankPool, folders: Path, world_size: int, ep: int
) -> None:
    results = ranks.run(world_size, values_read, str(folders / "shards"), ep)
    everything: Counter[str] = Counter()
    for read, held in results:
        experts = sum(count for name, count in read.items() if ".experts." in name)
        assert experts == sum(count for name, count in held.items() if ".experts." in name)
        assert sum(read.values()) - experts == sum(count for name, count in held.items() if ".experts." not in name)
        everything.update(read)
    assert everything == {name: tensor.numel() for name, tensor in read_tensors(folders / "shards").items()}


@torch.no_grad()
def experts_over_garbage(source: str, ep: int) -> list[tuple[int, float]]:
    """Load over NaN; for each of this rank's slots of a layer, its expert and its largest weight."""
    model, weights = _load(Path(source), ep)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    weights.load(model, FAMILY.hf_keys)
    assert all(parameter.to_local().isfinite().all() for parameter in model.parameters())  # type: ignore[attr-defined]
    layer = next(iter(moe_layers(model).values()))
    down: Any = layer.experts.down_projs
    largest = down.to_local().abs().amax((1, 2)).tolist()
    return list(zip(layer.local_expert_ids, largest, strict=True))


def test_slots_without_an_expert_are_zero(ranks: RankPool, folders: Path) -> None:
    slots = [slot for result in ranks.run(4, experts_over_garbage, str(folders / "wide"), 4) for slot in result]
    assert sorted(expert for expert, _ in slots) == [-1, -1, -1, *range(9)]
    assert all((largest == 0) == (expert == -1) for expert, largest in slots)


def load_what_vanishes(folder: str, unlucky_rank: int) -> str:
    """Load, where one rank does not find the files any more that all have checked; the message."""
    error = OSError("gone since it was checked")
    vanished = mock.patch.object(hf_files, "safe_open", side_effect=error) if dist.get_rank() == unlucky_rank else None
    weights = HFCheckpoint.open(Path(folder))
    model = build_model(FAMILY, FAMILY.hf_config_from(Path(folder)), MoEConfig(), torch.float32)
    parallelize(model, ParallelDims(dist.get_world_size(), ep=2).build_mesh("cpu"))
    try:
        with vanished or nullcontext():
            materialise(FAMILY, model, torch.device("cpu"), weights=weights)
    except CheckpointError as caught:
        return str(caught)
    return "no error"


def test_a_rank_that_cannot_read_ends_all(ranks: RankPool, folders: Path) -> None:
    for unlucky_rank in (0, 1):
        for message in ranks.run(2, load_what_vanishes, str(folders / "shards"), unlucky_rank):
            assert "gone since it was checked" in message
            assert str(folders / "shards") in message


def export_in_many_ways(folder: str, exports: str) -> dict[str, Any]:
    """Exports that work and exports that fail; of those that fail, the message."""
    model, weights = _load(Path(folder, "single"), 2)
    for dtype in ("float32", "bfloat16", "float16"):
        _export(model, weights, Path(exports, dtype), dtype=dtype)
    if dist.get_rank() == 0:
        leftover = Path(exports, ".good.partial")
        leftover.mkdir()
        (leftover / "model-00077-of-00077.safetensors").write_bytes(b"half of")
    dist.barrier()
    _export(model, weights, Path(exports, "good"))
    before = snapshot(Path(exports, "good"))

    def refused(destination: str, **options: Any) -> str:
        try:
            _export(model, weights, Path(exports, destination), **options)
        except CheckpointError as error:
            return str(error)
        return "no error"

    def break_on(broken_rank: int) -> Any:
        error = OSError(28, "No space left on device")
        broken = mock.patch.object(hf_writing, "open", create=True, side_effect=error)
        return broken if dist.get_rank() == broken_rank else nullcontext()

    outcome: dict[str, Any] = {"exists": refused("good")}
    for rank in (0, 1):
        with break_on(rank):
            outcome[f"rank {rank} breaks off"] = refused(f"broken{rank}")
            outcome[f"rank {rank} breaks off replacing"] = refused("good", replace=True)

    def rename(path: Path, target: Path) -> None:
        if target.name == "unnamed":
            raise OSError("no rename today")
        os.rename(path, target)

    with mock.patch.object(Path, "rename", rename):
        outcome["rename fails"] = refused("unnamed")
    outcome["untouched"] = snapshot(Path(exports, "good")) == before
    outcome["replaced"] = refused("good", dtype="float32", replace=True)
    return outcome


def test_export_is_whole_or_absent(ranks: RankPool, folders: Path, tmp_path: Path) -> None:
    original = read_tensors(folders / "single")
    for outcome in ranks.run(2, export_in_many_ways, str(folders), str(tmp_path)):
        assert str(tmp_path / "good") in outcome.pop("exists")
        assert outcome.pop("untouched")
        assert outcome.pop("replaced") == "no error"
        assert "no rename today" in outcome.pop("rename fails")
        assert outcome.keys() == {f"rank {rank} breaks off{how}" for rank in (0, 1) for how in ("", " replacing")}
        assert all("No space left on device" in message for message in outcome.values())
    whole = {"float32", "bfloat16", "float16", "good"}
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} - whole == {
        f"{name}-assets" for name in (*whole, "broken0", "broken1", "unnamed")
    }
    for name in ("float32", "bfloat16", "float16"):
        exported = read_tensors(tmp_path / name)
        dtype = getattr(torch, name)
        assert differences(exported, {key: tensor.to(dtype) for key, tensor in original.items()}) == []
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype == dtype
    assert differences(read_tensors(tmp_path / "good"), read_tensors(tmp_path / "float32")) == []


def test_everything_around_the_weights_comes_along(ranks: RankPool, folders: Path, tmp_path: Path) -> None:
    (folders / "single" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    try:
        ranks.run(1, load_and_export, str(folders), str(tmp_path), 1, ["single"])
    finally:
        (folders / "single" / "chat_template.jinja").unlink()
    exported = tmp_path / "single"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "Über 99 % — naïve ☕ tokens<|endoftext|>"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(folders / "single")(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.6, 20, 0.95)
    assert generation.eos_token_id == [0, 7]
    ours, theirs = (Qwen3MoeConfig.from_pretrained(folder).to_dict() for folder in (exported, folders / "single"))
    same = theirs.keys() - {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours["architectures"] == ["Qwen3MoeForCausalLM"]
    assert not list(exported.glob("tensor_dtypes*")), "a file that nobody knows"
