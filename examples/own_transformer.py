"""A transformer of one's own, its feed-forward layers replaced by experts that live on all processes.

    torchrun --nproc-per-node 2 examples/own_transformer.py [--steps 60]

It learns to say a sequence backwards. With one process the losses are the same.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from crossdock import MoE, MoEConfig, ParallelDims, RouterConfig, clip_grad_norm_, parallelize, set_batch_totals

WORDS, WIDTH, LENGTH, GLOBAL_BATCH = 64, 64, 12, 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        # Here stood nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).
        balance = MoEConfig(global_aux_loss_coeff=0.01)
        self.moe = MoE(WIDTH, 2 * WIDTH, RouterConfig(num_experts=8, top_k=2), balance)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.moe(self.norms[1](x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(2 * LENGTH, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.layers(x).flatten(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same initial weights on all ranks
    model = Model()
    parallelize(model, ParallelDims(world_size=ranks, ep=ranks).build_mesh("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        said = torch.randint(WORDS, (GLOBAL_BATCH, LENGTH), generator=draw)
        ids = torch.cat([said, said.flip(1)], 1).chunk(ranks)[rank]  # this rank's part of the batch
        set_batch_totals(model, GLOBAL_BATCH, GLOBAL_BATCH * 2 * LENGTH, dist.group.WORLD)
        logits = model(ids).view(*ids.shape, WORDS)[:, LENGTH - 1 : -1]
        # A sum over this rank, divided by the targets of the global batch: gradients are summed over ranks.
        loss = cross_entropy(logits.flatten(0, 1), ids[:, LENGTH:].flatten(), reduction="sum") / (GLOBAL_BATCH * LENGTH)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
