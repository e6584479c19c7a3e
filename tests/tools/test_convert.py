"""`crossdock convert`: the same bits whatever way they go, in little memory, and nothing written for a mistake."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from crossdock.checkpoint import CheckpointError, dcp_streaming, write_checksums
from crossdock.config import ConfigError, load_config, validate
from crossdock.tools.convert import ConvertOptions, convert, plan_conversion
from crossdock.tools.opening import find_model, open_model
from tests.checkpoint.hf_folders import differences, mixed, read_tensors, snapshot, write_shards
from tests.models.tiny_families import SIZES, write_family
from tests.models.tiny_generic import families_with_a_plan, tiny_config, tiny_model
from tests.ranks import RankPool
from tests.test_cli import call, panels
from tests.tiny import run_trainer, write_assets, write_hf_model


def converted(source: Path, destination: Path, **options: Any) -> Path:
    convert(plan_conversion(source, destination, ConvertOptions(**options)), lambda line: None)
    return destination


def input_ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def logits_of(folder: Path) -> np.ndarray:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()(input_ids=input_ids()).logits.numpy()


def opened_logits(folders: list[str]) -> list[np.ndarray]:
    """Of models that the trainer's own code opens on the ranks there are."""
    with torch.no_grad():
        models = [open_model(find_model(Path(folder)), torch.device("cpu")) for folder in folders]
        return [model(input_ids=input_ids()).logits.numpy() for model in models]


