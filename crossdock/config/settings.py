"""The settings of a run: a dataclass for each section, with those of the rooms below composed in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from crossdock.balance import BalanceConfig
from crossdock.checkpoint import CheckpointConfig, find_checkpoint
from crossdock.data import DataConfig
from crossdock.lora import LoRAConfig
from crossdock.models import ModelConfig
from crossdock.moe_config import MoEConfig
from crossdock.optim import AdjustLR
from crossdock.parallel import ActivationCheckpointConfig, CompileConfig, ParallelismConfig

__all__ = [
    "ASSETS_FOLDER",
    "Config",
    "ConfigError",
    "FaultToleranceConfig",
    "JobConfig",
    "LRSchedulerConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "ProfilingConfig",
    "TrainingConfig",
    "ValidationConfig",
    "setting_types",
]


Degree = Literal["dp_replicate", "dp_shard", "cp", "tp", "pp", "ep"]

ASSETS_FOLDER = "hf_assets"
"""Of a run folder: what an export needs beside weights."""


class ConfigError(ValueError):
    """A setting that cannot be used: `field` (`section.key`), its `value`, and what would be `valid`."""

    def __init__(self, field: str, value: object, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


@dataclass(frozen=True)
class JobConfig:
    """`[job]`: where a run lives."""

    dump_folder: str = ""
    """The run folder; one that holds a run is resumed. Empty: a new runs/<config>/<date-time>."""
    comm_timeout_seconds: int = 600
    """A collective that takes longer ends the run."""


@dataclass(frozen=True)
class TrainingConfig:
    """`[training]`: batch, length, precision."""

    local_batch_size: int = 8
    """Sequences per rank and micro-batch. -1: as many as memory is estimated to hold (docs/plan.md), up to 64."""
    global_batch_size: int = -1
    """Sequences per step over all ranks; more than they take at once are accumulated. -1: no accumulation."""
    seq_len: int = 256
    """Tokens per sequence."""
    steps: int = 200
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Of initial weights, data order and random state."""
    deterministic: bool = False
    """Two runs with the same settings, on the same number of ranks and threads of such devices, are equal bit by bit.
    What decides by measured time, or sums in no fixed order, is refused then."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 computes in bfloat16 with float32 master weights and reductions; float64 is for checks on CPU."""
    max_norm: float = 1.0
    """Gradients are scaled to at most this global norm."""
    freeze_router: bool = False
    """Keep the routers' weights as they are."""
    freeze_experts: bool = False
    """Keep the experts' weights as they are."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and the optimizer's state in the machine's memory instead of the GPU's."""
    tuned: str = "auto"
    """What `crossdock tune` has measured, for settings that are left to be chosen. auto: of
    $XDG_CACHE_HOME/crossdock/tuned.json (~/.cache), where that has anything for this device, model and layout; off:
    nothing, and so is auto with deterministic; else of this file."""
    debug_moe_force_load_balance: bool = False
    """Deal tokens out to experts in turn, whatever the router says; for measurements."""


@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: AdamW, or Muon beside it; norms, biases and routers are not decayed."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices of hidden layers are updated by Muon, all other parameters by AdamW."""
    lr: float = 8e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients, per step."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients, per step."""
    eps: float = 1e-8
    """AdamW: added to the root of the mean of squares."""
    momentum: float = 0.95
    """Muon: decay of the mean of gradients, per step."""
    adjust_lr_fn: AdjustLR = "match_rms_adamw"
    """Muon: how large the update of a matrix is. match_rms_adamw: as AdamW's, so that one lr fits both; original: as
    Muon was published."""
    weight_decay: float = 0.1
    """Share of a matrix, times the learning rate, that a step takes away."""


@dataclass(frozen=True)
class LRSchedulerConfig:
    """`[lr_scheduler]`: linear warm-up, constant, decay. WSD is a `decay_ratio` below 1; the default is all cosine."""

    warmup_steps: int = 20
    """Steps in which the learning rate rises to its peak."""
    decay_ratio: float | None = None
    """Share of the steps that decay at the end; unset: all after the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "cosine"
    """Shape of the decay."""
    min_lr_factor: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class ValidationConfig:
    """`[validation]`: the loss on text that is not trained on."""

    interval: int = 0
    """Steps between validations, and one after the last step; 0 is none."""
    data: str = ""
    """A source as in data.source; empty: what data.held_out keeps out of training."""
    max_samples: int = 256
    """Sequences of seq_len tokens that are looked at; 0 takes all."""


@dataclass(frozen=True)
class MetricsConfig:
    """`[metrics]`: what is shown and tracked. `metrics.jsonl` has a line for every step in any case."""

    log_freq: int = 10
    """Steps between lines where the output is no terminal."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the metrics go besides `metrics.jsonl`; each is an extra: `pip install 'crossdock[wandb]'`."""
    project: str = "crossdock"
    """The project in wandb and trackio; a run has the name of its run folder."""
    load_interval: int = 10
    """Steps between records of every expert's load in expert_load.bin, which the report shows. 0: none."""


