"""The experts of one MoE layer on a GPU: our Triton kernels beside the peers that are installed, and beside the bound.

    python -m benchmarks.expert_kernels [--rounds 15] [--shapes 30B-A3B ...] [--profile] [--write]

Forward, and forward and backward, in bfloat16, on the same tokens, routes, weights and output gradient. All take turns;
a ratio is taken within a round. Rates count `6 T K H I` operations forward and `18 T K H I` in all, whatever else a
variant computes. Peers: torch's `grouped_mm` as transformers calls it; Liger's fused experts and SonicMoE where they
are installed. Outputs and gradients of all must agree with those of a loop in float32. `bound` is one `mm` of about as
many operations, the best that this GPU's products reach. What the forward pass keeps is measured as memory, and
compared with `2 T H + 4 T K I` bytes and 16 per route.

`--device cpu` runs a tiny shape through everything, in Triton's interpreter (TRITON_INTERPRET=1): its times mean
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import activation
from benchmarks.results_file import result_row, spread, write_results
from crossdock.experts import ExpertParams, eager, triton
from crossdock.kernels import TileTable
from crossdock.routing import draw_zipf

SHAPES: dict[str, dict[str, int]] = {
    "30B-A3B": {"T": 16384, "H": 2048, "I": 768, "E": 128, "K": 8},
    "H4096": {"T": 16384, "H": 4096, "I": 512, "E": 128, "K": 8},
    "H7168, 8 local experts": {"T": 8192, "H": 7168, "I": 2048, "E": 8, "K": 1},
    "E256": {"T": 16384, "H": 2048, "I": 256, "E": 256, "K": 8},
    "few rows": {"T": 256, "H": 2048, "I": 768, "E": 128, "K": 8},
}
# Liger tries its tiles at every new shape, for minutes.
LIGER_SHAPES = ("30B-A3B",)
TINY = {"T": 48, "H": 32, "I": 16, "E": 4, "K": 2}
OURS, GROUPED_MM, LIGER, SONIC = "crossdock", "grouped_mm", "liger", "sonicmoe"
PASSES = ("forward", "forward and backward")
# TFLOP/s of the first shape, with even routing.
TARGETS = {"forward": 520.0, "forward and backward": 480.0}
GOALS = {LIGER: 1.05, GROUPED_MM: 2.0}
# Relative norm of the difference: products of bfloat16 values, intermediate results rounded to bfloat16.
TOLERANCE = 2e-2

Experts = Callable[[], Tensor]


class Variant(NamedTuple):
    """What one library makes of the same experts: `run` gives `y [T, H]`, `leaves` are what it is differentiated by.

    `as_ours`: gradients of `leaves` as those of tokens, weights and both parameters in our shapes.
    """

    run: Experts
    leaves: list[Tensor]
    as_ours: Callable[[Sequence[Tensor]], list[Tensor]]


class Case(NamedTuple):
    """Inputs of one measurement."""

    name: str
    sizes: dict[str, int]
    tokens: Tensor
    ids: Tensor
    weights: Tensor
    params: ExpertParams
    grad: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--profile", action="store_true", help="also where the time of ours goes, kernel by kernel")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/expert_kernels_DATE.json")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.expert_kernels needs a GPU: there is none here (--device cpu tries it)", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    shapes = {"tiny": TINY} if device.type == "cpu" else {name: SHAPES[name] for name in given.shapes}
    rows: list[dict[str, Any]] = []
    for name, sizes in shapes.items():
        for routing in ("even", "zipf"):
            case = make_case(f"{name} {sizes}, {routing} routing", sizes, routing, device)
            rows += compare(case, given.rounds, is_target=name in ("30B-A3B", "tiny") and routing == "even")
            if given.profile and device.type == "cuda" and routing == "even":
                profile(case)
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if given.write:
                write_results("expert_kernels", ["torch", "triton", "transformers", "liger-kernel", "sonic-moe"], rows)
    return 0 if all(row["results_agree"] for row in rows) else 1


def make_case(name: str, sizes: dict[str, int], routing: str, device: torch.device) -> Case:
    torch.manual_seed(0)
    num_tokens, hidden, inner, num_experts, top_k = (sizes[size] for size in "THIEK")

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(torch.bfloat16).requires_grad_()

    weights = torch.rand(num_tokens, top_k, device=device).requires_grad_()
    ids = draw_zipf(num_tokens, num_experts, top_k, 1.0 if routing == "zipf" else 0.0, 0, device)
    params = ExpertParams(
        draw(num_experts, hidden, 2 * inner, scale=hidden**-0.5), draw(num_experts, inner, hidden, scale=inner**-0.5)
    )
    return Case(name, sizes, draw(num_tokens, hidden), ids, weights, params, draw(num_tokens, hidden).detach())


def make_variants(case: Case) -> dict[str, Variant]:
    """Ours, and the peers that are here."""
    first, second = case.params[:2]
    assert first is not None
    assert second is not None
    own = [case.tokens, case.weights, first, second]
    ours = partial(triton, case.tokens, case.ids, case.weights, case.params, static=True, tiles=TileTable({}))
    variants = {OURS: Variant(ours, own, list)}
    # Both peers keep matrices the other way round.
    theirs = [nn.Parameter(matrix.detach().mT.contiguous()) for matrix in (first, second)]
    leaves = [case.tokens, case.weights, *theirs]

    def turned(grads: Sequence[Tensor]) -> list[Tensor]:
        return [*grads[:2], *(grad.mT for grad in grads[2:])]

    hidden, inner, num_experts = (case.sizes[size] for size in "HIE")
    config = SimpleNamespace(
        num_experts=num_experts,
        num_local_experts=num_experts,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation=GROUPED_MM,
    )
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(config)  # type: ignore[arg-type]
    experts.gate_up_proj, experts.down_proj = theirs
    variants[GROUPED_MM] = Variant(lambda: experts(case.tokens, case.ids, case.weights), leaves, turned)
    if case.tokens.is_cuda and find_spec("liger_kernel") and case.name.startswith(LIGER_SHAPES):
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # type: ignore[import-not-found]

        ids = case.ids.int()
        apply: Any = LigerFusedMoEFunction.apply
        variants[LIGER] = Variant(lambda: apply(case.tokens, *theirs, ids, case.weights), leaves, turned)
    if case.tokens.is_cuda and find_spec("sonicmoe"):
        routes = sonic_routes(case.ids)
        variants[SONIC] = Variant(lambda: sonic_experts(case.tokens, routes, case.weights, *theirs), leaves, turned)
    return variants


def sonic_experts(
    tokens: Tensor, routes: tuple[Tensor, Tensor], weights: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """SonicMoE as its package has it; `routes` are `sonic_routes`, matrices those of transformers."""
    from sonicmoe import moe_general_routing_inputs  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    return moe_general_routing_inputs(
        *(tokens, weights.flatten(), *routes),
        *(first.permute(1, 2, 0), None, second.permute(1, 2, 0), None),
        E=len(second),
        stream_id=torch.cuda.current_stream().cuda_stream,
        activation_type=ActivationType.SWIGLU,
        concat_layout=True,
    )[0]


def sonic_routes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token and expert of each route of `ids [T, K]`, int32, by token."""
    num_tokens, top_k = ids.shape
    token = torch.arange(num_tokens, device=ids.device, dtype=torch.int32).repeat_interleave(top_k)
    return token, ids.flatten().int()