@pytest.fixture(scope="module")
def families(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of every family, a folder that transformers saved, and the run folder it was converted to."""
    folder = tmp_path_factory.mktemp("families")
    pairs = {}
    for name in SIZES:
        source = write_family(folder / name, name)
        write_shards(source, mixed(read_tensors(source)), shards=3)
        pairs[name] = source, converted(source, folder / f"{name}-run")
    return pairs


@pytest.mark.parametrize("name", SIZES)
def test_hugging_face_to_dcp_and_back_gives_the_same_bits(
    families: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    source, run = families[name]
    back = converted(run, tmp_path / "back")
    assert differences(read_tensors(back), read_tensors(source)) == []
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (back, source))
    of_the_file = {"dtype": None, "_name_or_path": None}
    assert ours | of_the_file == theirs | of_the_file
    AutoModelForCausalLM.from_pretrained(back)


def test_a_converted_run_is_opened_on_two_ranks(families: dict[str, tuple[Path, Path]], ranks: RankPool) -> None:
    names = ["deepseek_v3", "gpt_oss"]
    results = ranks.run(2, opened_logits, [str(families[name][1]) for name in names])
    for index, name in enumerate(names):
        for result in results:
            np.testing.assert_allclose(result[index], logits_of(families[name][0]), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", ["1", "20000", "10000000"])
def test_files_have_the_size_that_was_asked_for(
    families: dict[str, tuple[Path, Path]], tmp_path: Path, size: str
) -> None:
    source, run = families["deepseek_v3"]
    back = converted(run, tmp_path / "back", max_shard_bytes=int(size))
    tensors = read_tensors(back)
    assert differences(tensors, read_tensors(source)) == []
    files = sorted(back.glob("*.safetensors"))
    total = sum(tensor.nbytes for tensor in tensors.values())
    if size == "1":
        assert len(files) == len(tensors)
    else:
        assert total / int(size) <= len(files) <= 2 * total / int(size) + 1
    largest = max(tensor.nbytes for tensor in tensors.values())
    for path in files:
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header <= max(int(size), largest)


def test_float64_stays_float64(tmp_path: Path) -> None:
    source = write_family(tmp_path / "hf", "qwen3")
    tensors = {name: tensor.double() / 3 for name, tensor in read_tensors(source).items()}
    write_shards(source, tensors, shards=1)
    back = converted(converted(source, tmp_path / "run"), tmp_path / "back")
    assert differences(read_tensors(back), tensors) == []


def test_a_run_gives_what_its_export_gave(ranks: RankPool, tmp_path: Path) -> None:
    assets = write_hf_model(tmp_path / "assets")
    write_shards(assets, mixed(read_tensors(assets)), shards=1)
    steps = ["--training.steps", "1", "--checkpoint.initial-load-in-hf"]
    ranks.run(2, run_trainer, str(assets), str(tmp_path / "run"), str(tmp_path / "cache"), steps)
    theirs = read_tensors(tmp_path / "run" / "hf")
    assert differences(read_tensors(converted(tmp_path / "run", tmp_path / "one")), theirs) == []
    step = tmp_path / "run" / "checkpoint" / "step-00000001"
    half = read_tensors(converted(step, tmp_path / "two", dtype="float16"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "run" / "hf" / name).read_bytes()


def test_training_starts_from_a_converted_run_and_does_not_resume_it(ranks: RankPool, tmp_path: Path) -> None:
    assets = write_hf_model(tmp_path / "assets", seed=3)
    run = converted(assets, tmp_path / "converted")
    steps = ["--training.steps", "1", "--optimizer.lr", "0"]
    start = [*steps, "--checkpoint.initial-load-path", str(run)]
    ranks.run(2, run_trainer, str(assets), str(tmp_path / "run"), str(tmp_path / "cache"), start)
    assert differences(read_tensors(tmp_path / "run" / "hf"), read_tensors(assets)) == []
    with pytest.raises(ConfigError, match="initial_load_path"):
        validate(load_config(None, ["--job.dump-folder", str(run)]), 1)
    config = load_config(run / "config.toml")
    assert config.initial_weights == str(run)
    assert config.model.hf_assets_path == str(run / "hf_assets")


def peak_of_anonymous_memory(source: str, destination: str, file_bytes: int) -> int:
    """How far it rises, in bytes, while `source` is converted to a run and that to Hugging Face's format."""
    before = dcp_streaming._FILE_BYTES
    dcp_streaming._FILE_BYTES = file_bytes
    highest, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    base = anonymous_bytes()
    sampler.start()
    try:
        converted(Path(source), Path(destination))
        converted(Path(destination), Path(f"{destination}-back"), max_shard_bytes=10 * file_bytes)
    finally:
        done.set()
        sampler.join()
        dcp_streaming._FILE_BYTES = before
    return highest[0] - base


def anonymous_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def write_large(folder: Path) -> int:
    """A Qwen3-MoE, random, of some 400 MB; returns its size."""
    write_assets(
        folder,
        hidden_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_experts=32,
    )
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            for expert in range(32):
                for part in ("gate", "up"):
                    key = name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")
                    tensors[key] = torch.full((512, 512), float(expert))
        elif name.endswith("down_proj"):
            for expert in range(32):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = torch.full((512, 512), -expert / 2)
        else:
            tensors[name] = torch.ones(parameter.shape)
    write_shards(folder, tensors, shards=4)
    return sum(tensor.nbytes for tensor in tensors.values())


def test_it_takes_the_memory_of_a_few_files(tmp_path: Path) -> None:
    size = write_large(tmp_path / "hf")
    assert size > 400e6
    file_bytes = 16 * 2**20
    fresh = RankPool()  # A process that has done other work has memory to spare that it has not given back.
    try:
        (peak,) = fresh.run(1, peak_of_anonymous_memory, str(tmp_path / "hf"), str(tmp_path / "run"), file_bytes)
    finally:
        fresh.close()
    assert peak < 3 * file_bytes + 24e6, f"{peak / 1e6:.0f} MB"
    assert differences(read_tensors(tmp_path / "run-back"), read_tensors(tmp_path / "hf")) == []


DENSE: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "mistral": {"sliding_window": 4, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "attention_bias": True},
}


