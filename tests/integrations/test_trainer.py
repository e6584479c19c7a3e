"""transformers' `Trainer` with the plug-in, and our checkpoints of its runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from crossdock.checkpoint import CheckpointError
from crossdock.integrations.trainer import CheckpointCallback
from tests.integrations.tiny_models import load, write_model
from tests.integrations.trainer_runs import Sequences, StopAt, distance, launched, train
from tests.ranks import RankPool

LAYOUT: dict[str, Any] = {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "crossdock"}


def _saving(folder: str, stop_at: int | None, save_steps: int = 3) -> list[TrainerCallback]:
    return [CheckpointCallback(folder, save_steps=save_steps), StopAt(stop_at)]


def _none() -> list[TrainerCallback]:
    return []


def test_trainer_losses_equal_transformers_own_dispatch(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "model", "qwen3_moe"))
    theirs, ours = (
        ranks.run(2, train, folder, str(tmp_path / "out"), LAYOUT | {"ep_implementation": name}, _none)[0]
        for name in ("all_to_all", "crossdock")
    )
    assert list(ours["losses"]) == [1, 2, 3, 4, 5, 6]
    for key in ("losses", "norms"):
        assert list(ours[key].values()) == pytest.approx(list(theirs[key].values()), rel=1e-4)


# Inside an epoch, at the end of one, and with a last step of an epoch that accumulates fewer micro-batches.
@pytest.mark.parametrize(
    ("sequences", "arguments"), [(20, {}), (12, {}), (22, {"gradient_accumulation_steps": 4})], ids=str
)
def test_resumed_run_continues_exactly(
    ranks: RankPool, tmp_path: Path, sequences: int, arguments: dict[str, Any]
) -> None:
    # Dropout shows whether the random state is what it was.
    folder = str(write_model(tmp_path / "model", "qwen3_moe", attention_dropout=0.2))
    run = partial(train, sequences=sequences, **arguments)
    places = folder, str(tmp_path / "out"), LAYOUT
    straight = ranks.run(2, run, *places, partial(_saving, str(tmp_path / "a"), None))
    stopped = ranks.run(2, run, *places, partial(_saving, str(tmp_path / "b"), 3))
    resumed = ranks.run(2, partial(run, resume=True), *places, partial(_saving, str(tmp_path / "b"), None))
    assert list(stopped[0]["losses"]) == [1, 2, 3]
    for whole, second in zip(straight, resumed, strict=True):
        for key in ("losses", "norms", "rates"):
            assert second[key] == whole[key], key
        assert second["epoch"] == whole["epoch"]
        assert distance(second["weights"], whole["weights"]) == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["step-00000003", "step-00000006"]


def test_run_resumes_on_one_process_and_on_two_again(ranks: RankPool, tmp_path: Path) -> None:
    folder, output = str(write_model(tmp_path / "model", "qwen3_moe")), str(tmp_path / "out")
    # The global batch stays: 2 x 2 sequences, then 1 x 4.
    layouts = [(2, LAYOUT, 2), (1, None, 4), (2, LAYOUT, 2)]
    # No incomplete batch, which accelerate would fill up from the epoch's start on two processes.
    whole_batches = partial(train, sequences=12)
    straight = ranks.run(2, whole_batches, folder, output, LAYOUT, partial(_saving, str(tmp_path / "a"), None))[0]
    last: dict[str, Any] = {}
    for part, (world_size, layout, batch) in enumerate(layouts):
        run = partial(whole_batches, resume=part > 0, per_device_train_batch_size=batch)
        callbacks = partial(_saving, str(tmp_path / "b"), 2 * part + 2, 2)
        if world_size == 1:
            # No process group at all.
            last = run(folder, output, layout, callbacks)
        else:
            last = ranks.run(world_size, run, folder, output, layout, callbacks)[0]
    assert list(last["losses"]) == [1, 2, 3, 4, 5, 6]
    assert list(last["losses"].values()) == pytest.approx(list(straight["losses"].values()), rel=1e-4)
    assert distance(last["weights"], straight["weights"]) < 1e-3


@pytest.mark.slow
def test_checkpoint_of_four_processes_loads_on_two(ranks: RankPool, tmp_path: Path) -> None:
    folder, output = str(write_model(tmp_path / "model", "qwen3_moe")), str(tmp_path / "out")
    callbacks = partial(_saving, str(tmp_path / "a"), None)
    # Experts are sharded over two meshes dimensions here, the same dimension of the tensor in both.
    run = partial(train, per_device_train_batch_size=1)
    saved = ranks.run(4, run, folder, output, LAYOUT | {"fsdp_size": 4}, callbacks)[0]
    # All steps are done: what is loaded is what is returned.
    loaded = ranks.run(2, partial(train, resume=True), folder, output, LAYOUT, callbacks)[0]
    assert distance(loaded["weights"], saved["weights"]) == 0


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert CheckpointCallback(tmp_path / "none").resume_folder() is None


@pytest.mark.parametrize("name", ["save_steps", "keep_latest_k"])
def test_negative_settings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = -1; valid: 0 or more"):
        CheckpointCallback(tmp_path, **{name: -1})


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "model", "qwen3_moe"))
    train(folder, str(tmp_path / "out"), None, partial(_saving, str(tmp_path / "a"), None), max_steps=1)
    state = tmp_path / "a" / "step-00000001" / "state.json"
    assert json.loads(state.read_text())["counters"]["trainer_state"]["global_step"] == 1
    next(state.parent.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001: .*safetensors is missing"):
        CheckpointCallback(tmp_path / "a").resume_folder()


def test_optimizer_whose_state_is_no_tensor_is_refused(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "model", "qwen3_moe"))
    with pytest.raises(CheckpointError, match=r"Adafactor keeps 'step' as int"):
        train(folder, str(tmp_path / "out"), None, partial(_saving, str(tmp_path / "a"), None), optim="adafactor")


def _accelerate(folder: str, implementation: str) -> list[float]:
    """A loop as accelerate's users write it; losses averaged over the ranks."""
    from accelerate import Accelerator

    import crossdock.integrations.transformers  # noqa: F401

    with launched():
        accelerator = Accelerator(cpu=True)
        model = load(folder, LAYOUT | {"ep_implementation": implementation}, "eager")
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False))
        loader = accelerator.prepare_data_loader(DataLoader(Sequences(12), batch_size=2))
        losses = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            mean: Any = accelerator.reduce(loss.detach(), "mean")
            losses.append(mean.item())
        dist.barrier()
        return losses


def test_accelerate_loop_equals_transformers_own_dispatch(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, "qwen3_moe"))
    theirs = ranks.run(2, _accelerate, folder, "all_to_all")
    ours = ranks.run(2, _accelerate, folder, "crossdock")
    assert len(ours[0]) == 3
    assert ours[0] == ours[1] == pytest.approx(theirs[0], rel=1e-4)
