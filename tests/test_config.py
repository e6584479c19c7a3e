"""Settings from TOML and the command line, and what `validate` lets through."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import pytest
import torch

from crossdock.config import Config, ConfigError, check_settings, load_config, to_toml, validate, write_run_settings
from crossdock.models import FAMILIES
from tests.chats import turns, write_chat_assets, write_conversations
from tests.models.tiny_families import write_config
from tests.tiny import speeches, write_assets


def every_setting() -> dict[str, tuple[Any, Any]]:
    """Type and default of each setting by its name."""
    default = Config()
    return {
        f"{section.name}.{key}": (hint, getattr(getattr(default, section.name), key))
        for section in dataclasses.fields(Config)
        for key, hint in get_type_hints(type(getattr(default, section.name))).items()
    }


def set_type(hint: Any) -> Any:
    """The type of a setting that is set."""
    return next(iter(set(get_args(hint)) - {type(None)})) if type(None) in get_args(hint) else hint


def other_value(hint: Any, default: Any) -> Any:
    """A value of the type that is not the default."""
    hint = set_type(hint)
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if choice != default), default)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return get_args(item)[:2] if get_origin(item) is Literal else (other_value(item, None),) * 2
    if hint is bool:
        return not default
    if hint is int:
        return default + 3
    if get_origin(hint) is tuple:
        return ("/some/where", "sotu") if get_args(hint)[0] is str else (0.375, 2.0)
    return "/some/where" if hint is str else 0.375


def get(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def toml_file(folder: Path, text: str) -> Path:
    path = folder / "some.toml"
    path.write_text(text)
    return path


def refusal(config: Config, world_size: int = 2) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        validate(config, world_size)
    return raised.value


@pytest.mark.parametrize("name", every_setting())
def test_a_setting_is_the_same_from_the_command_line_and_from_the_toml_that_is_written(
    name: str, tmp_path: Path
) -> None:
    hint, default = every_setting()[name]
    hint, value = set_type(hint), other_value(hint, default)
    if get_origin(hint) is tuple:
        arguments = [f"--{name}", ",".join(map(str, value))]
    elif hint is bool:
        section, key = name.split(".")
        arguments = [f"--{name}" if value else f"--{section}.no-{key}"]
    else:
        arguments = [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    config = load_config(None, arguments)
    assert get(config, name) == value
    assert type(get(config, name)) is type(value)
    assert load_config(toml_file(tmp_path, to_toml(config))) == config
    changed = {other for other in every_setting() if get(config, other) != get(Config(), other)}
    assert changed == ({name} if value != default else set())


def test_the_command_line_beats_the_file_beats_the_default_and_the_last_word_counts(tmp_path: Path) -> None:
    path = toml_file(tmp_path, "[training]\nsteps = 5\nseed = 6\n")
    config = load_config(path, ["--training.seed", "7", "--training.seed", "8"])
    assert (config.training.steps, config.training.seed) == (5, 8)
    assert config.training.seq_len == Config().training.seq_len


PRESETS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_that_comes_with_crossdock_is_found_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of that name is no configuration
    assert load_config(Path(name)) == load_config(Path(__file__).parents[1] / "configs" / f"{name}.toml")


def test_a_file_comes_before_a_configuration_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("debug").write_text("[training]\nsteps = 7\n")
    assert load_config(Path("debug")).training.steps == 7


@pytest.mark.parametrize("path", ["debgu", "configs/debug.toml", "debug.toml"])
def test_a_path_is_never_taken_for_a_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_config(Path(path))
    assert "No such file" in raised.value.valid
    assert f"comes with crossdock: {', '.join(PRESETS)}" in raised.value.valid


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lr_scheduler.warmup_steps", "7"],
        ["--lr-scheduler.warmup-steps", "7"],
        ["--lr-scheduler.warmup_steps", "7"],
        ["--lr_scheduler.warmup-steps=7"],
    ],
)
def test_dashes_and_underscores_are_alike_on_the_command_line(arguments: list[str]) -> None:
    assert load_config(None, arguments).lr_scheduler.warmup_steps == 7


@pytest.mark.parametrize(
    "text",
    ["[lr_scheduler]\nwarmup_steps = 7", "[lr-scheduler]\nwarmup-steps = 7", "lr-scheduler.warmup_steps = 7"],
)
def test_dashes_and_underscores_are_alike_in_toml(text: str, tmp_path: Path) -> None:
    assert load_config(toml_file(tmp_path, text)).lr_scheduler.warmup_steps == 7


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--training.debug_moe_force_load_balance", True),
        ("--training.debug-moe-force-load-balance", True),
        ("--training.no-debug-moe-force-load-balance", False),
        ("--training.no_debug_moe_force_load_balance", False),
        ("--no-training.debug_moe_force_load_balance", False),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_switch_is_bare(argument: str, value: bool, before: bool, tmp_path: Path) -> None:
    path = toml_file(tmp_path, f"[training]\ndebug_moe_force_load_balance = {str(before).lower()}")
    config = load_config(path, [argument, "--training.steps", "5"])
    assert config.training.debug_moe_force_load_balance is value
    assert config.training.steps == 5


def test_a_setting_can_be_unset_from_the_command_line(tmp_path: Path) -> None:
    path = toml_file(tmp_path, "[lr_scheduler]\ndecay_ratio = 0.5")
    assert load_config(path).lr_scheduler.decay_ratio == 0.5
    assert load_config(path, ["--lr-scheduler.decay-ratio", "None"]).lr_scheduler.decay_ratio is None


def test_a_list_can_be_emptied_from_the_command_line(tmp_path: Path) -> None:
    path = toml_file(tmp_path, '[metrics]\ntrackers = ["wandb", "tensorboard"]')
    assert load_config(path).metrics.trackers == ("wandb", "tensorboard")
    assert load_config(path, ["--metrics.trackers="]).metrics.trackers == ()
    assert load_config(path, ["--metrics.trackers", "trackio"]).metrics.trackers == ("trackio",)


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["--metrics.trackers", "tensorboard,trackio"])
    validate(config, 2)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else found(name))
    error = refusal(config)
    assert error.field == "metrics.trackers"
    assert "trackio" in error.valid
    assert "pip install 'crossdock[trackio]'" in error.valid


def test_negative_numbers_and_empty_strings_are_values() -> None:
    config = load_config(None, ["--parallelism.expert-parallel-degree", "-1", "--model.flavor", "", "--model.name="])
    assert config.parallelism.expert_parallel_degree == -1
    assert (config.model.flavor, config.model.name) == ("", "")


def test_a_list_is_a_list_in_toml_or_one_value_and_has_commas_on_the_command_line(tmp_path: Path) -> None:
    for text, source, weights in (
        ('source = "sotu"', ("sotu",), ()),
        ('source = ["sotu", "/a,b"]\nweights = [1, 2.5]', ("sotu", "/a,b"), (1.0, 2.5)),
        ('source = "/a,b"\nweights = 3', ("/a,b",), (3.0,)),
    ):
        data = load_config(toml_file(tmp_path, f"[data]\n{text}")).data
        assert (data.source, data.weights) == (source, weights)
        assert all(type(weight) is float for weight in data.weights)
    path = tmp_path / "some.toml"
    for arguments in (
        ["--data.source", "sotu, /a", "--data.weights", "1,2"],
        ["--data.source=sotu,/a", "--data.weights=1,2"],
    ):
        data = load_config(path, arguments).data
        assert (data.source, data.weights) == (("sotu", "/a"), (1.0, 2.0))
    assert load_config(path, ["--data.weights", ""]).data.weights == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("source = 3", "one,2"),
        ('source = ["sotu", 3]', "1,,2"),
        ('weights = ["1"]', "1;2"),
        ("weights = [[1.0]]", "sotu"),
    ],
)
def test_a_list_of_another_type_is_refused(text: str, value: str, tmp_path: Path) -> None:
    for path, arguments in ((toml_file(tmp_path, f"[data]\n{text}"), []), (None, ["--data.weights", value])):
        with pytest.raises(ConfigError, match=r"must be a (string|number), or several: a list in TOML, with commas"):
            load_config(path, arguments)


def test_a_whole_number_will_do_for_a_float(tmp_path: Path) -> None:
    lr = load_config(toml_file(tmp_path, "[optimizer]\nlr = 1")).optimizer.lr
    assert lr == 1.0
    assert type(lr) is float


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("training.stepz", "training.steps"),
        ("optimizer.steps", "training.steps"),
        ("steps", "training.steps"),
        ("parallelism.expert_parallel_size", "parallelism.expert_parallel_degree"),
        ("moe.experts_bias", "moe.expert_bias"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(written: str, meant: str, tmp_path: Path) -> None:
    for path, arguments in ((None, [f"--{written}", "5"]), (toml_file(tmp_path, f"{written} = 5"), [])):
        with pytest.raises(ConfigError) as raised:
            load_config(path, arguments)
        assert raised.value.field == written
        assert f"did you mean {meant}?" in raised.value.valid


def test_an_unknown_section_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean training\.steps\?"):
        load_config(None, ["--trainin.steps", "5"])
    with pytest.raises(ConfigError, match=r"did you mean training\?"):
        load_config(toml_file(tmp_path, "[trainin]\nsteps = 5"))


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = toml_file(tmp_path, "[training]\nstepz = 5")
    with pytest.raises(ConfigError, match=r"some\.toml"):
        load_config(path)


def test_the_suffix_deepep_chooses_that_dispatcher_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["--model.flavor", "30B-A3B-deepep"])
    assert config.moe.dispatcher == "deepep"
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    error = refusal(config)
    assert (error.field, error.value) == ("model.flavor", "30B-A3B-deepep")
    assert re.search(r"needs the package deep_ep .*model\.flavor = 30B-A3B and moe\.dispatcher = alltoall", error.valid)
    assert "\n" not in str(error)
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, SimpleNamespace(__version__="1.0", Buffer=object)))
    assert "deep_ep 1.0 has neither" in refusal(config).valid


def test_deepep_with_its_library_needs_a_gpu_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, SimpleNamespace(ElasticBuffer=object)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(None, ["--moe.dispatcher", "deepep", "--model.flavor", "10B-A1B"])
    error = refusal(config)
    assert error.field == "moe.dispatcher"
    assert "needs a GPU; use moe.dispatcher = alltoall" in error.valid
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refusal(replace(config, training=replace(config.training, dtype="float32"))).field == "training.dtype"
    in_bf16 = replace(config, training=replace(config.training, dtype="bfloat16"))
    check_settings(in_bf16)
    assert "256, not 240" in refusal(replace(in_bf16, model=replace(config.model, flavor="debug"))).valid
    without = replace(in_bf16, moe=replace(config.moe, deepep_api="buffer"))
    assert "it has the API 'elastic' alone" in refusal(without).valid


def test_symmetric_needs_kernels_and_ranks_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["--moe.dispatcher", "symmetric", "--parallelism.expert-parallel-degree", "4"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("crossdock.dispatch.symmetric.kernels_run", lambda device: True)
    validate(config, 8, 4)
    with pytest.raises(ConfigError, match=r"ranks 0 to 3 are on machines 0 0 1 1; use alltoall") as caught:
        validate(config, 8, 2)
    assert caught.value.field == "moe.dispatcher"
    joined = replace(config, moe=replace(config.moe, ranks_per_node=4))
    validate(joined, 8, 2)
    monkeypatch.setattr("crossdock.dispatch.symmetric.kernels_run", lambda device: False)
    error = refusal(config)
    assert error.field == "moe.dispatcher"
    assert error.valid.endswith("use moe.dispatcher = alltoall")


def test_paths_of_the_run_do_not_depend_on_where_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/some")
    config = load_config(None, ["--job.dump-folder", "a/../b", "--model.hf-assets-path", "~/assets"])
    assert config.job.dump_folder == str(tmp_path / "b")
    assert config.model.hf_assets_path == "/home/some/assets"
    written = "talks.jsonl,~/more,sotu,datasets:some/name@test,../saved@test"
    kept = ("sotu", "datasets:some/name@test")
    expected = (str(tmp_path / "talks.jsonl"), "/home/some/more", *kept, str(tmp_path.parent / "saved@test"))
    assert load_config(None, ["--data.source", written]).data.source == expected


def make_run(folder: Path, *overrides: str) -> Config:
    """A folder that holds a run of these settings."""
    config = load_config(None, ["--job.dump-folder", str(folder), *overrides])
    folder.mkdir()
    write_run_settings(config, folder)
    return config


def test_without_a_file_a_run_folder_gives_the_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "--training.seed", "5", "--training.steps", "50")
    assert load_config(None, ["--job.dump-folder", str(tmp_path / "run")]) == run
    resumed = load_config(None, ["--training.steps", "70", "--job.dump-folder", str(tmp_path / "run")])
    assert (resumed.training.seed, resumed.training.steps) == (5, 70)
    validate(resumed, 2)


def test_with_a_file_a_run_folder_gives_no_settings(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "--training.steps", "50")
    path = toml_file(tmp_path, "[training]\nseed = 0\n")
    config = load_config(path, ["--job.dump-folder", str(tmp_path / "run")])
    assert config.training.steps == Config().training.steps


def test_a_moved_run_folder_is_written_where_it_is_now(tmp_path: Path) -> None:
    make_run(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    config = load_config(None, ["--job.dump-folder", str(tmp_path / "after")])
    assert config.job.dump_folder == str(tmp_path / "after")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.seed", "6"),
        ("optimizer.name", "muon"),
        ("training.seq_len", "64"),
        ("model.flavor", "10B-A1B"),
        ("data.source", "sotu,sotu"),
        ("data.weights", "1"),
        ("data.text_field", "body"),
        ("data.packing", "documents"),
        ("data.held_out", "0.1"),
    ],
)
def test_a_run_is_resumed_with_its_own_data_and_model(name: str, value: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "--training.seed", "5")
    error = refusal(load_config(None, ["--job.dump-folder", str(tmp_path / "run"), f"--{name}", value]))
    assert error.field == name
    assert str(tmp_path / "run") in error.valid


def test_a_run_folder_is_new_or_empty_or_holds_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for good in ("new/and/deep", "empty"):
        validate(load_config(None, ["--job.dump-folder", str(tmp_path / good)]), 2)
    for bad in ("foreign", "file", "file/below"):
        error = refusal(load_config(None, ["--job.dump-folder", str(tmp_path / bad)]))
        assert (error.field, error.value) == ("job.dump_folder", str(tmp_path / bad))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    # Not by its mode, since root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked" or not mode & os.W_OK)
    for name in ("job.dump_folder", "data.cache_folder"):
        assert refusal(load_config(None, [f"--{name}", str(tmp_path / "locked" / "new" / "deep")])).field == name
    assert refusal(load_config(None, ["--job.dump-folder", str(tmp_path / "locked")])).field == "job.dump_folder"


def test_data_may_be_cached_in_a_folder_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    validate(load_config(None, ["--data.cache_folder", str(tmp_path)]), 2)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("job.comm_timeout_seconds", ["1", "31536000"], ["0", "31536001"]),
        ("data.source", ["sotu", "sotu,sotu"], ["", "sotu,", "/no/such.jsonl", __file__]),
        ("data.weights", ["", "2"], ["0", "-1", "nan", "inf", "1,2"]),
        ("data.held_out", ["0", "0.5"], ["1", "-0.1", "nan"]),
        ("data.text_field", ["body"], [""]),
        ("data.messages_field", ["messages"], ["", "dialog"]),
        ("data.train_on", ["assistant"], ["last"]),
        ("data.chat_template", [""], ["/some/template.jinja"]),
        ("training.local_batch_size", ["1"], ["0", "-1"]),
        ("training.seq_len", ["1", "4096"], ["0", "4097"]),
        ("training.steps", ["1"], ["0"]),
        ("training.seed", ["0", str(2**63 - 1)], ["-1", str(2**63)]),
        ("training.max_norm", ["1e-30"], ["0", "nan", "inf"]),
        ("fault_tolerance.max_skipped_steps", ["1"], ["0"]),
        ("fault_tolerance.spike_window", ["1"], ["0"]),
        ("fault_tolerance.loss_spike_factor", ["0", "1"], ["-1", "0.5"]),
        ("fault_tolerance.norm_spike_factor", ["0", "1"], ["-1", "0.5"]),
        ("fault_tolerance.max_rollbacks", ["0"], ["-1"]),
        ("fault_tolerance.replica_check_interval", ["0"], ["-1"]),
        ("training.global_batch_size", ["-1", "16", "48"], ["-16", "0", "8", "24"]),
        ("training.tuned", ["auto", "off"], ["", "/no/such.json", __file__]),
        ("optimizer.momentum", ["0", "0.99"], ["1", "-0.1", "nan"]),
        ("optimizer.lr", ["0"], ["-1e-9", "nan", "-inf"]),
        ("optimizer.beta1", ["0", "0.999"], ["1", "-0.1", "nan"]),
        ("optimizer.beta2", ["0", "0.999"], ["1", "-0.1"]),
        ("optimizer.eps", ["1e-30"], ["0"]),
        ("optimizer.weight_decay", ["0"], ["-0.1", "inf"]),
        ("lr_scheduler.warmup_steps", ["0"], ["-1"]),
        ("lr_scheduler.decay_ratio", ["0", "1", "None"], ["-0.1", "1.1", "nan"]),
        ("lr_scheduler.min_lr_factor", ["0", "1"], ["-0.1", "1.1"]),
        ("moe.z_loss_coeff", ["0"], ["-1", "nan"]),
        ("moe.expert_bias_rate", ["1e-3"], ["-1", "inf", "0.01"]),
        ("moe.drop_policy", ["probs"], ["position"]),
        ("moe.debug_force_zipf_seed", ["-1"], ["0"]),
        ("moe.wire_directions", ["tokens"], ["both"]),
        ("checkpoint.interval", ["0"], ["-1"]),
        ("checkpoint.keep_latest_k", ["0"], ["-1"]),
        ("checkpoint.async_when_busy", ["wait"], ["skip"]),
        ("metrics.log_freq", ["1"], ["0"]),
        ("metrics.trackers", ["", "wandb", "tensorboard,trackio"], ["wandb,wandb"]),
        ("metrics.project", ["a", "Some.project-1"], ["", "a/b", "a b", "a" * 129]),
        ("parallelism.expert_parallel_degree", ["-1", "1", "2"], ["-2", "0", "3", "4"]),
        ("parallelism.data_parallel_shard_degree", ["-1", "2"], ["-2", "0", "1", "4"]),
        ("parallelism.data_parallel_replicate_degree", ["1", "2"], ["0", "3"]),
        ("parallelism.context_parallel_degree", ["1", "2"], ["0", "3"]),
        ("parallelism.context_parallel_method", ["ulysses"], []),
        ("parallelism.tensor_parallel_degree", ["1", "2"], ["0", "3", "4"]),
        ("parallelism.pipeline_parallel_degree", ["1", "2"], ["0", "3"]),
    ],
)
def test_validate_accepts_up_to_the_boundary_on_two_ranks(name: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        validate(load_config(None, [f"--{name}", value]), 2)
    for value in bad:
        assert refusal(load_config(None, [f"--{name}", value])).field == name


def test_muon_is_refused_where_it_has_nothing_to_do_or_its_matrices_are_not_where_the_model_computes() -> None:
    for options in (["--lora.rank", "4"], ["--training.enable-cpu-offload"]):
        error = refusal(load_config(None, ["--optimizer.name", "muon", *options]))
        assert (error.field, error.value) == ("optimizer.name", "muon")
        assert "must be adamw with" in error.valid


def test_chat_data_needs_a_chat_template_and_conversations(tmp_path: Path) -> None:
    write_chat_assets(tmp_path / "assets")
    talks = write_conversations(tmp_path / "talks.jsonl", [turns("a", "b")])
    (tmp_path / "talks.txt").write_text("a")
    chat = ["--data.format", "chat", "--data.source", str(talks), "--training.seq-len", "64"]
    assets = ["--model.hf-assets-path", str(tmp_path / "assets")]
    config = load_config(None, [*chat, *assets])
    validate(config, 2)
    assert (config.data.row_packing, config.data.within_documents) == ("documents", True)
    other = load_config(None, [*chat, *assets, "--data.packing=stream", "--data.no-attend-within-documents"])
    validate(other, 2)
    assert (other.data.row_packing, other.data.within_documents) == ("stream", False)
    text = load_config(None, []).data
    assert (text.row_packing, text.within_documents) == ("stream", False)
    assert refusal(load_config(None, chat)).field == "model.hf_assets_path"
    for wrong in (
        ["--data.source", "sotu"],
        ["--data.source", str(tmp_path / "talks.txt")],
        ["--data.text-field", "body"],
        ["--data.chat-template", str(tmp_path / "missing.jinja")],
        ["--validation.interval=1", "--validation.data", "sotu"],
    ):
        error = refusal(load_config(None, [*chat, *assets, *wrong]))
        assert error.field == wrong[-2].removeprefix("--").replace("-", "_")
    (tmp_path / "assets" / "chat_template.jinja").unlink()
    error = refusal(load_config(None, [*chat, *assets]))
    assert error.field == "data.chat_template"
    assert f"{tmp_path / 'assets'}: has no chat template" in error.valid


def test_the_dispatcher_local_is_for_one_rank() -> None:
    config = load_config(None, ["--moe.dispatcher", "local", "--parallelism.expert-parallel-degree", "1"])
    assert validate(config, 2).ep == 1
    error = refusal(load_config(None, ["--moe.dispatcher", "local", "--parallelism.expert-parallel-degree", "2"]), 2)
    assert (error.field, error.value) == ("moe.dispatcher", "local")
    assert error.valid == "needs parallelism.expert_parallel_degree = 1, not 2; use auto or alltoall"


def test_no_more_ranks_than_experts() -> None:
    config = load_config(None, ["--parallelism.expert-parallel-degree", "8"])
    assert validate(config, 8).ep == 8
    error = refusal(load_config(None, ["--parallelism.expert-parallel-degree", "16"]), 16)
    assert error.field == "parallelism.expert_parallel_degree"
    assert "8" in error.valid


def test_a_launcher_knows_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hierarchical` needs as many ranks of a group on each machine: what counts is how many are launched there."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = load_config(None, ["--moe.dispatcher", "hierarchical", "--parallelism.expert-parallel-degree", "6"])
    for ranks_per_machine in (2, 3, 6):
        validate(config, 6, ranks_per_machine)
    with pytest.raises(ConfigError, match="on machines 0 0 0 0 1 1; use alltoall") as caught:
        validate(config, 6, 4)
    assert caught.value.field == "moe.dispatcher"


def test_expert_shards_must_divide_the_sizes() -> None:
    error = refusal(load_config(None, ["--parallelism.expert-parallel-degree", "-1"]), 7)
    assert error.field == "parallelism.expert_parallel_degree"
    assert error.valid.startswith("one of 7:")
    assert "240" in error.valid
    assert refusal(load_config(None), 11).valid.startswith("there is none")


def test_the_automatic_degree_is_two_where_the_ranks_are_even() -> None:
    config = load_config(None, ["--parallelism.expert-parallel-degree", "-1"])
    assert [validate(config, ranks).ep for ranks in (1, 2, 3, 4, 5, 6, 8)] == [1, 2, 1, 2, 1, 2, 2]


@pytest.mark.parametrize(
    ("world_size", "name", "overrides", "field", "part"),
    [
        (2, "qwen3", ["--training.seq-len", "33"], "training.seq_len", "the nearest is 32"),
        (4, "qwen3", ["--training.seq-len", "62"], "training.seq_len", "the nearest is 60"),
        (
            3,
            "qwen3",
            ["--training.seq-len=33", "--parallelism.expert-parallel-degree=3"],
            "context_parallel_degree",
            "query heads (4) and the 3 ranks",
        ),
        (8, "qwen3", ["--training.seq-len", "32"], "context_parallel_degree", "1, 2, 4; the nearest is 4"),
        (2, "qwen3_next", [], "context_parallel_degree", "must be 1: .*linear_attention (Qwen3NextGatedDeltaNet)"),
        (2, "llama4", [], "context_parallel_degree", "attn_temperature_tuning"),
        (2, "qwen3", ["--parallelism.context-parallel-method", "ring"], "context_parallel_method", "needs a GPU"),
    ],
)
def test_what_ranks_that_share_sequences_cannot_do_is_refused(
    world_size: int, name: str, overrides: list[str], field: str, part: str, tmp_path: Path
) -> None:
    assets = write_assets(tmp_path / "assets")
    write_config(tmp_path / name, name, vocab_size=260, num_experts=8 if name == "qwen3" else None)
    shutil.copy(assets / "tokenizer.json", tmp_path / name)
    settings = ["--model.name", name, "--model.hf-assets-path", str(tmp_path / name), "--training.seq-len", "32"]
    settings += ["--data.source", str(speeches(assets)), "--parallelism.context-parallel-degree", str(world_size)]
    error = refusal(load_config(None, [*settings, *overrides]), world_size)
    assert error.field.endswith(field)
    for piece in part.split(".*"):
        assert piece in error.valid


def test_settings_alone_say_nothing_of_the_layout() -> None:
    config = load_config(None, ["--parallelism.expert-parallel-degree", "3", "--training.global-batch-size", "17"])
    check_settings(config)
    with pytest.raises(ConfigError):
        validate(config, 2)


def assets_config(folder: Path, *overrides: str) -> Config:
    return load_config(None, ["--model.hf-assets-path", str(folder), "--training.seq-len", "64", *overrides])


def test_a_folder_of_assets_is_accepted(tmp_path: Path) -> None:
    validate(assets_config(write_assets(tmp_path / "assets")), 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts_per_tok": 9},
        {"num_experts": 0},
        {"hidden_size": "32"},
        {"num_key_value_heads": 0},
        {"model_type": "llama"},
        {"vocab_size": 256},
        {"hidden_act": "nothing"},
    ],
)
def test_a_config_json_that_makes_no_model_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    folder = write_assets(tmp_path / "assets", **wrong)
    error = refusal(assets_config(folder))
    assert (error.field, error.value) == ("model.hf_assets_path", str(folder))


def test_a_folder_of_another_family_names_the_setting(tmp_path: Path) -> None:
    error = refusal(assets_config(write_assets(tmp_path / "assets", model_type="mixtral")))
    assert "set model.name = mixtral" in error.valid
    error = refusal(assets_config(write_assets(tmp_path / "other", model_type="llama")))
    assert all(family.model_type in error.valid for family in FAMILIES.values())


def test_a_vocabulary_holds_every_token(tmp_path: Path) -> None:
    validate(assets_config(write_assets(tmp_path / "just", vocab_size=257)), 2)
    error = refusal(assets_config(write_assets(tmp_path / "short", vocab_size=256)))
    assert "257" in error.valid
    assert "256" in error.valid


@pytest.mark.parametrize("content", [None, "", "{}", "{nope", "[]"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_of_the_assets_that_cannot_be_read_is_refused(name: str, content: str | None, tmp_path: Path) -> None:
    folder = write_assets(tmp_path / "assets")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    error = refusal(assets_config(folder))
    assert error.field == "model.hf_assets_path"
    assert name in error.valid