def results(variant: Variant, grad: Tensor) -> list[Tensor]:
    """Output and gradients in our shapes."""
    y = variant.run()
    return [y.detach(), *variant.as_ours(torch.autograd.grad(y, variant.leaves, grad))]


def reference(case: Case) -> list[Tensor]:
    """Of a loop in float32."""
    leaves = [tensor.detach().float().requires_grad_() for tensor in (case.tokens, case.weights, *case.params[:2])]  # type: ignore[union-attr]
    y = eager(leaves[0], case.ids, leaves[1], ExpertParams(*leaves[2:]))
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad.float())]


def compare(case: Case, rounds: int, *, is_target: bool) -> list[dict[str, Any]]:
    """Check and time all in turn; prints, and returns a row for ours beside each other."""
    print(f"\n{case.name}", flush=True)
    wanted = reference(case)
    variants, differences = make_variants(case), {}
    for name, variant in list(variants.items()):
        try:
            got = results(variant, case.grad)
        except Exception as error:
            if name == OURS:
                raise
            # A peer that does not run here is no peer.
            print(f"{name:>12}: does not run: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            del variants[name]
            continue
        pairs = zip(got, wanted, strict=True)
        differences[name] = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
        del got
    del wanted
    kept = kept_bytes(variants[OURS], case)
    rows = []
    num_tokens, hidden, inner, _, top_k = (case.sizes[size] for size in "THIEK")
    operations = 6 * num_tokens * top_k * hidden * inner
    for which in PASSES:
        runs = {name: timed(variant, case.grad, which) for name, variant in variants.items()}
        count = operations * (1 if which == PASSES[0] else 3)
        runs["bound"] = bound(count, case.tokens.device)
        seconds = interleaved(runs, rounds, case.tokens.device)
        rates = {name: [count / each / 1e12 for each in taken] for name, taken in seconds.items()}
        for name, taken in rates.items():
            ratios = spread([own / theirs for own, theirs in zip(rates[OURS], taken, strict=True)])
            agree = max(differences[OURS], differences.get(name, 0.0)) <= TOLERANCE
            text = (
                f"{name:>12}: {statistics.median(taken):7.1f} TFLOP/s  {1e3 * statistics.median(seconds[name]):8.3f} ms"
            )
            if name != OURS:
                text += f"  ours is {ratios['median']:.3f} times as fast ({ratios['low']:.3f} to {ratios['high']:.3f})"
                goal = GOALS.get(name) if is_target else None
                rows.append(
                    result_row(
                        f"{case.name}, {which}", "TFLOP/s", rates[OURS], name, taken, ratios, agree=agree, goal=goal
                    )
                )
            print(f"{text}{'' if agree else '  RESULTS DIFFER'}  ({which})", flush=True)
        if is_target:
            rate = statistics.median(rates[OURS])
            row = {"case": f"{case.name}, {which}, rate", "figure": round(rate, 1), "unit": "TFLOP/s"}
            row |= {
                "goal": TARGETS[which],
                "met": rate >= TARGETS[which],
                "results_agree": differences[OURS] <= TOLERANCE,
            }
            rows.append(row)
    if kept is not None:
        limit = 2 * num_tokens * hidden + 4 * num_tokens * top_k * inner + 16 * num_tokens * top_k
        print(f"{'kept':>12}: {kept / 2**20:.1f} MiB, {kept / limit:.3f} of the limit", flush=True)
        row = {"case": f"{case.name}, kept for the backward pass", "figure": kept, "unit": "bytes", "goal": limit}
        # Allocations are rounded up to 512 bytes.
        rows.append(row | {"met": kept <= limit + 8192, "results_agree": True})
    return rows


def kept_bytes(variant: Variant, case: Case) -> int | None:
    """Memory that a forward pass leaves taken, the tokens included, the output not."""
    if not case.tokens.is_cuda:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = variant.run()
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated() - before
    return taken - y.numel() * y.itemsize + case.tokens.numel() * case.tokens.itemsize


def timed(variant: Variant, grad: Tensor, which: str) -> Callable[[], object]:
    if which == PASSES[0]:
        return variant.run
    return lambda: torch.autograd.grad(variant.run(), variant.leaves, grad)


def bound(operations: int, device: torch.device) -> Callable[[], object]:
    """One product of about as many operations, rows as long as they need be."""
    side = 8192 if device.type == "cuda" else 64
    rows = max(16, operations // (2 * side * side) // 16 * 16)
    left, right = (torch.randn(size, side, device=device).to(torch.bfloat16) for size in (rows, side))
    return lambda: left @ right


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each in each round; another goes first each time."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:
        runs[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(elapsed(runs[name], device))
    return seconds


def elapsed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds on the device."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    return activation.elapsed(run)


def profile(case: Case) -> None:
    """Print where the time of one forward and backward pass of ours goes."""
    from torch.profiler import ProfilerActivity, profile

    variant = make_variants(case)[OURS]
    results(variant, case.grad)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        results(variant, case.grad)
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=40), flush=True)


if __name__ == "__main__":
    sys.exit(main())
