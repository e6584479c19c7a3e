"""A dispatcher of one's own, on crossdock's exchanges, beside `alltoall`; then it moves the tokens of a layer.

torchrun --nproc-per-node 2 examples/own_dispatcher.py
"""

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import MoE, RouterConfig, apply_ep
from crossdock.comm import UNTOUCHED, Pending, exchange
from crossdock.dispatch import Agreement, Dispatched, Dispatcher, DispatchPlan
from crossdock.dispatch.traffic import Traffic, TrafficMeter


class OwnDispatcher:
    ordered = True  # rows arrive by (source rank, position)

    def __init__(self, group: dist.ProcessGroup, slots_per_rank: int) -> None:
        self.name, self.ranks, self.slots = group.group_name, group.size(), slots_per_rank
        self.meter = TrafficMeter(group)
        self.agreement = Agreement(group, slots_per_rank, UNTOUCHED, tally=self.meter.metadata)

    @property
    def traffic(self) -> Traffic:
        return self.meter.traffic

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        self.agreement.check(x, slot_ids, weights)  # where one rank raises, all do
        owner = slot_ids.div(self.slots, rounding_mode="floor")  # [T, K]; -1 is no route
        needed = torch.stack([(owner == rank).any(1) for rank in range(self.ranks)])  # [R, T]
        rank, token = needed.nonzero().unbind(1)  # of each row that this rank sends
        splits, _ = self.agreement.exchange_counts(needed.sum(1), x, slot_ids, weights)
        handle = token, splits, len(x), self.meter.needs(needed.T)
        rank, own = rank[:, None], owner[token] == rank[:, None]
        routes = (slot_ids[token] - rank * self.slots).where(own, -1), weights[token].where(own, 0)
        ids, shares = (exchange(part, splits, self.name, tally=self.meter.metadata) for part in routes)
        wide = x.to(weights.dtype)  # gradients of a token's rows are summed in fp32
        tokens = exchange(wide[token].to(x.dtype), splits, self.name, tally=self.meter.rows(handle[3]))
        return Pending(lambda: Dispatched(tokens.wait(), ids.wait(), shares.wait(), handle))

    def refuse(self, device: torch.device) -> None:
        self.agreement.refuse(device)

    def combine(self, y: Tensor, handle: tuple) -> Pending[Tensor]:
        token, splits, num_tokens, needs = handle
        total = y.new_zeros(num_tokens, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
        rows = exchange(y, splits.reversed, self.name, tally=self.meter.rows(needs))
        return Pending(lambda: total.index_add(0, token, rows.wait().to(total.dtype)).to(y.dtype))


def results(dispatcher: Dispatcher, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor | None]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    got = dispatcher.dispatch(x, ids, weights).wait()
    out = dispatcher.combine(got.tokens * (got.weights * (got.slot_ids + 1)).sum(1, keepdim=True), got.handle).wait()
    out.sin().sum().backward()
    return [got.tokens, got.slot_ids, got.weights, out, x.grad, weights.grad]


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same initial weights on all ranks
    layer, x = MoE(16, 32, RouterConfig(num_experts=4 * ranks, top_k=3)), torch.randn(1, 40, 16)
    apply_ep(layer, mesh := dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)))
    theirs, ours, expected = layer.dispatcher, OwnDispatcher(mesh.get_group(), 4), layer(x)
    for size in (64 + rank, 64 * rank):  # the second time rank 0 has no tokens
        ids = torch.rand(size, 4 * ranks).topk(3).indices.masked_fill(torch.rand(size, 3) < 0.2, -1)
        values = torch.randn(size, 16), ids, torch.rand(size, 3)
        torch.testing.assert_close(results(ours, *values), results(theirs, *values), rtol=0, atol=0)
    layer.place(layer.placement, ours, layer.ep_group, DispatchPlan("own", 1, "as set"))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    print(f"rank {rank} of {ranks}: as alltoall, bit by bit; {ours.traffic.within} bytes of rows sent")
    dist.barrier()  # gloo may abort where a rank leaves before the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
