"""A MoE layer that sends every route by a plain all-to-all, before and after crossdock's dispatcher takes its place.

    torchrun --nproc-per-node 2 examples/swap_dispatcher.py

Both give the same numbers. Ours sends a token once to a rank, however many of its experts live there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from crossdock.dispatch import AllToAllDispatcher, Nodes
from crossdock.experts import ExpertParams, eager

TOKENS, HIDDEN, INTERMEDIATE, TOP_K, SLOTS = 512, 64, 32, 4, 8  # slots: experts per rank


def plain_layer(x: Tensor, ids: Tensor, weights: Tensor, params: ExpertParams) -> tuple[Tensor, int]:
    """Output `[T, H]` and the rows that this rank sent to others: one per route."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    route_ids, order = ids.flatten().sort(stable=True)
    sent = torch.bincount(route_ids // SLOTS, minlength=ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    to, of = sent.tolist(), received.tolist()
    slots = torch.empty(sum(of), dtype=torch.int64)
    dist.all_to_all_single(slots, route_ids % SLOTS, of, to)
    rows = all_to_all_single(x.new_empty(sum(of), HIDDEN), x[order // TOP_K], of, to)
    computed = eager(rows, slots[:, None], torch.ones(len(slots), 1), params)
    back = all_to_all_single(x.new_empty(len(order), HIDDEN), computed, to, of)
    out = torch.zeros_like(x).index_add(0, order // TOP_K, back * weights.flatten()[order, None])
    return out, sum(to) - to[rank]


def our_layer(x: Tensor, ids: Tensor, weights: Tensor, params: ExpertParams) -> tuple[Tensor, int]:
    """The same by dispatch, experts, combine."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher = AllToAllDispatcher(group, SLOTS, Nodes.consecutive(group.size(), group.size()))
    arrived = dispatcher.dispatch(x, ids, weights).wait()
    computed = eager(arrived.tokens, arrived.slot_ids, arrived.weights, params)
    out = dispatcher.combine(computed, arrived.handle).wait()
    needs = (ids[:, :, None] // SLOTS == torch.arange(group.size())).any(1)  # [T, R]
    needs[:, group.rank()] = False
    return out, int(needs.sum())


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    params = ExpertParams(
        torch.randn(SLOTS, HIDDEN, 2 * INTERMEDIATE) / 8, torch.randn(SLOTS, INTERMEDIATE, HIDDEN) / 6
    )
    x = torch.randn(TOKENS, HIDDEN)
    scores, ids = torch.rand(TOKENS, ranks * SLOTS).topk(TOP_K)
    weights = scores / scores.sum(1, keepdim=True)
    results = []
    for name, layer in (("plain all-to-all", plain_layer), ("crossdock", our_layer)):
        out, rows = layer(own := x.clone().requires_grad_(), ids, weights, params)
        out.square().sum().backward()
        assert own.grad is not None
        results.append((out, own.grad))
        if rank == 0:
            print(f"{name}: {rows} rows of {HIDDEN} sent to others, for {TOKENS} tokens", flush=True)
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    if rank == 0:
        print("outputs and gradients are the same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