@dataclass(frozen=True)
class FaultToleranceConfig:
    """`[fault_tolerance]`: how a run goes on after what befalls it."""

    max_restarts: int = 3
    """How often in a row workers are started again while the furthest step that the run has done does not grow: steps
    that are computed again do not count. 0 ends the run with the first failure."""
    may_shrink: tuple[Degree, ...] = ("dp_replicate", "dp_shard", "ep")
    """Degrees of [parallelism] that a run on fewer machines (--nnodes MIN:MAX) may lower. The global batch stays."""
    snapshot_interval: int = 0
    """Steps between snapshots in the machine's memory, from which a run goes on after a failure; 0: none, it goes on
    from the newest checkpoint. Two snapshots are kept, each as large as a rank's weights and moments."""
    snapshot_folder: str = "/dev/shm"
    """Where they are: a folder in memory."""
    snapshot_partner: bool = True
    """With several machines, the next one keeps a copy of each rank's snapshots, so that a machine may be lost."""
    straggler_interval: int = 100
    """Steps between looks for the rank that the others wait for, which is named where it stays slow; 0: none."""
    on_bad_step: Literal["skip", "rollback", "stop"] = "skip"
    """What a step with a NaN or infinite loss or gradient norm leads to. skip: it is not applied. rollback: the run
    goes back to its newest checkpoint and passes over the data since."""
    on_spike: Literal["none", "skip", "rollback", "stop"] = "none"
    """Likewise for a step whose loss or gradient norm is far above what is usual."""
    loss_spike_factor: float = 2.0
    """A loss is a spike above so many times the median of the last spike_window steps that were applied; 0: never."""
    norm_spike_factor: float = 10.0
    """The same of the gradient norm, before clipping."""
    spike_window: int = 64
    """Steps that say what is usual; until so many were applied there are no spikes."""
    max_skipped_steps: int = 5
    """So many steps in a row that are not applied end the run."""
    max_rollbacks: int = 3
    """Rollbacks in a row that do not get the run past the step that led to them; the next one ends it."""
    on_write_error: Literal["stop", "warn"] = "stop"
    """What a checkpoint or metrics that cannot be written, for a full disk, lead to. warn: the run goes on, and tries
    again with the next one; the checkpoint at the end must be written."""
    replica_check_interval: int = 100
    """Steps between looks whether ranks that should hold the same values do, bit by bit; a difference ends the run.
    0: never."""
    replica_groups: int = 0
    """Whole copies of the model, each a group of ranks of its own under torchft, that train together: a group that dies
    does not stop the others, and catches up from them when it comes back. 0: no groups."""
    min_replica_groups: int = 1
    """With fewer groups than this, training waits."""
    heartbeat_timeout_ms: int = 1500
    """Milliseconds without a sign of life after which a group counts as gone."""
    join_timeout_ms: int = 1000
    """Milliseconds that a step waits for groups that are alive and have not come to it."""
    lighthouse: str = ""
    """http://HOST:PORT of a torchft lighthouse that runs elsewhere; empty: the launcher of machine 0 starts one."""


@dataclass(frozen=True)
class ProfilingConfig:
    """`[profiling]`: Chrome traces of single steps, in profile_traces of the run folder."""

    enable_profiling: bool = False
    """Write them; `crossdock train --profile` is short for it."""
    profile_freq: int = 100
    """Steps between traces, each of one step and of every rank; the first is of the third step after a start."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    @property
    def initial_weights(self) -> str:
        """The folder that a new run takes its weights from; empty: they are drawn."""
        return self.checkpoint.initial_load_path or (
            self.model.hf_assets_path if self.checkpoint.initial_load_in_hf else ""
        )

    @property
    def run_data(self) -> DataConfig:
        """`[data]`; a run that is resumed has its chat template in its folder, and needs the file no more."""
        return self.data if self.run_model is self.model else replace(self.data, chat_template="")

    @property
    def run_model(self) -> ModelConfig:
        """`[model]`, with a run that is resumed in the place of the folder that it started from, which may be gone."""
        if self.job.dump_folder and find_checkpoint(Path(self.job.dump_folder)) is not None:
            return replace(self.model, flavor="", hf_assets_path=str(Path(self.job.dump_folder, ASSETS_FOLDER)))
        return self.model


def setting_types() -> dict[str, Any]:
    """The type of every setting by its name, `section.key`."""
    sections = get_type_hints(Config).items()
    return {f"{section}.{key}": hint for section, cls in sections for key, hint in get_type_hints(cls).items()}
