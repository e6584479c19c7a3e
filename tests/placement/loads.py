"""Load matrices that planners are tried on, and small independent implementations to compare them with."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

KINDS = ("uniform", "zipf0.5", "zipf1", "zipf1.5", "zipf2", "log-normal", "groups", "one hot", "few hot", "steps")


def draw_loads(kind: str, num_experts: int, generator: torch.Generator) -> Tensor:
    """`[E]` float64."""
    even = torch.rand(num_experts, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        return even * 1000
    if kind.startswith("zipf"):
        loads = 1e6 / torch.arange(1, num_experts + 1, dtype=torch.float64) ** float(kind[4:])
        return loads[torch.randperm(num_experts, generator=generator)].round()
    if kind == "log-normal":
        return 100 * (1.5 * torch.randn(num_experts, generator=generator, dtype=torch.float64)).exp()
    if kind == "groups":
        of_group = torch.rand(8, generator=generator, dtype=torch.float64)
        return 1e4 * of_group.repeat_interleave(-(-num_experts // 8))[:num_experts] * even
    if kind == "steps":  # many equal loads, where greedy methods meet ties
        return (4 * even).floor() * 100
    hot = 1 if kind == "one hot" else 1 + num_experts // 8
    loads = torch.ones(num_experts, dtype=torch.float64)
    loads[torch.randperm(num_experts, generator=generator)[:hot]] = 1e5
    return loads


def corpus(num_shapes: int, layers: int, seed: int) -> Iterator[tuple[Tensor, int, int]]:
    """Loads `[layers, E]` of all kinds in turn, ranks and slots per rank, for as many shapes.

    8 to 512 experts, 4 to 128 ranks, 0 to 100 % more slots than experts, where they divide evenly; no rank has more
    slots than there are experts.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count = 0
    while count < num_shapes:
        num_experts = draw.choice([8, 12, 16, 24, 32, 60, 64, 128, 160, 256, 512])
        num_ranks = draw.choice([4, 8, 16, 32, 64, 128])
        slots = int(num_experts * (1 + draw.choice([0, 0.125, 0.25, 0.5, 1])))
        if slots % num_ranks or slots // num_ranks > num_experts:
            continue
        loads = torch.stack(
            [draw_loads(KINDS[(count + layer) % len(KINDS)], num_experts, generator) for layer in range(layers)]
        )
        yield loads, num_ranks, slots // num_ranks
        count += 1


def has_copies_on_one_rank(plan: Tensor) -> Tensor:
    """`[L]` bool, for a plan `[L, R, S]`."""
    in_order = plan.sort(dim=2).values
    return ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)).flatten(1).any(1)


def published_by_loops(
    weight: list[float], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> tuple[list[int], list[int]]:
    """DeepSeek's method for one layer, in loops and in fp32: the expert of each slot, and copies of each expert."""

    def fp32(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).item()

    def pack(weights: list[float], num_packs: int) -> list[list[int]]:
        size = len(weights) // num_packs
        if size == 1:
            return [[item] for item in range(num_packs)]
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        totals = [0.0] * num_packs
        for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
            free = [pack for pack in range(num_packs) if len(packs[pack]) < size]
            lightest = min(free, key=lambda pack: totals[pack])
            packs[lightest].append(item)
            totals[lightest] = fp32(totals[lightest] + weights[item])
        return packs

    weight = [fp32(each) for each in weight]
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(weight) // num_groups
    of_groups = [torch.tensor(weight[group * size : (group + 1) * size]).sum().item() for group in range(num_groups)]
    slots: list[int] = []
    copies = [1] * len(weight)
    for groups in pack(of_groups, num_nodes):
        experts = [group * size + place for group in groups for place in range(size)]
        chosen = list(experts)
        while len(chosen) < num_slots // num_nodes:
            heaviest = max(experts, key=lambda expert: fp32(weight[expert] / copies[expert]))
            chosen.append(heaviest)
            copies[heaviest] += 1
        shares = [fp32(weight[expert] / copies[expert]) for expert in chosen]
        for items in pack(shares, num_ranks // num_nodes):
            slots += [chosen[item] for item in items]
    return slots, copies
