"""A small MoE model on any layout, its training steps, and what it holds by logical expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock.checkpoint import Checkpointer
from crossdock.moe import MoE, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, clip_grad_norm_, parallelize, plain_name
from crossdock.routing import RouterConfig, reduce_load, update_expert_bias

__all__ = ["Contents", "Run", "Small", "fill_experts"]

HIDDEN, INNER, WORDS, CLASSES, SEQUENCES, LENGTH = 12, 12, 17, 3, 12, 5

Contents = dict[str, np.ndarray]


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(HIDDEN, INNER, RouterConfig(num_experts, 2), MoEConfig(experts="eager", expert_bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Small(nn.Module):
    """Some parameters have fewer rows than a layout has ranks: the head's three, and the only one of `scale`."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.ModuleList([Block(num_experts) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.scale)


@torch.no_grad()
def fill_experts(model: nn.Module) -> None:
    """Give every element of every expert a value of its own."""
    for index, layer in enumerate(moe_layers(model).values()):
        for part, parameter in enumerate(layer.experts.parameters()):
            position = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)
            parameter.copy_(0.3 * torch.sin(1 + position * 0.7 + 100 * index + 50 * part))


class Run:
    """A model in training on this rank's process group; two runs of one seed are the same on every layout.

    Args:
        folder: of its checkpoints.
        ep: expert-parallel degree; 0 leaves the model as it is: plain tensors, and gradients of this rank alone.
        saving: further arguments of `Checkpointer`.
        change: what to do to the model before it is made parallel.
        arguments: of `parallelize`.
    """

    def __init__(
        self,
        folder: str | Path,
        ep: int,
        num_experts: int = 8,
        *,
        seed: int = 0,
        keep_latest_k: int = 2,
        saving: Mapping[str, Any] | None = None,
        change: Callable[[Any], Any] = lambda model: None,
        **arguments: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Small(num_experts)
        if seed == 0:
            fill_experts(self.model)
        change(self.model)
        if ep:
            parallelize(self.model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"), **arguments)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.saving = {"keep_latest_k": keep_latest_k, **(saving or {})}
        self.step = 0
        self.at(folder)

    def at(self, folder: str | Path) -> Run:
        """Use the checkpoints of `folder` from here on."""
        self.checkpointer = Checkpointer(Path(folder), self.model, self.optimizer, **self.saving)
        return self

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Take steps on batches that depend on the step alone; their losses and gradient norms."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> tuple[float, float]:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        ids = torch.randint(WORDS, (SEQUENCES, LENGTH), generator=generator)
        labels = torch.randint(CLASSES, (SEQUENCES, LENGTH), generator=generator)
        rows = SEQUENCES // dist.get_world_size()
        own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
        logits = self.model(ids[own]).double()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[own].flatten(), reduction="sum") / labels.numel()
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), 1.0).item()
        layers = list(moe_layers(self.model).values())
        counts = reduce_load([layer.load for layer in layers], dist.group.WORLD).routes
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_expert_bias([layer.router for layer in layers], counts, 1e-2)
        for layer in layers:
            layer.load.reset()
        losses: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(losses, loss.item())
        return sum(losses), norm

    def contents(self) -> Contents:
        """Everything that a checkpoint must bring back, whole, experts in logical order. Collective."""
        layers = {id(p): layer for layer in moe_layers(self.model).values() for p in layer.experts.parameters()}
        held: Contents = {}
        for name, parameter in self.model.named_parameters():
            for key, value in {"value": parameter.detach(), **self.optimizer.state.get(parameter, {})}.items():
                full = value.clone()
                if isinstance(parameter, DTensor) and isinstance(value, DTensor):
                    # DTensor's cache gives results of operations the mesh of an earlier run of this worker.
                    full = DTensor.from_local(
                        value.to_local(),
                        parameter.device_mesh,
                        parameter.placements,
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    ).full_tensor()
                if id(parameter) in layers and full.ndim:
                    full = full[torch.tensor(layers[id(parameter)].placement.expert_to_slot)]
                held[f"{plain_name(name)} {key}"] = full.double().numpy().copy()
        for name, layer in moe_layers(self.model).items():
            assert layer.router.expert_bias is not None
            held[f"{plain_name(name)} bias"] = layer.router.expert_bias.double().numpy().copy()
        return held