def write_dense(folder: Path, model_type: str, **overrides: Any) -> Path:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes | DENSE[model_type] | overrides))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("top_k", [1, 3])
def test_an_upcycled_model_has_the_dense_ones_logits(tmp_path: Path, model_type: str, top_k: int) -> None:
    dense = write_dense(tmp_path / "dense", model_type)
    moe = converted(dense, tmp_path / "moe", upcycle=(5, top_k), seed=1)
    np.testing.assert_allclose(logits_of(moe), logits_of(dense), rtol=0, atol=1e-5)
    config = AutoConfig.from_pretrained(moe)
    assert config.num_local_experts == 5
    assert config.num_experts_per_tok == top_k
    assert [name.lower() for name in config.architectures or ()] == [config.model_type.replace("_", "") + "forcausallm"]
    routers = [tensor for name, tensor in read_tensors(moe).items() if name.endswith(".gate.weight")]
    assert [router.shape for router in routers] == [(5, 32)] * 2
    assert not torch.equal(*routers)
    assert float(torch.stack(routers).std()) == pytest.approx(0.1, rel=0.2)


def test_upcycled_routers_depend_on_the_seed_alone(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen3")
    one, two, other = (
        read_tensors(converted(dense, tmp_path / name, upcycle=(4, 2), seed=seed))
        for name, seed in (("one", 7), ("two", 7), ("other", 8))
    )
    assert differences(one, two) == []
    assert set(differences(one, other)) == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}


