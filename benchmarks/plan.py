"""`crossdock plan` beside reality: runs on a CPU that are counted, a published table of GPUs, and how long it takes.

    python -m benchmarks.plan [--ranks]

`--ranks` runs four gloo processes for each of the layouts that tests/tools/test_plan_reality.py has, as that does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results_file import write_results
from crossdock.config import Config, load_config
from crossdock.parallel import ParallelDims
from crossdock.tools.plan import (
    Estimator,
    PlanOptions,
    calibrated_on_run,
    find_device,
    make_plan,
    plan_model,
    read_devices,
    read_model,
)
from crossdock.train.dry_run import dry_run

__all__ = ["PUBLISHED", "PUBLISHED_DEFAULT", "Prediction", "predict_default", "predict_published"]

PUBLISHED = {
    8: (14796.0, 167.93),
    16: (14380.0, 138.75),
    32: (14276.0, 124.58),
    64: (14107.0, 117.50),
    128: (13856.0, 114.78),
}
"""torchtitan's Qwen3-30B-A3B on B200, DeepEP, EP 8, local batch 8 x 4096: by GPUs, tokens per second and GPU, GiB."""
PUBLISHED_DEFAULT = 9930.0
"""Tokens per second and GPU of the same on 8 GPUs, with its default dispatcher."""

_GIB = 2**30
_LARGE = (
    *("--model.flavor", "235B-A22B", "--training.dtype", "bfloat16", "--training.seq-len", "4096"),
    *("--training.local-batch-size", "1", "--activation-checkpoint.mode", "full"),
    *("--parallelism.expert-parallel-degree", "64"),
)


class Prediction(NamedTuple):
    """Of so many GPUs: tokens per second and GPU, and GiB."""

    tokens_per_second: float
    memory_gib: float


def predict_published() -> dict[int, Prediction]:
    """Every row of the table, from the first one: activation bytes per token and the share of the peak."""
    config, estimator = _published()
    return {ranks: _predict(estimator, config, ranks) for ranks in PUBLISHED}


def predict_default() -> float:
    """Of the default dispatcher on 8 GPUs: the same, but a row for each of a token's experts."""
    config, estimator = _published()
    dims = ParallelDims(8, ep=8)
    estimate = estimator.estimate(config, dims)
    routes = estimate.routes
    more = (sum(routes.routes) - routes.routes[0]) / (sum(routes.rows) - routes.rows[0])
    seconds = estimate.work.step + estimate.flows["expert exchange"].seconds * (more - 1)
    return estimate.tokens / seconds / dims.world_size


def _published() -> tuple[Config, Estimator]:
    arguments = (
        *("--model.flavor", "30B-A3B", "--training.dtype", "bfloat16", "--training.seq-len", "4096"),
        *("--training.local-batch-size", "8", "--activation-checkpoint.mode", "selective"),
        *("--parallelism.expert-parallel-degree", "8"),
    )
    config = load_config(None, list(arguments))
    estimator = Estimator(read_model(plan_model(config)), find_device("b200", read_devices()))
    rate, memory = PUBLISHED[8]
    estimator.calibration = calibrated_on_run(
        estimator, config, ParallelDims(8, ep=8), tokens_per_second=rate, memory_bytes=memory * _GIB
    )
    return config, estimator


def _predict(estimator: Estimator, config: Config, ranks: int) -> Prediction:
    estimate = estimator.estimate(config, ParallelDims(ranks, ep=8))
    return Prediction(estimate.tokens_per_second, estimate.memory.total / _GIB)


def _row(case: str, unit: str, ours: float, theirs: float, goal: float | None) -> dict[str, Any]:
    """A prediction beside what it predicts; `ratio` is the one over the other."""
    error = abs(ours / theirs - 1)
    row = {"case": case, "figure": round(ours, 2), "unit": unit, "peer": "published", "peer_figure": theirs}
    row["ratio"] = round(ours / theirs, 4)
    return row if goal is None else row | {"goal": f"within {100 * goal:g} %", "met": error <= goal}


