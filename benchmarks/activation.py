"""SwiGLU times the routing weight on `[N, 2I]`, forward and backward: the kernel beside eager and compiled torch.

    python -m benchmarks.activation [--rounds 21] [--shapes 16384x768 ...] [--activation silu] [--write]

Needs a GPU. All take turns on the same rotating input sets, more of them than the L2 cache holds; a ratio is taken
within a round. Outputs and all gradients, the weight's too, must agree with the reference in float64. The bound is each
input read once and each output written once at the bandwidth that a large copy reaches on this GPU. A round's calls are
captured in a CUDA graph, so that the figures hold no time of the host.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results_file import result_row, spread, write_results
from crossdock.kernels import get_fused_activation_fn

SHAPES = ["16384x768", "131072x768", "16384x2048", "8192x14336", "1000x768"]
NUM_LAYERS = 48
OURS = "crossdock"
# Relative norm of the difference: one rounding to bfloat16.
TOLERANCE = 4e-3

Activation = Callable[[Tensor, None, Tensor], Tensor]
Graphs = dict[str, Callable[[], None]]


class Inputs(NamedTuple):
    """One set: `halves [N, 2I]` and `grad [N, I]` bfloat16, `prob [N]` fp32."""

    halves: Tensor
    prob: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, rows: int, width: int) -> Inputs:
        halves, grad = (torch.randn(rows, each, device="cuda", dtype=torch.bfloat16) for each in (2 * width, width))
        return cls(halves.requires_grad_(), torch.rand(rows, device="cuda").requires_grad_(), grad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x width, such as 16384x768")
    parser.add_argument("--activation", choices=("silu", "quick_geglu"), default="silu")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/activation_DATE.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.activation needs a GPU: there is none here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a large copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    reference = get_fused_activation_fn(False, arguments.activation)
    functions: dict[str, Activation] = {
        OURS: get_fused_activation_fn(True, arguments.activation),
        "eager": reference,
        "compiled": torch.compile(reference, dynamic=False),
    }
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        rows += compare(shape, functions, arguments.activation, arguments.rounds, bandwidth)
        torch.cuda.empty_cache()
        if arguments.write:
            write_results("activation", ["torch", "triton", "crossdock"], rows)
    return 0 if all(row["results_agree"] for row in rows) else 1


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a 4 GiB copy."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source)) for _ in range(8)]
    return 2 * len(source) / statistics.median(times[3:])


def elapsed(run: Callable[[], object]) -> float:
    """Seconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def compare(
    shape: str, functions: dict[str, Activation], activation: str, rounds: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Time all in turn, print, and return a row for ours beside each other, forward and backward."""
    num_rows, width = map(int, shape.split("x"))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    values = num_rows * width * 2
    num_sets = max(4, -(-4 * cache // (2 * values)))
    sets = [Inputs.draw(num_rows, width) for _ in range(num_sets)]
    differences = {name: difference(function, functions["eager"], sets[0]) for name, function in functions.items()}
    # Gate, up and output; gate, up, the incoming gradient and two outgoing ones; weights and their gradients.
    moved = {"forward": 3 * values + 4 * num_rows, "backward": 5 * values + 8 * num_rows}
    rows = []
    for direction, num_bytes in moved.items():
        bound = num_bytes / bandwidth
        graphs = {name: capture(function, sets, direction == "backward") for name, function in functions.items()}
        seconds = interleaved(graphs, rounds, num_sets)
        seconds["bound"] = [bound] * rounds
        case = f"{activation} {num_rows} x {width} bfloat16, {direction}"
        saved = statistics.median(seconds["eager"]) - statistics.median(seconds[OURS])
        print(f"\n{case}, {num_sets} input sets, {num_bytes / 1e6:.1f} MB to be moved", flush=True)
        print(f"{NUM_LAYERS} layers take {1e3 * NUM_LAYERS * saved:.2f} ms less than eager", flush=True)
        for name, taken in seconds.items():
            ratios = spread([theirs / own for theirs, own in zip(taken, seconds[OURS], strict=True)])
            agree = max(differences[OURS], differences.get(name, 0.0)) <= TOLERANCE
            print(
                f"{name:>12}: {1e6 * statistics.median(taken):9.1f} us  its time over ours {ratios['median']:.3f} "
                f"({ratios['low']:.3f} to {ratios['high']:.3f})" + ("" if agree else "  RESULTS DIFFER"),
                flush=True,
            )
            if name == OURS:
                continue
            goal = _goal(name, shape, direction)
            own, taken = ([1e6 * each for each in seconds[which]] for which in (OURS, name))
            row = result_row(case, "us", own, name, taken, ratios, agree=agree, goal=goal)
            rows.append(row | {"bytes": num_bytes, "saved_ms_48_layers": round(1e3 * NUM_LAYERS * saved, 3)})
    return rows


def _goal(peer: str, shape: str, direction: str) -> float:
    """Of many rows 85 % of the bandwidth of a copy, of the usual ones 80 %; of the others, not to be slower."""
    if peer == "bound":
        return 0.85 if shape == "131072x768" else 0.8
    return 3.2 if (peer, shape, direction) == ("eager", "16384x768", "forward") else 1.0


def difference(function: Activation, reference: Activation, inputs: Inputs) -> float:
    """The largest relative norm of the differences from float64, over output and gradients."""
    out = function(inputs.halves, None, inputs.prob)
    got = [out, *torch.autograd.grad(out, inputs[:2], inputs.grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
    out = reference(exact[0], None, exact[1])
    wanted = [out, *torch.autograd.grad(out, exact, inputs.grad.double())]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


def capture(function: Activation, sets: list[Inputs], backward: bool) -> Callable[[], None]:
    """A graph of one call per input set: forward alone, or the backward pass of calls that came before it."""

    def forward() -> list[Tensor]:
        return [function(inputs.halves, None, inputs.prob) for inputs in sets]

    def gradients(outs: list[Tensor]) -> None:
        for out, inputs in zip(outs, sets, strict=True):
            torch.autograd.grad(out, inputs[:2], inputs.grad, retain_graph=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # Autograd runs a node's backward on the stream of its forward: both on the stream of the capture.
    with torch.cuda.stream(side):
        outs = forward()
        for _ in range(3):
            gradients(outs)
            outs = forward()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            gradients(outs) if backward else forward()
    torch.cuda.current_stream().wait_stream(side)

    def replay() -> None:
        assert len(outs) == len(sets)  # keeps alive what the graph reads
        graph.replay()

    return replay


def interleaved(graphs: Graphs, rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call in each round; another goes first each time."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for replay in graphs.values():
        replay()
    torch.cuda.synchronize()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(elapsed(graphs[name]) / calls)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
