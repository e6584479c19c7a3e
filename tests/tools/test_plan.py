"""`crossdock plan`: what it says of a model, of layouts, of settings left open; what it refuses, as `train` does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks.plan import PUBLISHED, PUBLISHED_DEFAULT, predict_default, predict_published
from crossdock.cli import main
from crossdock.config import Config, load_config
from crossdock.parallel import ParallelDims
from crossdock.tools.plan import (
    Device,
    DeviceError,
    Estimate,
    Estimator,
    Plan,
    PlanOptions,
    SkewError,
    UnknownModel,
    advice,
    as_json,
    calibrate,
    extended_run,
    find_device,
    known_device,
    make_plan,
    picture,
    plan_model,
    read_devices,
    read_model,
    read_skew,
    scale,
    search,
    settle,
)
from crossdock.tools.report.load import LOAD_FILE, LoadLog
from crossdock.train.dry_run import dry_run
from crossdock.train.flops import model_flops_per_token, peak_tflops
from crossdock.train.planned import memory_warning
from tests.browser import Browser
from tests.tiny import write_assets
from tests.tools.plan_runs import SIZES, cache_beside, layout_of, predicted, sent_by_dimension, settings

DEVICES = read_devices()
B200 = find_device("B200", DEVICES)
LARGE = ("--model.flavor", "30B-A3B", "--training.dtype", "bfloat16", "--training.seq-len", "4096")


def _config(*arguments: str) -> Config:
    return load_config(None, list(arguments))


def _command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def _words(text: str) -> str:
    """What a panel says, without its frame and line breaks."""
    return re.sub(r"[\s─│╭╮╰╯]+", " ", text)


@pytest.mark.parametrize("flavor", ["debug", "30B-A3B", "235B-A22B"])
def test_parameters_and_operations_are_those_that_training_counts(flavor: str) -> None:
    model = plan_model(_config("--model.flavor", flavor))
    facts = read_model(model)
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.flops_per_token(4096) == pytest.approx(model_flops_per_token(model, 4096))


def test_the_table_of_devices_has_the_peaks_that_training_goes_by() -> None:
    for name, device in DEVICES.items():
        if name != "cpu":
            assert device.peak_tflops == peak_tflops(f"NVIDIA {name.upper()}")


# Full depth is 8 blocks, dry runs have 4 and 5.
EXTENDED = {
    "ep_shard 2": ["--parallelism.expert-parallel-degree", "2"],
    "full recompute, bfloat16": [
        *("--parallelism.expert-parallel-degree", "4", "--activation-checkpoint.mode", "full"),
        *("--training.dtype", "bfloat16"),
    ],
    "selective recompute, 2 micro-batches, parameters kept": [
        *("--parallelism.expert-parallel-degree", "2", "--activation-checkpoint.mode", "selective"),
        *("--training.global-batch-size", "16", "--parallelism.reshard-after-forward", "never"),
    ],
}


@pytest.mark.parametrize("name", EXTENDED)
def test_few_blocks_extended_are_the_whole_depth(name: str, tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", **(SIZES | {"num_hidden_layers": 8}))
    cache = cache_beside(assets)
    config, dims = layout_of(settings(str(assets), cache, overrides=EXTENDED[name]), 4)
    facts = read_model(plan_model(config))
    routes = read_skew("uniform", config, facts).of_ranks(128, dims.ep, facts)
    extended = extended_run(dry_run, config, dims, 0, facts, routes)
    whole = predicted(str(assets), cache, EXTENDED[name], 4, 0)
    assert extended.counted.peak == whole.counted.peak
    assert sent_by_dimension(extended.counted) == sent_by_dimension(whole.counted)
    assert (extended.within, extended.between, extended.metadata) == (whole.within, whole.between, whole.metadata)


def test_calibrated_formulas_are_near_a_dry_run_of_another_layout(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", **(SIZES | {"num_hidden_layers": 8}))
    cache = cache_beside(assets)
    config, dims = layout_of(settings(str(assets), cache, overrides=["--parallelism.expert-parallel-degree", "2"]), 4)
    estimator = Estimator(read_model(plan_model(config)), DEVICES["cpu"])
    plain = estimator.estimate(config, dims).memory.total
    estimator.calibration = calibrate(estimator, dry_run, config, dims)
    other = ["--parallelism.expert-parallel-degree", "4", "--training.local-batch-size", "8"]
    config, dims = layout_of(settings(str(assets), cache, overrides=other), 4)
    counted = predicted(str(assets), cache, other, 4, 0).counted.peak
    assert estimator.estimate(config, dims).memory.total == pytest.approx(counted, rel=0.2)
    assert plain != pytest.approx(counted, rel=0.2)


def test_one_row_of_the_published_table_gives_the_others() -> None:
    found = predict_published()
    for ranks, (rate, memory) in PUBLISHED.items():
        assert found[ranks].tokens_per_second == pytest.approx(rate, rel=0.03)
        assert found[ranks].memory_gib == pytest.approx(memory, rel=0.02)
    # It has host syncs and an unfused permutation, which the formulas know nothing of.
    assert predict_default() > PUBLISHED_DEFAULT
    assert predict_default() < found[8].tokens_per_second


def _settled(device: Device, ranks: int, *arguments: str) -> tuple[Config, str]:
    config, reasons = settle(_config(*LARGE, *arguments), ranks, device)
    return config, "; ".join(reasons)


def test_two_topologies_get_different_settings_and_say_why() -> None:
    open_settings = (
        *("--training.local-batch-size", "-1", "--training.global-batch-size", "512"),
        *("--parallelism.gradient-reduction", "auto", "--parallelism.expert-parallel-degree", "16"),
        *("--activation-checkpoint.mode", "full"),
    )
    one_node, nodes = replace(B200, node_size=16), replace(B200, node_size=8)
    near, why_near = _settled(one_node, 16, *open_settings)
    far, why_far = _settled(nodes, 16, *open_settings)
    # Where gathers go over the network, more tokens for each of them pay.
    assert near.training.local_batch_size < far.training.local_batch_size
    assert f"local_batch_size = {near.training.local_batch_size}: " in why_near
    assert "in nodes of 16" in why_near
    assert f"local_batch_size = {far.training.local_batch_size}: " in why_far
    assert "in nodes of 8" in why_far
    dims = ParallelDims(16, ep=16)
    for device, config, plan in (
        (one_node, near, r"alltoall, .*all ranks are one node"),
        (nodes, far, r"hierarchical, .*a token needs 3\.2 ranks on other nodes, and 1\.0 other nodes"),
    ):
        estimate = Estimator(read_model(plan_model(config)), device).estimate(config, dims)
        assert re.match(plan, estimate.dispatcher), estimate.dispatcher


def test_whole_gradients_are_kept_where_that_is_faster_and_fits() -> None:
    many = ("--training.local-batch-size", "1", "--training.global-batch-size", "1024")
    auto = ("--parallelism.gradient-reduction", "auto", "--parallelism.expert-parallel-degree", "8")
    roomy, why = _settled(replace(B200, memory_gib=1000.0), 64, *LARGE, *many, *auto)
    assert roomy.parallelism.gradient_reduction == "step", why
    tight, why = _settled(replace(B200, memory_gib=30.0), 64, *LARGE, *many, *auto)
    assert tight.parallelism.gradient_reduction == "micro_batch"
    assert "does not fit" in why


def test_search_ranks_what_fits_and_says_what_the_others_lose() -> None:
    config = _config(*LARGE, "--activation-checkpoint.mode", "full")
    estimator = Estimator(read_model(plan_model(config)), find_device("h100", DEVICES))
    found = search(estimator, config, 16)
    rates = [each.tokens_per_second for each in found.ranked]
    assert rates == sorted(rates, reverse=True)
    assert all(each.fits for each in found.ranked)
    assert found.tried > found.fitting >= len(found.ranked) > 1
    assert len({each.dims for each in found.ranked}) == len(found.ranked)
    assert any(each.dims.pp > 1 for each in search(estimator, config, 16, most=200).ranked)
    none = search(Estimator(estimator.facts, replace(estimator.device, memory_gib=2.0)), config, 16)
    assert not none.ranked
    assert none.least is not None


def test_tables_of_scaling_say_why_a_row_fails() -> None:
    config = _config(*LARGE, "--training.local-batch-size", "4", "--activation-checkpoint.mode", "full")
    estimator = Estimator(read_model(plan_model(config)), find_device("h100", DEVICES))
    strong, weak = scale(estimator, config, [8, 12, 64], [8])
    by_ranks = {row.ranks: row for row in strong}
    assert by_ranks[12].estimate is None
    assert by_ranks[12].problem.startswith("parallelism.expert_parallel_degree = 8: must divide")
    assert by_ranks[8].problem.startswith("out of memory by")
    assert not by_ranks[64].problem
    assert [row.local_batch for row in weak] == [1, 2, 4, 8, 16, 32]
    memory = [row.estimate.memory.total for row in weak if row.estimate is not None]
    assert memory == sorted(memory)


def test_a_skew_loads_the_busiest_rank_and_warns() -> None:
    config = _config(*LARGE, "--parallelism.expert-parallel-degree", "8")
    facts, dims = read_model(plan_model(config)), ParallelDims(8, ep=8)
    even, skewed = (
        Estimator(facts, B200, read_skew(name, config, facts)).estimate(config, dims) for name in ("uniform", "zipf:1")
    )
    assert even.routes.imbalance == pytest.approx(1, abs=0.05)
    assert skewed.routes.imbalance > 1.5
    assert skewed.routes.busiest == 0
    assert skewed.memory.total > even.memory.total
    assert skewed.tokens_per_second < even.tokens_per_second


WARNINGS = {
    "does not fit": ("h100", 8, "uniform", ["--training.local-batch-size", "16"]),
    "expert parallelism across nodes: ep 16 spans 2 nodes of 8": ("b200", 16, "uniform", []),
    "imbalance: the busiest rank computes": ("b200", 8, "zipf:1", []),
    "few rows per product": ("b200", 8, "uniform", ["--training.seq-len", "64", "--training.local-batch-size", "1"]),
    "more traffic than compute": ("cpu", 16, "uniform", []),
    "in gathers and reductions that nothing hides": (
        *("b200", 128, "uniform"),
        ["--training.local-batch-size", "1", "--parallelism.expert-parallel-degree", "8"],
    ),
    "expert parallelism is not needed": ("b200", 8, "zipf:1", ["--training.local-batch-size", "8"]),
}


@pytest.mark.parametrize("words", WARNINGS)
def test_experience_warns(words: str) -> None:
    name, ranks, skew, overrides = WARNINGS[words]
    config = _config(*LARGE, "--activation-checkpoint.mode", "full", *overrides)
    facts, device = read_model(plan_model(config)), DEVICES[name]
    if name == "cpu":  # as fast as a GPU, with links of a CPU
        device = replace(B200, nvlink_gbytes=1.0, network_gbytes=0.5)
    estimator = Estimator(facts, device, read_skew(skew, config, facts))
    given = config.parallelism.expert_parallel_degree
    degree = given if given > 1 else ranks
    found = advice(estimator.estimate(config, ParallelDims(ranks, ep=degree)), estimator)
    assert any(words in warning for warning in found), found


def test_a_recorded_load_is_a_skew(tmp_path: Path) -> None:
    config = _config()
    facts = read_model(plan_model(config))
    log = LoadLog(tmp_path / LOAD_FILE, 2, facts.num_experts, 0)
    routes = torch.ones(2, facts.num_experts, dtype=torch.int64)
    routes[1, 5] = 1000
    log.write(1, routes)
    log.close()
    skew = read_skew(str(tmp_path), config, facts)
    counts = np.bincount(skew.expert_ids(4096, facts).flatten().numpy(), minlength=facts.num_experts)
    assert counts.argmax() == 5
    assert "layer 1" in skew.name
    with pytest.raises(SkewError, match=r"zipf:EXPONENT, or the folder of a run"):
        read_skew(str(tmp_path / "nowhere"), config, facts)


def test_a_file_of_devices_extends_the_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[mine]\nbased_on = "h100"\nmemory_gib = 96\n')
    device = find_device("mine", read_devices(path))
    assert device == replace(find_device("h100", DEVICES), name="mine", memory_gib=96)
    for text, message in (
        ("[mine]\nmemory_gib = 96\n", "has no peak_tflops"),
        ('[mine]\nbased_on = "h100"\nmemory = 1\n', "has no key 'memory'"),
        ('[mine]\nbased_on = "h100"\nmemory_gib = -1\n', "memory_gib = -1: must be a positive number"),
        ('[mine]\nbased_on = "h900"\n', "based_on = 'h900'"),
        ("[mine\n", "is no TOML"),
    ):
        path.write_text(text)
        with pytest.raises(DeviceError, match=re.escape(message)):
            read_devices(path)


def test_the_command_prints_tables_and_writes_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawn = tmp_path / "plan.json", tmp_path / "plan.svg"
    asked = ("--gpus", 8, "--gpu", "b200", "--search", "--scale", "4,8", "--ep", "1,8", "--tokens", "2B")
    files = ("--json", out, "--picture", drawn)
    assert _command("plan", "configs/debug.toml", *asked, *files, "--skew", "zipf:1") == 0
    text = capsys.readouterr().out
    for words in (
        "memory at the peak",
        "expert exchange",
        "tokens per second and GPU",
        "best layouts",
        "strong",
        "weak",
    ):
        assert words in text
    data = json.loads(out.read_text())
    assert data["plan"]["memory_from"] == "dry run"
    assert data["plan"]["memory_bytes"]["peak"] == max(data["dry_run"]["peaks"].values())
    assert sum(v for k, v in data["plan"]["seconds"].items() if k != "step") == pytest.approx(
        data["plan"]["seconds"]["step"]
    )
    assert data["training"]["days"] > 0
    assert ElementTree.fromstring(drawn.read_text()).tag.endswith("svg")


HOSTILE = "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture(scope="module")
def small_plan() -> Plan:
    return make_plan(_config("--training.seq-len", "64"), PlanOptions(2, replace(B200, name=HOSTILE)), dry_run)


def test_nothing_of_a_plan_is_taken_for_markup(small_plan: Plan) -> None:
    tree = ElementTree.fromstring(picture(small_plan))  # raises for a quote, `<` or `&` that is not escaped
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert tags == {"svg", "title", "style", "text", "rect", "line"}
    assert HOSTILE in tree.attrib["aria-label"]


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_opens_cleanly_at_any_width(browser: Browser, small_plan: Plan, tmp_path: Path, dark: bool) -> None:
    path = tmp_path / "plan.svg"
    path.write_text(picture(replace(small_plan, options=replace(small_plan.options, device=B200))))
    page = browser.open(path, dark=dark)
    boxes = "[...document.querySelectorAll('text, rect, line')].map((one) => one.getBoundingClientRect())"
    for width in (1400, 400):
        page.resize(width)
        assert page.evaluate(f"{boxes}.every((box) => box.left >= 0 && box.right <= {width})")
        texts = "[...document.querySelectorAll('text')].map((one) => one.getBoundingClientRect().height)"
        assert page.evaluate(f"Math.min(...{texts})") > 12, "pixels"
    colours = "['text', 'svg'].map((one) => getComputedStyle(document.querySelector(one)))"
    text, ground = page.evaluate(f"(([text, svg]) => [text.fill, svg.backgroundColor])({colours})")
    grey = (238, 24) if dark else (26, 255)
    assert [text, ground] == [f"rgb({one}, {one}, {one})" for one in grey]
    assert page.complaints() == []
    assert page.requests()[1:] == []
    page.close()


RING = (
    *("--parallelism.context-parallel-degree", "2", "--parallelism.context-parallel-method", "ring"),
    *("--training.dtype", "bfloat16"),
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpus", "0", "--gpu", "b200"),
        ("--gpus", "8", "--gpu", "b900"),
        ("--gpus", "8", "--gpu", "b200", "--skew", "zipf:x"),
        ("--gpus", "8", "--gpu", "b200", "--tokens", "much"),
        ("--gpus", "8", "--gpu", "b200", "--ep", "8"),
        ("--gpus", "8", "--gpu", "b200", "--scale", "8;16"),
        ("--gpus", "8", "--gpu", "b200", "--devices", "nowhere.toml"),
        ("--gpus", "8", "--gpu", "b200", "--achieved", "2"),
        ("--gpu", "b200"),
        ("--gpus", "8", "--gpu", "b200", "--nproc", "4"),
        ("--gpus", "8", "--gpu", "b200", "--json", "nowhere/plan.json"),
        ("--gpus", "8", "--gpu", "b200", "--picture", "docs"),
        ("--gpus", "8", "--gpu", "cpu", *RING),
    ],
    ids=lambda arguments: " ".join(arguments).replace("/", "_"),
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert _command("plan", "configs/debug.toml", *arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.count("╭") == 1


@pytest.mark.parametrize(
    ("gpu", "overrides"),
    [
        ("b200", ("--model.attn-implementation", "flash_attention_2")),
        ("b200", ("--moe.experts", "triton")),
        ("b200", ("--moe.experts", "eager")),
        ("cpu", ("--moe.experts", "eager")),
        ("cpu", ("--training.dtype", "float64")),
        ("b200", ("--lora.rank", "4")),
        ("b200", RING),
    ],
)
def test_what_train_takes_there_is_a_plan_of(gpu: str, overrides: tuple[str, ...]) -> None:
    assert _command("plan", "configs/debug.toml", "--gpus", 4, "--gpu", gpu, *overrides) == 0


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text('["[/x] [red]y"]\nbased_on = "cpu"\n')
    assert _command("plan", "--gpus", 4, "--gpu", "[/x] [red]y", "--devices", devices) == 0
    assert "4 x [/x] [red]y: " in capsys.readouterr().out


def test_offload_leaves_parameters_and_states_to_the_host(tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    assert _command("plan", "--gpus", 4, "--gpu", "cpu", "--training.enable-cpu-offload", "--json", written) == 0
    memory = json.loads(written.read_text())["plan"]["memory_bytes"]
    assert (memory["parameters"], memory["gradients"], memory["optimizer"]) == (0, 0, 0)
    assert memory["activations"] > 0


@pytest.mark.parametrize("wire", ["same", "fp8"])
@pytest.mark.parametrize("skew", ["uniform", "zipf:1"])
def test_bytes_of_the_table_are_those_of_routes_and_wire(skew: str, wire: str) -> None:
    config = _config(*LARGE, "--moe.wire-dtype", wire, "--parallelism.expert-parallel-degree", "8")
    facts = read_model(plan_model(config))
    estimator = Estimator(facts, B200, read_skew(skew, config, facts))
    estimate = estimator.estimate(config, ParallelDims(8, dp_shard=8, ep=8))
    # The mean over ranks: of eight, each keeps an eighth of all rows; there and back, and the gradients of both.
    rows = sum(estimate.routes.rows) * 7 / 8
    there = facts.hidden_size * 2 if wire == "same" else facts.hidden_size + facts.hidden_size // 128 * 4
    expected = facts.num_layers * estimate.micro_batches * rows * (there + 3 * facts.hidden_size * 2)
    assert estimate.flows["expert exchange"].nvlink == pytest.approx(expected)


# Layout rules that a config may break, on so many ranks.
IMPOSSIBLE = {
    "ep does not divide": (6, ["--parallelism.expert-parallel-degree", "4"]),
    "more ep than experts": (16, ["--parallelism.expert-parallel-degree", "16"]),
    "tp does not divide heads": (8, ["--parallelism.tensor-parallel-degree", "8"]),
    "pp with too few layers": (8, ["--parallelism.pipeline-parallel-degree", "8"]),
    "too few micro-batches": (
        2,
        ["--parallelism.pipeline-parallel-degree", "2", "--training.global-batch-size", "4"],
    ),
    "replica groups": (8, ["--fault-tolerance.replica-groups", "3"]),
    "ep over a replica group": (
        8,
        ["--fault-tolerance.replica-groups", "2", "--parallelism.expert-parallel-degree", "8"],
    ),
    "global batch": (2, ["--training.global-batch-size", "9"]),
    "cp does not divide": (2, ["--parallelism.context-parallel-degree", "2", "--training.seq-len", "255"]),
    "sequences too long": (2, ["--training.seq-len", "99999"]),
    "local dispatcher with ep": (2, ["--moe.dispatcher", "local", "--parallelism.expert-parallel-degree", "2"]),
    "an open batch": (
        6,
        ["--parallelism.expert-parallel-degree", "4", "--training.local-batch-size", "-1"],
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_plan_calls_impossible_train_refuses_with_the_same_words(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ranks, overrides = IMPOSSIBLE[name]
    config = ("configs/debug.toml", *overrides)
    assert _command("plan", *config, "--gpus", ranks, "--gpu", "cpu") == 2
    planned = capsys.readouterr().err
    assert _command("train", *config, "--nproc", ranks, "--job.dump-folder", tmp_path / "run") == 2
    assert _words(planned) == _words(capsys.readouterr().err)


def test_what_does_not_fit_is_a_warning_in_train() -> None:
    config = _config("--model.flavor", "235B-A22B", "--training.seq-len", "128")
    warning = memory_warning(config, ParallelDims(2), 2)
    assert re.search(r"estimated to hold [\d.]+ GiB, and its device has [\d.]+; an estimate has an error", warning)
    assert not memory_warning(_config("--training.seq-len", "64"), ParallelDims(2), 2)


def test_the_shipped_table_is_what_the_page_says() -> None:
    page = Path("docs/plan.md").read_text()
    shipped = tomllib.loads(Path("crossdock/tools/plan/devices.toml").read_text())
    for name in shipped:
        assert f"`{name}`" in page


# What the formulas leave out: counts and places that dispatchers send, and uneven rows of the busiest rank.
FORMULAS = {
    "ep 4": (),
    "ep 2, bfloat16": ("--parallelism.expert-parallel-degree", "2", "--training.dtype", "bfloat16"),
    "full recompute, 3 micro-batches": (
        *("--activation-checkpoint.mode", "full", "--training.global-batch-size", "24"),
    ),
    "3 micro-batches, reduced once, parameters kept": (
        *("--training.global-batch-size", "24", "--parallelism.gradient-reduction", "step"),
        *("--parallelism.reshard-after-forward", "never", "--parallelism.expert-parallel-degree", "2"),
    ),
    "replicas": ("--parallelism.data-parallel-replicate-degree", "2", "--parallelism.expert-parallel-degree", "2"),
    "nodes of 2, hierarchical": ("--moe.dispatcher", "hierarchical", "--moe.ranks-per-node", "2"),
    "nodes of 1, hierarchical": ("--moe.dispatcher", "hierarchical", "--moe.ranks-per-node", "1"),
    "frozen experts": ("--training.freeze-experts", "--parallelism.expert-parallel-degree", "2"),
}


@pytest.mark.parametrize("node_size", [2, 4])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_send_what_dry_runs_count(name: str, node_size: int, tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", **SIZES)
    config = _config(
        *("--model.hf-assets-path", str(assets), "--training.seq-len", "64", "--training.local-batch-size", "2"),
        *("--parallelism.expert-parallel-degree", "4", "--training.debug-moe-force-load-balance", *FORMULAS[name]),
    )
    plan = make_plan(config, PlanOptions(4, replace(DEVICES["cpu"], node_size=node_size)), dry_run)
    assert plan.run is not None
    counted = dict(plan.estimate.flows)
    numbers = counted.pop("norm and metrics")
    assert numbers.nvlink + numbers.network < 1e5
    formulas = Estimator(plan.facts, plan.options.device, read_skew("uniform", plan.estimate.config, plan.facts))
    expected = formulas.estimate(plan.estimate.config, plan.estimate.dims).flows
    assert counted.keys() == expected.keys()
    for kind, flow in expected.items():
        near = 0.05 if kind == "expert exchange" else 0.002
        assert counted[kind].nvlink == pytest.approx(flow.nvlink, rel=near), kind
        assert counted[kind].network == pytest.approx(flow.network, rel=near), kind


def _estimated(config: Config, ranks: int = 8) -> Estimate:
    """By formulas alone."""
    dims = ParallelDims.from_config(config.parallelism, ranks)
    return Estimator(read_model(plan_model(config)), B200).estimate(config, dims)


def test_adapters_alone_have_gradients_and_states() -> None:
    asked = ("--parallelism.expert-parallel-degree", "4")
    whole, low = (
        _estimated(_config(*LARGE, *asked, *lora)) for lora in ((), ("--lora.rank", "8", "--lora.targets", "attention"))
    )
    # Of 48 layers: A and B of queries and outputs, keys and values, sharded over 8 ranks.
    sizes = 2048 + 4096, 4096 + 2048, 2048 + 512, 2048 + 512
    adapters = 48 * 8 * sum(sizes) / 8
    assert low.memory.optimizer == pytest.approx(8 * adapters)
    reductions = [each.flows["gradient reduction"].nvlink for each in (whole, low)]
    assert reductions[1] == pytest.approx(4 * 7 * adapters)
    assert reductions[1] < reductions[0] / 100
    assert low.work.compute < whole.work.compute
    assert low.work.optimizer < whole.work.optimizer / 100


def test_copies_of_experts_are_in_memory(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", **SIZES)
    sizes = ("--model.hf-assets-path", str(assets), "--training.seq-len", "64")
    asked = (*sizes, "--parallelism.expert-parallel-degree", "4")
    copies = ("--balance.strategy", "eplb", "--balance.num-redundant-experts", "8")
    plain, more = (
        make_plan(_config(*asked, *extra), PlanOptions(4, DEVICES["cpu"]), dry_run).estimate.memory
        for extra in ((), copies)
    )
    # Two copies on each rank: their values in 3 layers, and of one layer their gradients, going and coming.
    expert = 3 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    assert more.buffers - plain.buffers == 2 * expert * 4 * (3 + 2)
    assert more.total - more.buffers == plain.total - plain.buffers


def test_a_plan_for_other_machines_says_how_to_plan_with_deepep() -> None:
    moe = ("--parallelism.expert-parallel-degree", "8")
    words = "(here: its library is not installed; moe.dispatcher = deepep plans with it)"
    assert words in _estimated(_config(*LARGE, *moe)).dispatcher
    assert _estimated(_config(*LARGE, *moe, "--moe.dispatcher", "deepep")).dispatcher.startswith("deepep, 2 chunks")


def test_numbers_of_chunks_are_those_that_the_sentence_names() -> None:
    plan = make_plan(_config("--training.seq-len", "64"), PlanOptions(2, B200), dry_run)
    chunks = as_json(plan)["plan"]["overlap_chunks"]
    assert f"{chunks} chunk" in plan.estimate.dispatcher


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_device_is_known_by_whole_words_of_its_name(name: str, key: str | None) -> None:
    assert known_device(name, DEVICES) == (None if key is None else DEVICES[key])


def test_a_model_whose_sizes_are_named_otherwise_is_one_error() -> None:
    config = _config("--training.seq-len", "64")
    model = plan_model(config)
    sizes = SimpleNamespace(vocab_size=512, hidden_size=256, model_type="foreign")
    model.config = SimpleNamespace(get_text_config=lambda: sizes, name_or_path="somewhere")  # type: ignore[assignment]
    with pytest.raises(UnknownModel, match="num_attention_heads"):
        read_model(model)


@pytest.mark.parametrize(("command", "code"), [("| head -1 >/dev/null", 141), ("> /dev/full", 2)])
def test_a_shell_that_takes_no_more_gets_no_traceback(command: str, code: int) -> None:
    plan = f"{sys.executable} -m crossdock plan --gpus 2 --gpu cpu --training.seq-len 64"
    shell = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {plan} {command}"], capture_output=True, text=True, timeout=120
    )
    assert shell.returncode == code, shell.stderr
    assert "Traceback" not in shell.stderr
    assert ("cannot be written" in shell.stderr) == (code == 2)
