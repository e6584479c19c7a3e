"""`ep_implementation="crossdock"` on several processes: losses and gradients of transformers' `AllToAllEP` and of one
process, in fp32, for families with and without an adapter of ours."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossdock.dispatch import free_deepep_buffers
from tests.dispatch.deepep_double import Double
from tests.integrations.tiny_models import data_rank, full, load, loss_and_gradients, token_ids, write_model
from tests.ranks import RankPool

Step = tuple[float, dict[str, np.ndarray]]

SHARDED = {"fsdp_size": 2, "ep_size": 2}
TENSOR_PARALLEL = {"tp_size": 2, "ep_size": 2}


def _steps(folder: str, cases: list[tuple[dict[str, Any], str]], recompute: bool = False) -> list[Step | str]:
    """A step for each (layout, experts implementation), or the message of its error."""
    import crossdock.integrations.transformers  # noqa: F401 (registers; in workers that have done so already, too)

    steps: list[Step | str] = []
    for layout, experts in cases:
        try:
            model = load(folder, layout, experts)
            if recompute:
                model.gradient_checkpointing_enable()
                model.train()
            steps.append(loss_and_gradients(model, token_ids(data_rank(layout))))
        except ValueError as error:
            steps.append(str(error))
    return steps


def _one_process(folder: Path, batches: int) -> Step:
    """The mean loss over the batches of all data-parallel ranks, with all experts here."""
    model = load(folder, experts="eager")
    total = 0.0
    for seed in range(batches):
        ids = token_ids(seed)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / batches
        loss.backward()
        total += loss.item()
    return total, {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _assert_same_gradients(step: Step | str, reference: Step | str) -> None:
    assert not isinstance(step, str), step
    assert not isinstance(reference, str), reference
    assert step[1].keys() == reference[1].keys()
    for name, gradient in reference[1].items():
        assert np.linalg.norm(step[1][name] - gradient) <= 1e-5 * np.linalg.norm(gradient) + 1e-12, name


def _assert_equal_to_transformers(
    ranks: RankPool, folder: Path, layout: dict[str, Any], experts: list[str], world_size: int = 2
) -> None:
    """Ours with each of `experts` against `all_to_all` with `eager`, and against one process."""
    cases = [({**layout, "ep_implementation": "all_to_all"}, "eager")]
    cases += [({**layout, "ep_implementation": "crossdock"}, name) for name in experts]
    results = ranks.run(world_size, _steps, str(folder), cases)
    batches = world_size // layout.get("tp_size", 1)
    loss, gradients = _one_process(folder, batches)
    for index in range(1, len(cases)):
        for theirs, *_, ours in ([result[0], result[index]] for result in results):
            assert not isinstance(ours, str), ours
            assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
            _assert_same_gradients(ours, theirs)
        _assert_same_gradients(results[0][index], (loss, gradients))
    assert np.mean([result[1][0] for result in results]) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "glm4_moe", "ernie4_5_moe"])
def test_ep2_gradients_equal_all_to_all_and_one_process(ranks: RankPool, tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path, family)
    _assert_equal_to_transformers(ranks, folder, SHARDED, ["eager", "grouped_mm", "batched_mm", "crossdock"])


def test_experts_with_biases_and_a_gate_of_their_own_through_our_dispatcher(ranks: RankPool, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gpt_oss")
    # Its eager experts take no id for "no route".
    _assert_equal_to_transformers(ranks, folder, SHARDED, ["eager", "grouped_mm", "crossdock"])


def test_tensor_parallel_ranks_share_a_batch(ranks: RankPool, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3_moe")
    _assert_equal_to_transformers(ranks, folder, TENSOR_PARALLEL, ["eager", "crossdock"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}], ids=["efsdp2", "tp2"]
)
def test_four_processes(ranks: RankPool, tmp_path: Path, layout: dict[str, int]) -> None:
    folder = write_model(tmp_path, "qwen3_moe")
    _assert_equal_to_transformers(ranks, folder, layout, ["eager", "crossdock"], world_size=4)


@pytest.mark.parametrize("experts", ["eager", "crossdock"])
def test_rank_whose_experts_get_no_token(ranks: RankPool, tmp_path: Path, experts: str) -> None:
    folder = write_model(tmp_path, "glm4_moe")
    weights = load_file(folder / "model.safetensors")
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        weights[name] = torch.tensor([9.0, 9.0, 0.0, 0.0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    _assert_equal_to_transformers(ranks, folder, SHARDED, [experts])
    _, gradients = _one_process(folder, 2)
    (down,) = (gradient for name, gradient in gradients.items() if name.endswith("experts.down_proj"))
    assert np.abs(down[:2]).max() > 0
    assert np.abs(down[2:]).max() == 0


def test_gradient_checkpointing_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3_moe")
    cases = [({**SHARDED, "ep_implementation": "crossdock"}, "crossdock")]
    for (plain,), (recomputed,) in zip(
        ranks.run(2, _steps, str(folder), cases), ranks.run(2, _steps, str(folder), cases, True), strict=True
    ):
        assert plain[0] == recomputed[0]
        _assert_same_gradients(recomputed, plain)


def test_bf16_mixed_precision_of_fsdp_is_as_exact_as_transformers_own(ranks: RankPool, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3_moe")
    layout = {**SHARDED, "fsdp_mixed_precision": True}
    cases = [({**layout, "ep_implementation": name}, "grouped_mm") for name in ("all_to_all", "crossdock")]
    cases.append(({**layout, "ep_implementation": "crossdock"}, "crossdock"))
    _, exact = _one_process(folder, 2)
    for steps in ranks.run(2, _steps, str(folder), cases):
        distances = [
            # A route that rounding flips moves single gradients far.
            np.median([np.linalg.norm(step[1][name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact])
            for step in steps
        ]
        assert min(distances) > 1e-4
        assert max(distances[1:]) < 1.3 * distances[0]


def _steps_with(folder: str, experts: list[str], options: dict[str, Any]) -> list[Step | str]:
    import crossdock
    from crossdock.integrations.options import PluginOptions

    crossdock.configure(**options)
    try:
        return _steps(folder, [({**SHARDED, "ep_implementation": "crossdock"}, name) for name in experts])
    finally:
        crossdock.configure(**asdict(PluginOptions()))


def test_tokens_travel_on_the_wire_that_is_configured(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, "qwen3_moe"))
    wires: list[dict[str, Any]] = [{}, {"wire_dtype": "bf16", "wire_directions": "both"}]
    ((exact,), _), ((rounded,), _) = (ranks.run(2, _steps_with, folder, ["crossdock"], wire) for wire in wires)
    assert not isinstance(exact, str), exact
    assert not isinstance(rounded, str), rounded
    for name, gradient in exact[1].items():
        assert np.linalg.norm(rounded[1][name] - gradient) <= 5e-2 * np.linalg.norm(gradient), name
    assert abs(rounded[0] - exact[0]) > 0, "nothing was rounded"


@pytest.mark.parametrize("options", [{"dispatcher": "auto"}, {"static_shapes": True}], ids=["auto", "static"])
def test_auto_and_static_shapes_give_what_alltoall_gives(
    ranks: RankPool, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = str(write_model(tmp_path, "qwen3_moe"))
    expected = ranks.run(2, _steps_with, folder, ["crossdock"], {})
    for (ours,), (theirs,) in zip(ranks.run(2, _steps_with, folder, ["crossdock"], options), expected, strict=True):
        assert not isinstance(ours, str), ours
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
        _assert_same_gradients(ours, theirs)


def test_options_that_cannot_work_are_refused_when_the_model_is_loaded(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, "qwen3_moe"))
    for options, said in (
        ({"static_shapes": True}, "static_shapes needs experts_implementation='crossdock'"),
        ({"dispatcher": "deepep"}, "needs the package deep_ep"),
    ):
        for (message,) in ranks.run(2, _steps_with, folder, ["eager"], options):
            assert isinstance(message, str)
            assert said in message


def _steps_by_deepep(folder: str) -> list[Step | str]:
    sys.modules["deep_ep"] = cast(Any, Double())
    try:
        return _steps_with(folder, ["crossdock"], {"dispatcher": "deepep", "deepep_num_sms": 8})
    finally:
        del sys.modules["deep_ep"]
        free_deepep_buffers()


def test_deepep_says_what_it_does_not_take(ranks: RankPool, tmp_path: Path) -> None:
    for (message,) in ranks.run(2, _steps_by_deepep, str(write_model(tmp_path, "qwen3_moe"))):
        assert isinstance(message, str)
        assert "dispatcher 'deepep' sends bfloat16, not torch.float32; use 'alltoall'" in message


def test_experts_that_ours_cannot_compute_are_refused_when_the_model_is_loaded(ranks: RankPool, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3_moe", hidden_act="mish")
    for (message,) in ranks.run(2, _steps, str(folder), [({**SHARDED, "ep_implementation": "crossdock"}, "crossdock")]):
        assert "Qwen3MoeExperts has the activation Mish" in message
        assert "ep_implementation='crossdock' works with all of them" in message


def _generate(folder: str, layout: dict[str, Any] | None, experts: str) -> list[int]:
    import crossdock.integrations.transformers  # noqa: F401

    model: Any = load(folder, layout, experts)
    # All ranks one prompt: transformers' generation under FSDP has each rank its own otherwise.
    ids = token_ids(3, batch=1, length=5)
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0].tolist()


# After the first step there is one token: a rank of `tp` has none to send.
@pytest.mark.parametrize("layout", [SHARDED, TENSOR_PARALLEL], ids=["fsdp", "tp"])
def test_generation_equals_one_process(ranks: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = str(write_model(tmp_path, "qwen3_moe"))
    expected = _generate(folder, None, "eager")
    assert len(expected) == 11
    layout = {**layout, "ep_implementation": "crossdock"}
    assert ranks.run(2, _generate, folder, layout, "crossdock") == [expected, expected]
