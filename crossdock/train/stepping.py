"""One step of training: forward and backward over micro-batches, sums over all ranks, the update."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from crossdock.balance import Balancer
from crossdock.checkpoint import materialise_optimizer_state
from crossdock.comm import Place
from crossdock.config import Config
from crossdock.data import Batch
from crossdock.dispatch import Traffic
from crossdock.models import batch_loss
from crossdock.moe import finish_step, moe_layer_places, moe_layers, set_batch_totals, step_load
from crossdock.parallel import Boundary, GradientManager, Meshes, Pipeline, Reader, ReplicaGroups
from crossdock.train.bad_steps import BadSteps
from crossdock.train.metrics import gather_metrics, load_metrics, traffic_metrics
from crossdock.train.optimizer import build_optimizer, learning_rate_factor
from crossdock.train.preparing import TrainingModel

__all__ = ["Stepper", "Taken"]


class Taken(NamedTuple):
    """What a step came to, the same on all ranks.

    Attributes:
        metrics: of the step.
        routes: per layer and logical expert, `[L, E]`.
        messages: for people.
    """

    metrics: dict[str, Any]
    routes: torch.Tensor
    messages: list[str]


class Stepper:
    """Takes one step after another with this rank's part of the model. Every method is collective.

    Args:
        config: of the run, with `global_batch_size` as a number.
        whole: the model on its layout.
        meshes: of the layout.
        reader: what this rank reads of the data.
        device: of this rank.
        place: is told what is being done.
        groups: further copies of the model.
        bad_steps: says whether a step is applied.
    """

    def __init__(
        self,
        config: Config,
        whole: TrainingModel,
        meshes: Meshes,
        reader: Reader,
        *,
        device: torch.device,
        place: Place,
        groups: ReplicaGroups,
        bad_steps: BadSteps,
    ) -> None:
        self._config, self._whole, self._meshes, self._reader = config, whole, meshes, reader
        self._device, self._place, self._groups, self._bad_steps = device, place, groups, bad_steps
        self._model = whole.model
        self._layers = list(moe_layers(self._model).values())
        self._num_layers = len(moe_layer_places(self._model).names)
        self._gradients = GradientManager(
            self._model,
            meshes,
            reduction=config.parallelism.gradient_reduction,
            sparse=config.parallelism.sparse_replica_gradients,
            groups=groups,
        )
        self.pipeline = self._build_pipeline() if config.parallelism.pipeline_parallel_degree > 1 else None
        # All ranks of this pipeline stage.
        self._stage = meshes.stage if self.pipeline is not None else dist.group.WORLD
        dtype = torch.bfloat16 if config.training.dtype == "bfloat16" else None
        self.optimizer = build_optimizer(self._model, config.optimizer, dtype)
        materialise_optimizer_state(self.optimizer)
        self.balancer = Balancer(self._model, config.balance, optimizer=self.optimizer, stage=self._stage, dtype=dtype)

    def take(self, step: int, batches: list[Batch], targets: int, tokens: int) -> Taken | None:
        """Forward, backward and update over this rank's micro-batches.

        Args:
            step: its number, from 1.
            batches: this rank's.
            targets: of the global batch.
            tokens: likewise.

        Returns:
            What the step came to; `None` where a group was lost on the way, and nothing has changed.
        """
        config, groups = self._config, self._groups
        # Not a bound method where there is nothing to sum: the counts would be copied for it.
        sum_copies = groups.sum_ if config.fault_tolerance.replica_groups else None
        sequences = config.training.global_batch_size
        set_batch_totals(self._model, sequences, tokens, self._stage, self._meshes.sequence, sum_copies)
        sent_before = self._traffic()
        sections = (batch.section(self._reader.section, self._reader.sections) for batch in batches)
        loss = self._backward([batch.inputs(self._device) for batch in sections], max(targets, 1))
        self._place.enter("gradient norm")
        own_norm = self._gradients.clip(config.training.max_norm)
        self._place.enter("metrics")
        terms = {"loss": loss, **self._auxiliary_losses()}
        sums, norm, memory = gather_metrics(terms, own_norm, self._device, groups)
        traffic = self._traffic() - sent_before
        sent = traffic_metrics(traffic, self._gradients.replica_traffic, self._device, groups)
        load = step_load(self._model, dist.group.WORLD)
        loads_of_ranks = self.balancer.gather(load)
        groups.sum_(load.routes, load.dropped, loads_of_ranks)
        if not groups.commit():
            self._forget()
            return None

        self._place.enter("optimizer")
        rate = config.optimizer.lr * learning_rate_factor(step, config.training.steps, config.lr_scheduler)
        applies = self._bad_steps.applies(step, sums["loss"], norm)
        if applies:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        # The expert bias is a part of what LoRA leaves as it is.
        finish_step(self._model, update_bias=applies and not config.lora.rank, load=load)
        self.optimizer.zero_grad()
        self._place.enter("migration")
        balanced, messages = self.balancer.after_step(load, loads_of_ranks)
        metrics = {
            "step": step,
            **{name: value if math.isfinite(value) else None for name, value in sums.items()},
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": rate,
            **memory,
            **load_metrics(load),
            **balanced,
            **sent,
            "tokens": tokens,
            **self._bad_steps.metrics(),
        }
        return Taken(metrics, load.routes, messages)

    def _backward(self, batches: list[dict[str, torch.Tensor]], targets: int) -> torch.Tensor:
        """Gradients of the mean loss over `targets` of the global batch; returns this rank's share of it."""
        if self.pipeline is not None:
            self._place.enter("pipeline")
            return self.pipeline.step(batches, 1 / targets)
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for index, batch in enumerate(batches):
            self._gradients.before_backward(is_last=index == len(batches) - 1)
            self._place.enter("forward")
            share = batch_loss(self._model, **batch) / targets
            self._place.enter("backward")
            share.backward()
            loss += share.detach()
        return loss

    def _forget(self) -> None:
        """Leave nothing of a step that does not count."""
        self.optimizer.zero_grad()
        for layer in self._layers:
            layer.load.reset()
        self.balancer.forget_step()

    def _auxiliary_losses(self) -> dict[str, torch.Tensor]:
        """This rank's terms of the auxiliary losses: mean over layers."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        of_layers = {
            name: [layer.load.losses[name].double() for layer in self._layers if name in layer.load.losses]
            for name in self._whole.auxiliary_losses
        }
        return {name: sum(values, zero) / self._num_layers for name, values in of_layers.items()}

    def _traffic(self) -> Traffic:
        """What this rank has sent so far for its MoE layers; at a moment when the GPU has been waited for anyway."""
        return sum((layer.dispatcher.traffic for layer in self._layers), Traffic())

    def _build_pipeline(self) -> Pipeline:
        training, parallelism = self._config.training, self._config.parallelism
        positions = training.seq_len // self._reader.sections
        if parallelism.sequence_parallel:
            positions //= parallelism.tensor_parallel_degree
        shape = (training.local_batch_size, positions, self._model.config.get_text_config().hidden_size)
        return Pipeline(
            self._model,
            self._meshes,
            self._gradients,
            batch_loss,
            Boundary(shape, getattr(torch, training.dtype), self._device),
            schedule=parallelism.pipeline_parallel_schedule,
            num_microbatches=training.global_batch_size // (training.local_batch_size * self._reader.degree),
            reshards=parallelism.reshards,
        )
