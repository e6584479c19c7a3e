"""One-sided dispatch and combine of several virtual ranks on one GPU, beside the bandwidth of a copy.

    python -m benchmarks.symmetric [--ranks 8] [--tokens 4096] [--hidden 7168 2048] [--wire same fp8] [--write]
    python -m benchmarks.symmetric --processes 4     # as many processes on one GPU, by torch's symmetric memory
    TRITON_INTERPRET=1 python -m benchmarks.symmetric --device cpu --ranks 3 --tokens 20 --hidden 256 --rounds 1

Needs a GPU; `--device cpu` runs all of it but the clock in Triton's interpreter, in tiny sizes: no figure of that means
anything. Each rank has a stream and buffers of its own; peers' memory is that of the same GPU, so what is measured is
the kernels, not NVLink.

**Bytes that must move**, of all ranks together, with `N` tokens, `P` (token, rank) pairs that the routing needs, `w`
bytes of values in a row and `b` of a row on the wire (fewer in FP8), and `K` routes of 4 bytes for the id and 4 for the
weight while they travel, 8 and 4 as tensors:

    dispatch   N w     tokens are read once, however many ranks need them
               P b     and written to each rank's buffer once
               P b     where they are read,
               P w     to be written to a tensor: the buffer is used again at once, and the experts' backward pass needs
                       what came in it
               + K (12 N + 8 P + 8 P + 12 P) for routes
    combine    P w     results are read,
               P b     written to a buffer that peers can read,
               P b     read there once each,
               N w     and their sums written

`least` is what any way to do it moves: `N w + P w` in each direction, as if experts could read and write peers' memory.
A figure is a time; its ratio is the bytes over the time over the bandwidth of a 4 GiB copy in the same run, read plus
written. Results are compared with torch's own operations, bit by bit, in this run, from buffers full of NaN.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks import activation
from benchmarks.results_file import result_row, spread, write_results
from crossdock.comm import GpuMemory, PeerMemory, VirtualRanks
from crossdock.dispatch import ExchangeBuffers
from crossdock.kernels import dequantize_fp8, quantize_fp8_reference
from crossdock.kernels.symmetric import Places, RowLayout, kernels_run, place_tokens

GOAL = 0.7
WIRES = {"same": None, "fp8": torch.float8_e4m3fn}
_TIMEOUT = 20.0


class Moved(NamedTuple):
    """Bytes of all ranks, read plus written: of this way to do it, and of any."""

    moved: int
    least: int


def bytes_moved(layout: RowLayout, itemsize: int, num_tokens: int, pairs: int) -> dict[str, Moved]:
    """As derived above, for `num_tokens` tokens of all ranks that need `pairs` rows; `itemsize` of the activations."""
    values, wire = layout.hidden_size * itemsize, layout.hidden_size * layout.wire.itemsize
    if layout.is_fp8:
        wire += 4 * -(-layout.hidden_size // 128)
    routes = layout.top_k * (12 * num_tokens + 28 * pairs)
    least = (num_tokens + pairs) * values
    dispatch = Moved(num_tokens * values + 2 * pairs * wire + pairs * values + routes, least)
    combine = Moved(pairs * values + 2 * pairs * wire + num_tokens * values, least)
    both = Moved(dispatch.moved + combine.moved, 2 * least)
    return {"dispatch": dispatch, "combine": combine, "dispatch and combine": both}


class Rank(NamedTuple):
    """One rank's inputs, `x [T, H]` bfloat16, `slot_ids [T, K]`, `weights [T, K]`, and its buffers and stream."""

    x: Tensor
    slot_ids: Tensor
    weights: Tensor
    buffers: ExchangeBuffers
    stream: Any

    def on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class World:
    """Ranks that dispatch and combine; `rows[r]` is how many come to rank `r`."""

    def __init__(
        self,
        memories: Sequence[PeerMemory],
        layout: RowLayout,
        slots: int,
        device: torch.device,
        which: Sequence[int] | None = None,
    ) -> None:
        self.layout, self.slots, self.device, num_ranks = layout, slots, device, layout.num_ranks
        drawn = [self._draw(rank) for rank in range(num_ranks)]
        places = [place_tokens(slot_ids, slots, num_ranks) for _, slot_ids, _ in drawn]
        counts = torch.stack([place.counts for place in places])
        self.pairs, self.rows = int(counts.sum()), counts.sum(dim=0).tolist()
        self.sources = drawn
        self.ranks = []
        for rank, memory in zip(which if which is not None else range(num_ranks), memories, strict=True):
            buffers = ExchangeBuffers(memory, num_ranks, 2, layout.slot_bytes, device, _TIMEOUT, side_stream=False)
            buffers.window.own[buffers.ring.first_byte :] = 0xFF  # NaN, and ids that no rank has
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            self.ranks.append(Rank(*drawn[rank], buffers, stream))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _draw(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        layout, generator = self.layout, torch.Generator().manual_seed(rank)
        shape = layout.capacity, layout.hidden_size
        x = torch.randn(shape, generator=generator).to(torch.bfloat16)
        scores = torch.rand(layout.capacity, layout.num_ranks * self.slots, generator=generator)
        weights = torch.rand(layout.capacity, layout.top_k, generator=generator)
        return x.to(self.device), scores.topk(layout.top_k, dim=1).indices.to(self.device), weights.to(self.device)

    def phase(self, run: Callable[[int, Rank], Any]) -> list[Any]:
        """`run` for each rank on its stream: all of them after what was before, and before what comes."""
        results = []
        current = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        for index, rank in enumerate(self.ranks):
            if current is not None:
                rank.stream.wait_stream(current)
            with rank.on_stream():
                results.append(run(index, rank))
        for rank in self.ranks:
            if current is not None:
                current.wait_stream(rank.stream)
        return results

    def dispatch(self) -> tuple[list[Places], list[Any]]:
        """Where tokens went, and what arrived."""

        def begin(_: int, rank: Rank) -> Any:
            places = place_tokens(rank.slot_ids, self.slots, self.layout.num_ranks)
            sent = rank.buffers.send(rank.x, places, self.layout, rank.slot_ids, rank.weights, self.slots)
            return places, sent

        def end(index: int, rank: Rank) -> Any:
            return begun[index][1].receive(self.layout, None, self.rows[rank.buffers.window.rank], torch.bfloat16)

        begun = self.phase(begin)
        return [places for places, _ in begun], self.phase(end)

    def combine(self, places: list[Places], arrived: list[Any], ys: list[Tensor]) -> list[Tensor]:
        begun = self.phase(lambda index, rank: rank.buffers.offer(ys[index], arrived[index].segments, self.layout))
        return self.phase(lambda index, _: begun[index].collect(self.layout, places[index].row, torch.bfloat16)[0])

    def agrees(self) -> bool:
        """Whether what arrives, and the sums of other rows that go back, are those of torch's own operations."""
        places, arrived = self.dispatch()
        ys = [torch.randn(rows.tokens.shape, device=self.device).to(torch.bfloat16) for rows in arrived]
        outs = self.combine(places, arrived, ys)
        right = []
        for index, rank in enumerate(self.ranks):
            number = rank.buffers.window.rank
            x, ids, weights = (torch.cat(parts) for parts in zip(*self.sources, strict=True))
            own = ids // self.slots == number
            needed = own.any(dim=1)
            rows = arrived[index]
            right += [
                torch.equal(rows.tokens, self._coded(x[needed])),
                torch.equal(rows.slot_ids, (ids - number * self.slots).masked_fill(~own, -1)[needed]),
                torch.equal(rows.weights, weights.masked_fill(~own, 0)[needed]),
            ]
        if len(self.ranks) == self.layout.num_ranks:  # else other processes have the other rows
            right += [torch.equal(out, wanted) for out, wanted in zip(outs, self._sums(ys), strict=True)]
        return all(right) and all(rank.buffers.status.code == 0 for rank in self.ranks)

    def _coded(self, rows: Tensor) -> Tensor:
        return dequantize_fp8(*quantize_fp8_reference(rows), rows.dtype) if self.layout.is_fp8 else rows

    def _sums(self, ys: list[Tensor]) -> list[Tensor]:
        """Each rank's sums of `ys`, in rank order and fp32."""
        capacity = self.layout.capacity
        totals = torch.zeros(capacity * self.layout.num_ranks, self.layout.hidden_size, device=self.device)
        ids = torch.cat([slot_ids for _, slot_ids, _ in self.sources])
        for number, y in enumerate(ys):
            tokens = (ids // self.slots == number).any(dim=1).nonzero().flatten()
            totals[tokens] += self._coded(y).float()
        return list(totals.to(torch.bfloat16).split(capacity))


def elapsed(run: Callable[[], object]) -> float:
    """Seconds on the device; without one, that `run` ran, and 1."""
    if not torch.cuda.is_available():
        run()
        return 1.0
    return activation.elapsed(run)


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`run` as a CUDA graph, so that no time of the host is in it; on a CPU as it is."""
    if device.type == "cpu":
        return lambda: (run(), None)[1]
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> None:
        assert kept is not None  # what the graph writes to
        graph.replay()

    return replay


def measure(world: World, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, taking turns."""
    places, arrived = world.dispatch()
    ys = [rows.tokens.clone() for rows in arrived]

    def both() -> list[Tensor]:
        places, arrived = world.dispatch()
        return world.combine(places, arrived, [rows.tokens for rows in arrived])

    runs = {
        "dispatch": capture(world.dispatch, world.device),
        "combine": capture(lambda: world.combine(places, arrived, ys), world.device),
        "dispatch and combine": capture(both, world.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            seconds[name].append(elapsed(run))
    return {name: taken[2:] for name, taken in seconds.items()}


def compare(
    arguments: argparse.Namespace, hidden: int, wire: str, bandwidth: float
) -> tuple[bool, list[dict[str, Any]]]:
    """Check, time and print. Whether results agree; a row for each direction beside the copy, and beside the least."""
    device = torch.device(arguments.device)
    layout = RowLayout(
        arguments.ranks, arguments.tokens, hidden, arguments.top_k, WIRES[wire] or torch.bfloat16, torch.float32
    )
    memory = VirtualRanks(layout.num_ranks)
    world = World(
        [memory.of(rank) for rank in range(layout.num_ranks)], layout, arguments.experts // layout.num_ranks, device
    )
    agree = world.agrees()
    seconds = measure(world, arguments.rounds)
    agree = agree and world.agrees()
    num_tokens = layout.num_ranks * layout.capacity
    sizes = f"{layout.num_ranks} ranks x {layout.capacity} tokens, H {hidden}, K {layout.top_k} of {arguments.experts}"
    print(f"\n{sizes}, {wire}: {world.pairs / num_tokens:.2f} ranks per token", flush=True)
    rows = []
    for name, moved in bytes_moved(layout, 2, num_tokens, world.pairs).items():
        taken = seconds[name]
        if device.type == "cpu":  # whose clock says nothing
            print(f"{name:>20}: {moved.moved} bytes, {moved.least} at least; results {'agree' if agree else 'DIFFER'}")
            continue
        for peer, num_bytes, goal in (("copy", moved.moved, GOAL), ("least bytes, copied", moved.least, None)):
            bound = num_bytes / bandwidth
            ratios = spread([bound / each for each in taken])
            print(
                f"{name:>20}: {1e6 * statistics.median(taken):9.1f} us  {num_bytes / 2**20:9.1f} MiB  "
                f"{ratios['median']:.3f} of {peer}" + ("" if agree else "  RESULTS DIFFER"),
                flush=True,
            )
            case = f"{name}, {sizes}, wire {wire}"
            times = [1e6 * each for each in taken], [1e6 * bound] * len(taken)
            rows.append(result_row(case, "us", times[0], peer, times[1], ratios, agree=agree, goal=goal))
    return agree, rows


def _process(rank: int, num_ranks: int, store: str, hidden: int) -> None:
    """One of several processes on one GPU: time-sliced, so that only results are looked at."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    torch.cuda.set_device(0)
    assert dist.group.WORLD is not None
    layout = RowLayout(num_ranks, 64, hidden, 4, torch.bfloat16)
    world = World([GpuMemory(dist.group.WORLD)], layout, 4, torch.device("cuda", 0), [rank])
    agree = all(world.agrees() for _ in range(5))
    print(f"process {rank}: results {'agree' if agree else 'DIFFER'}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if agree else 1)


def processes(num_ranks: int, hidden: int) -> int:
    """Exchanges of processes that share one GPU, by torch's symmetric memory, where it allows that."""
    import os
    import tempfile

    # torch refuses ranks on one GPU otherwise: that is usually a mistake.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_process, (num_ranks, f"{folder}/store", hidden), nprocs=num_ranks)
        except multiprocessing.ProcessRaisedException as error:
            if "cannot map each other's memory" not in str(error):
                raise
            print(f"torch's symmetric memory takes no several processes on one GPU here: {error}")
        except multiprocessing.ProcessExitedException:
            return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--hidden", type=int, nargs="+", default=[7168, 2048])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128, help="of all ranks")
    parser.add_argument("--wire", nargs="+", choices=list(WIRES), default=["same", "fp8"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, default=0, help="check so many processes on one GPU instead")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/symmetric_DATE.json")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.symmetric needs a GPU: there is none here", file=sys.stderr)
        return 2
    if not kernels_run(device):
        print("benchmarks.symmetric needs Triton, and on a CPU TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if arguments.processes:
        return processes(arguments.processes, arguments.hidden[-1])
    if arguments.write and device.type == "cpu":
        print("benchmarks.symmetric writes what a GPU has measured alone", file=sys.stderr)
        return 2
    bandwidth = 1e9
    if device.type == "cuda":
        bandwidth = activation.copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}: a large copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    all_agree = True
    for hidden in arguments.hidden:
        for wire in arguments.wire:
            agree, measured = compare(arguments, hidden, wire, bandwidth)
            all_agree, rows = all_agree and agree, rows + measured
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if arguments.write:
                write_results("symmetric", ["torch", "triton", "crossdock"], rows)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