def test_an_upcycled_run_folder_is_the_upcycled_model(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "mistral")
    write_shards(dense, {name: tensor.bfloat16() for name, tensor in read_tensors(dense).items()}, shards=2)
    run = converted(dense, tmp_path / "run", upcycle=(5, 2), to="dcp")
    moe = converted(dense, tmp_path / "moe", upcycle=(5, 2))
    assert differences(read_tensors(converted(run, tmp_path / "back")), read_tensors(moe)) == []
    for (logits,) in ranks.run(2, opened_logits, [str(run)]):
        np.testing.assert_allclose(logits, logits_of(dense), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and `run` are a model, `dense` and `biased` are dense ones; `bin` is a pickle, `short` lacks a tensor."""
    folder = tmp_path_factory.mktemp("folders")
    write_hf_model(folder / "hf")
    converted(folder / "hf", folder / "run")
    write_dense(folder / "dense", "qwen3")
    write_dense(folder / "biased", "llama", attention_bias=True)
    write_dense(folder / "short", "mistral", tie_word_embeddings=False)
    tensors = read_tensors(folder / "short")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_shards(folder / "short", tensors, shards=1)
    write_dense(folder / "long", "mistral")
    tensors = read_tensors(folder / "long")
    write_shards(folder / "long", tensors | {"model.layers.1.mlp.extra": torch.ones(1)}, shards=1)
    write_assets(folder / "bin")
    torch.save({}, folder / "bin" / "pytorch_model.bin")
    torch.save({}, folder / "weights.pt")
    shutil.copytree(folder / "run", folder / "damaged")
    largest = max((folder / "damaged" / "checkpoint").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-4])
    (folder / "foreign").mkdir()
    (folder / "foreign" / ".metadata").write_bytes(b"")
    (folder / "taken").mkdir()
    return folder


# What is typed, and words that the message must hold.
MISTAKES = [
    ("convert", "SRC", "required"),
    ("convert hf", "DST", "required"),
    ("convert nowhere there", "nowhere'", "torch's distributed checkpoint"),
    ("convert taken there", "taken'", "no config.json"),
    ("convert hf taken", "taken'", "exists"),
    ("convert hf there --to pt", "--to", "hf"),
    ("convert hf there --to hf", "--to", "already"),
    ("convert run there --to dcp", "--to", "already"),
    ("convert dense there", "dense'", "--upcycle E,K"),
    ("convert hf there --upcycle 4,2", "--upcycle", "llama, mistral, qwen3"),
    ("convert run there --upcycle 4,2", "--upcycle", "dense model"),
    ("convert dense there --upcycle 4", "--upcycle", "1 <= K <= E"),
    ("convert dense there --upcycle 4,5", "--upcycle", "1 <= K <= E"),
    ("convert dense there --upcycle 4,0", "--upcycle", "1 <= K <= E"),
    ("convert dense there --upcycle -4,2", "--upcycle", "expected one argument"),
    ("convert dense there --upcycle 4,2 --seed=-1", "--seed", "0 to 2^63 - 1"),
    ("convert run there --family generic", "--family", "no run of ours"),
    ("convert hf there --family none", "name", "generic"),
    ("convert hf there --seed 1", "--seed", "--upcycle"),
    ("convert hf there --dtype float32", "--dtype", "--to hf"),
    ("convert run there --dtype float8", "--dtype", "bfloat16"),
    ("convert hf there --max-shard-size 1GB", "--max-shard-size", "--to hf"),
    ("convert run there --max-shard-size 5PB", "--max-shard-size", "500MB"),
    ("convert run there --max-shard-size 0GB", "--max-shard-size", "500MB"),
    ("convert hf there --assets hf", "--assets", "torch's distributed checkpoint"),
    ("convert foreign there", "--assets", "config.json"),
    ("convert foreign there --assets taken", "--assets", "config.json"),
    ("convert foreign there --assets hf", "foreign'", ".metadata"),
    ("convert biased there --upcycle 4,2", "biased'", "attention_bias True"),
    ("convert short there --upcycle 4,2", "short'", "model.layers.1.mlp.up_proj.weight is missing"),
    ("convert long there --upcycle 4,2", "long'", "model.layers.1.mlp.extra is unexpected"),
    ("convert bin there", "bin'", "pytorch_model.bin"),
    ("convert bin there", "run any code", "save_pretrained"),
    ("convert weights.pt there", "weights.pt'", "run any code"),
    ("generate bin --prompt a", "bin'", "run any code"),
    ("convert hf there --too 1", "--too", "unrecognized"),
]


@pytest.mark.parametrize(("arguments", "field", "valid"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_gives_one_message_and_writes_nothing(
    arguments: str,
    field: str,
    valid: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setenv("COLUMNS", "1000")
    before = snapshot(folders)
    assert call(arguments) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert panels(message) == 1
    assert "Traceback" not in message
    assert field in message
    assert valid in message
    assert snapshot(folders) == before


def test_the_command_says_what_it_did(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    assert call(f"convert run {tmp_path}/out --dtype bfloat16 --max-shard-size 50KB") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "qwen3_moe" in lines[0]
    assert lines[-1] == f"written: {tmp_path}/out"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_damaged_checkpoint_and_a_full_disk_leave_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setenv("COLUMNS", "1000")
    assert call(f"convert damaged {tmp_path}/out") == 1
    assert "bytes, not" in capsys.readouterr().err
    Path(tmp_path / "read_only").mkdir()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for source in ("run", "hf"):
        assert call(f"convert {source} {tmp_path}/out") == 1
        assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["read_only"]


@pytest.mark.parametrize(
    "noted", ["{", "[]", '{"default": "F33", "others": {}}', '{"default": "F32", "others": ["F32"]}']
)
def test_dtypes_that_were_not_noted_are_named(folders: Path, tmp_path: Path, noted: str) -> None:
    shutil.copytree(folders / "run", tmp_path / "run")
    (tmp_path / "run/hf_assets/tensor_dtypes.json").write_text(noted)
    write_checksums(tmp_path / "run/hf_assets")
    with pytest.raises(CheckpointError, match=r"cannot read \S+tensor_dtypes\.json .*; name a dtype"):
        converted(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    converted(tmp_path / "run", tmp_path / "out", dtype="float32")


def test_a_family_without_an_adapter_is_converted_as_generic(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    tiny_model(tiny_config(families_with_a_plan()["granitemoe"])).save_pretrained(source)
    with pytest.raises(ConfigError, match="--family generic takes granitemoe"):
        plan_conversion(source, tmp_path / "run", ConvertOptions())
    converted(source, tmp_path / "run", family="generic")
    converted(tmp_path / "run", tmp_path / "back")
    assert differences(read_tensors(tmp_path / "back"), read_tensors(source)) == []
