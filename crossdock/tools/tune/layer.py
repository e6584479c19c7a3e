"""The layer that is measured: the model's first MoE layer, at its shape, spread over the ranks as in training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from crossdock.config import Config
from crossdock.config.tuned import AUTOMATIC, THREADS, TunedKey, tile_table
from crossdock.dispatch import Dispatched, Dispatcher, DispatchPlan, free_deepep_buffers
from crossdock.models import FAMILIES, build_model, resolve_hf_config
from crossdock.moe import MoE, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ExpertParallel, ParallelDims, layer_dispatcher
from crossdock.routed_experts import RoutedExperts
from crossdock.routing import draw_zipf

__all__ = ["MeasuredLayer"]


class MeasuredLayer:
    """One MoE layer of a run, and what passes through it: this rank's tokens and the gradient of its output.

    Weights and tokens are drawn, so that about as many tokens go to each expert. FSDP, recompute and `[balance]` are
    left out. Collective, as all that it does.

    Args:
        config: of the run, validated.
        dims: its layout.
        device: of this rank.

    Attributes:
        layer: on `device`, with its experts spread.
        key: what measurements of it are valid for.
        dtype: of activations.
        threads: of this rank before anything was changed.
    """

    def __init__(self, config: Config, dims: ParallelDims, device: torch.device) -> None:
        self.device, self._config = device, config.moe
        self.threads = torch.get_num_threads()
        self.dtype = getattr(torch, config.training.dtype)
        model = build_model(
            FAMILIES[config.model.name],
            resolve_hf_config(config.run_model),
            config.moe,
            self.dtype,
            attn_implementation=config.model.attn_implementation,
            force_load_balance=config.training.debug_moe_force_load_balance,
        )
        self.layer: RoutedExperts = next(iter(moe_layers(model).values()))
        meshes = dims.build_mesh(device.type, timedelta(seconds=config.job.comm_timeout_seconds))
        rows = config.training.local_batch_size
        self._tokens = rows * config.training.seq_len // meshes.sequence_degree
        self._mesh = meshes["ep"]
        self.key = TunedKey.of(
            self.layer, tokens_per_rank=self._tokens, ep=dims.ep, dtype=config.training.dtype, device=device
        )
        ExpertParallel(self._tokens, self.dtype)._apply(self.layer, self._mesh)
        self._dispatchers: dict[MoEConfig, tuple[Dispatcher, DispatchPlan]] = {}
        self._draw(config.training.seed)
        self._sequence_shape = (rows, self._tokens // rows) if self._tokens % rows == 0 else (1, self._tokens)
        self._arrived: Dispatched | None = None

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        self.layer.to_empty(device=self.device)
        self.layer.reset_buffers()
        torch.manual_seed(seed)
        local = {
            name: parameter.to_local() if isinstance(parameter, DTensor) else parameter
            for name, parameter in self.layer.named_parameters()
        }
        for name, parameter in local.items():
            if name.startswith("router."):  # the same on all ranks
                parameter.normal_(std=0.02)
        torch.manual_seed(seed + 1 + dist.get_rank())
        for name, parameter in local.items():
            if not name.startswith("router."):
                parameter.normal_(std=0.02)
        size, hidden = self._tokens, self.layer.hidden_size
        self._x = torch.randn(size, hidden, dtype=self.dtype, device=self.device)
        self._grad = torch.randn(size, hidden, dtype=self.dtype, device=self.device)
        self._expert_ids = draw_zipf(size, self.layer.num_experts, self.layer.top_k, 0.0, seed, self.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        self._weights = torch.full((size, self.layer.top_k), 1 / self.layer.top_k, dtype=wide, device=self.device)
        self.layer.train()

    def apply(self, choices: Mapping[str, Any]) -> None:
        """Put values of settings in force; those that are not named are as the run has them."""
        config = replace(self._config, **{name: choices[name] for name in AUTOMATIC if name in choices})
        if self.device.type == "cpu":
            torch.set_num_threads(choices.get(THREADS, self.threads))
        self.layer.reconfigure(config)
        self.layer.experts.kernel_tiles = tile_table(choices)
        if self._mesh.size() > 1:
            if config not in self._dispatchers:
                self._dispatchers[config] = layer_dispatcher(self.layer, self._mesh, self._tokens, self.dtype)
            dispatcher, plan = self._dispatchers[config]
            self.layer.place(self.layer.placement, dispatcher, self._mesh.get_group(), plan)

    def forget(self) -> None:
        """Free what values that were put in force hold, such as buffers of deep_ep. Collective."""
        self._dispatchers.clear()
        free_deepep_buffers()

    def run(self, part: str, repeats: int) -> float:
        """Seconds of a forward and a backward pass of the `layer` or its `experts`, the mean of `repeats` of them."""
        step = {"layer": self._layer_step, "experts": self._experts_step}[part]
        if part == "experts" and self._arrived is None:
            self._arrived = self._arrive()
        dist.barrier()
        self._wait()
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        self._wait()
        return (time.perf_counter() - started) / repeats

    def _layer_step(self) -> None:
        x = self._x.detach().requires_grad_()
        if isinstance(self.layer, MoE):
            out = self.layer(x.view(*self._sequence_shape, -1))
            out = out[0] if isinstance(out, tuple) else out  # a hook that some families' models need
        else:
            out = self.layer(x, self._expert_ids, self._weights.detach().requires_grad_())
        out.view_as(self._grad).backward(self._grad)
        self._forget()

    def _experts_step(self) -> None:
        assert self._arrived is not None
        tokens, weights = (each.detach().requires_grad_() for each in (self._arrived.tokens, self._arrived.weights))
        out = self.layer.experts(tokens, self._arrived.slot_ids, weights)
        out.backward(torch.ones_like(out))
        self._forget()

    @torch.no_grad()
    def _arrive(self) -> Dispatched:
        """What this rank's experts are given of all ranks' tokens."""
        return self.layer.dispatch(self._x, self.layer.slots_of(self._expert_ids), self._weights)[0].wait()

    def _forget(self) -> None:
        for parameter in self.layer.parameters():
            parameter.grad = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
