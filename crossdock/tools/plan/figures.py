"""The numbers that an estimate is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crossdock.config import Config
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.devices import Device
from crossdock.tools.plan.flows import Flow
from crossdock.tools.plan.routes import RankRoutes

__all__ = ["Calibration", "Estimate", "Memory", "Work"]


@dataclass(frozen=True)
class Calibration:
    """What dry runs, or a published run, have to say about the formulas; each a factor.

    Attributes:
        block: of the activations that a block keeps.
        working: of what a block needs while its backward pass runs.
        ends: of what the head needs, logits and their gradients.
        achieved: share of the device's peak in place of the table's; `None` takes that.
        activation_bytes: all activations, per token of a rank, in place of the formulas; of a whole model.
        source: where these are from.
    """

    block: float = 1.0
    working: float = 1.0
    ends: float = 1.0
    achieved: float | None = None
    activation_bytes: float | None = None
    source: str = "formulas alone"


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most, at its peak."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Work:
    """Where the time of a step goes, in seconds.

    Attributes:
        compute: products and what is between them, recompute included.
        exchange: experts' exchanges that nothing hides.
        collectives: of parameters and gradients that nothing hides, and what they take from the products.
        layout: exchanges over `tp` and `cp`, which nothing hides.
        bubble: waiting for other stages of a pipeline.
        optimizer: the update.
    """

    compute: float
    exchange: float
    collectives: float
    layout: float
    bubble: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.compute + self.exchange + self.collectives + self.layout + self.bubble + self.optimizer


@dataclass(frozen=True)
class Estimate:
    """A layout, and what it comes to; of one rank where nothing else is said.

    Attributes:
        config: with the layout's settings.
        dims: the layout.
        micro_batches: of a step.
        memory: at the peak.
        flows: in a step.
        work: in a step.
        flops: of the model, per token.
        dispatcher: which, and why.
        chunks: parts of a rank's tokens that travel by themselves.
        routes: of a micro-batch.
        device: of the table.
        limit: bytes that a rank may hold.
        measured: the phase of the step that holds most, of a dry run that memory and bytes sent are from; empty for
            formulas.
    """

    config: Config
    dims: ParallelDims
    micro_batches: int
    memory: Memory
    flows: Mapping[str, Flow]
    work: Work
    flops: float
    dispatcher: str
    chunks: int
    routes: RankRoutes
    device: Device
    limit: float
    measured: str = ""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        training = self.config.training
        readers = self.dims.dp_replicate * self.dims.dp_shard
        return self.micro_batches * training.local_batch_size * readers * training.seq_len

    @property
    def tokens_per_second(self) -> float:
        """Of one rank."""
        return self.tokens / self.work.step / self.dims.world_size

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of one rank."""
        return self.tokens_per_second * self.flops / 1e12

    @property
    def mfu(self) -> float:
        """In percent of the device's peak."""
        return 100 * self.tflops / self.device.peak_tflops

    @property
    def dollars_per_million_tokens(self) -> float:
        return self.device.dollars_per_hour / 3600 / self.tokens_per_second * 1e6

    @property
    def memory_percent(self) -> float:
        return 100 * self.memory.total / (self.device.memory_gib * 2**30)