def _published_rows() -> list[dict[str, Any]]:
    _, estimator = _published()
    calibration = estimator.calibration
    assert calibration.achieved is not None
    assert calibration.activation_bytes is not None
    rows = []
    for ranks, (rate, memory) in predict_published().items():
        of_rate, of_memory = PUBLISHED[ranks]
        calibrated = ranks == 8
        case = f"Qwen3-30B-A3B on {ranks} B200" + (" (calibrated here)" if calibrated else "")
        rows.append(_row(f"{case}, speed", "tokens/s/GPU", rate, of_rate, None if calibrated else 0.03))
        rows.append(_row(f"{case}, memory", "GiB", memory, of_memory, None if calibrated else 0.02))
    default = _row("its default dispatcher on 8 B200", "tokens/s/GPU", predict_default(), PUBLISHED_DEFAULT, None)
    rows.append(default | {"left out": "host syncs, unfused permutation"})
    numbers = {"achieved": round(calibration.achieved, 4), "KiB per token": round(calibration.activation_bytes / 1024)}
    rows.append({"case": "calibration by the row of 8", "figure": numbers, "unit": "share of peak, activations"})
    return rows


def _large_rows(folder: Path) -> list[dict[str, Any]]:
    """1,024 ranks, 94 layers, 4,096 experts: seconds, search and pipelines included."""
    assets = _many_experts(folder)
    config = load_config(None, [*_LARGE[2:], "--model.hf-assets-path", str(assets)])
    began, cpu = time.perf_counter(), time.process_time()
    options = PlanOptions(1024, find_device("b200", read_devices()), search=True)
    plan = make_plan(config, options, dry_run)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert plan.found is not None
    deepest = max((each.dims.pp for each in plan.found.ranked), default=1)
    case = "plan with search: 1,024 ranks, 94 layers, 4,096 experts"
    row = {"case": case, "figure": round(seconds, 1), "unit": "s", "goal": "under 60", "met": seconds < 60}
    load = {"CPU seconds": round(cpu, 1), "load average": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    return [
        row | load | {"combinations": plan.found.tried, "fit": plan.found.fitting, "largest pp of the best": deepest}
    ]


def _many_experts(folder: Path) -> Path:
    from crossdock.models import FAMILIES

    hf_config = FAMILIES["qwen3"].hf_config("235B-A22B")
    hf_config.num_experts = 4096  # type: ignore[attr-defined]
    hf_config.save_pretrained(folder)
    return folder


def _counted_rows() -> list[dict[str, Any]]:
    """Runs of four gloo processes, counted, beside their dry runs."""
    from tests.ranks import RankPool
    from tests.tiny import write_assets
    from tests.tools.plan_runs import SIZES, cache_beside, counted_run, predicted, sent_by_dimension
    from tests.tools.test_plan_reality import LAYOUTS

    rows = []
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        assets = write_assets(Path(folder, "assets"), **SIZES)
        cache = cache_beside(assets)
        for number, (layout, overrides) in enumerate(LAYOUTS.items()):
            run = pool.run(4, counted_run, str(assets), cache, str(Path(folder, f"run-{number}")), overrides)
            plans = [predicted(str(assets), cache, overrides, 4, rank) for rank in range(4)]
            ratios = [plan.counted.peak / real["peak"] for plan, real in zip(plans, run, strict=True)]
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            alike = all(
                sent_by_dimension(plan.counted) == real["sent"]
                and (plan.within, plan.between, plan.metadata) == real["traffic"]
                for plan, real in zip(plans, run, strict=True)
            )
            row = {"case": f"4 CPU processes, {layout}", "figure": round(plans[0].counted.peak / 1e6, 3)}
            row |= {"unit": "MB at the peak", "peer": "counted in a run", "peer_figure": round(run[0]["peak"] / 1e6, 3)}
            row |= {"ratio": round(worst, 4), "bytes sent equal": alike, "goal": "within 5 %"}
            rows.append(row | {"met": alike and abs(worst - 1) <= 0.05})
    pool.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", action="store_true", help="run and count four processes, too")
    rows = _published_rows()
    counts = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder:
        rows += _large_rows(Path(folder))
    if counts:
        rows += _counted_rows()
    for row in rows:
        print({name: value for name, value in row.items() if name not in ("goal",)})
    print(write_results("plan", ["torch", "transformers"], rows))


if __name__ == "__main__":
    main()
