"""Not a language model: a classifier of handwritten digits from 64 numbers each, with a MoE layer.

    pip install scikit-learn
    torchrun --nproc-per-node 2 examples/tabular.py [--steps 150]

The 1,797 digits come with scikit-learn. Experts specialise by themselves; the last lines say on what.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from crossdock import MoE, MoEConfig, ParallelDims, RouterConfig, parallelize, set_batch_totals

EXPERTS, BATCH, HELD_OUT = 8, 128, 360


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm, self.say = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10)
        self.moe = MoE(64, 64, RouterConfig(num_experts=EXPERTS, top_k=2), MoEConfig(global_aux_loss_coeff=0.02))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.read(pixels).relu())
        return self.say(x + self.moe(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    pixels, digits = pixels[order].float() / 16, digits[order]
    torch.manual_seed(0)
    model = Classifier()
    parallelize(model, ParallelDims(world_size=ranks, ep=ranks).build_mesh("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        chosen = HELD_OUT + torch.randint(len(digits) - HELD_OUT, (BATCH,), generator=draw)
        own = chosen.chunk(ranks)[rank]
        set_batch_totals(model, BATCH, BATCH, dist.group.WORLD)
        loss = cross_entropy(model(pixels[own]), digits[own], reduction="sum") / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0 and step % 50 == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        right = (model(pixels[:HELD_OUT]).argmax(1) == digits[:HELD_OUT]).float().mean()
        hidden = model.norm(model.read(pixels[:HELD_OUT]).relu())
        assert model.moe.router is not None
        first = model.moe.router(hidden, sequence_shape=(HELD_OUT,)).expert_ids[:, 0]
    if rank == 0:
        print(f"accuracy on {HELD_OUT} held-out digits: {right:.1%}")
        for expert in range(EXPERTS):
            seen = torch.bincount(digits[:HELD_OUT][first == expert], minlength=10)
            print(f"expert {expert}: digits {' '.join(map(str, seen.topk(3).indices.tolist()))}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
