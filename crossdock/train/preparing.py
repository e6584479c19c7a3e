"""What a run needs before its first step: tokens, the run folder, the model on its layout with its first values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from crossdock.checkpoint import Checkpointer, HFCheckpoint, HFKeys, find_checkpoint
from crossdock.config import ASSETS_FOLDER, Config
from crossdock.data import TokenFile, Tokens, prepare_tokens, read_chat_template
from crossdock.lora import adapters_of, add_lora
from crossdock.models import (
    FAMILIES,
    Family,
    PeftAdapter,
    accept_context_parallel,
    build_model,
    count_parameters,
    initialise_weights,
    materialise,
    resolve_hf_config,
    write_assets,
)
from crossdock.moe import MoE, moe_layers
from crossdock.parallel import Meshes, parallelize
from crossdock.train.flops import Speed
from crossdock.train.record import one_at_a_time
from crossdock.train.together import TrainingStopped, patient_group, together
from crossdock.train.tuned import take_tuned

__all__ = [
    "RunTokens",
    "TrainingModel",
    "build_training_model",
    "lay_out",
    "model_of",
    "prepare_model",
    "prepare_run_tokens",
]


class RunTokens(NamedTuple):
    """What a run reads: tokens to train on, and files to validate with, none where there is no validation."""

    train: Tokens
    validation: tuple[TokenFile, ...]


class TrainingModel(NamedTuple):
    """A model on its layout, and what it is as a whole.

    Attributes:
        model: this rank's part.
        num_parameters: of the whole model.
        in_adapters: how many of them are adapters'; 0 without.
        top_k: experts per token.
        auxiliary_losses: names of those that are on.
        speed: what a token takes.
    """

    model: PreTrainedModel
    num_parameters: int
    in_adapters: int
    top_k: int
    auxiliary_losses: tuple[str, ...]
    speed: Speed

    @classmethod
    def of(cls, model: PreTrainedModel, seq_len: int, device: torch.device) -> TrainingModel:
        """Of one that is whole still."""
        first = next(iter(moe_layers(model).values()))
        return cls(
            model,
            count_parameters(model),
            sum(parameter.numel() for parameter in adapters_of(model).values()),
            first.top_k,
            tuple(first.coefficients.active()) if isinstance(first, MoE) else (),
            Speed.of(model, seq_len, device),
        )


def prepare_run_tokens(config: Config, first_on_machine: bool) -> RunTokens:
    """One rank per machine tokenises (or finds) the data while the others wait, as long as it takes. Collective.

    Raises:
        DataError: on all ranks, see `prepare_tokens`.
        TrainingStopped: on all ranks, for a tokenizer that the model's vocabulary has no room for, or a resumed run
            whose text has changed.
    """
    # A tokenizer that was trained on the text is trained again, or found in the cache.
    assets = Path(config.run_model.hf_assets_path) if config.model.hf_assets_path else None

    def prepare() -> RunTokens:
        vocabulary = resolve_hf_config(config.run_model).get_text_config().vocab_size or 0
        tokens = prepare_tokens(config.run_data, assets, min(vocabulary, 8192))
        if tokens.vocab_size > vocabulary:
            raise TrainingStopped(
                f"the tokenizer has {tokens.vocab_size} tokens, the model's vocabulary {vocabulary}; "
                "choose another model.flavor or model.hf_assets_path"
            )
        used = Path(config.job.dump_folder, ASSETS_FOLDER, "tokenizer.json")
        if config.run_model is not config.model and used.read_bytes() != tokens.tokenizer_path.read_bytes():
            raise TrainingStopped(
                f"the text of data.source {', '.join(config.data.source)} is not what the run in "
                f"{config.job.dump_folder} began with: it gives another tokenizer. Give the old text back, or choose "
                "another job.dump_folder, with checkpoint.initial_load_path for the weights."
            )
        if not config.validation.interval:
            return RunTokens(tokens, ())
        if not config.validation.data:
            return RunTokens(tokens, tokens.held_out)
        source = replace(config.run_data, source=(config.validation.data,), weights=(), held_out=0.0)
        return RunTokens(tokens, prepare_tokens(source, assets or tokens.tokenizer_path.parent).train)

    patient = patient_group()
    prepared = together(prepare if first_on_machine else lambda: None, patient)
    return together(lambda: prepared or prepare(), patient)


def build_training_model(
    config: Config,
    meshes: Meshes,
    device: torch.device,
    folder: Path,
    tokens: Tokens,
    *,
    is_new: bool,
    threads: bool = False,
) -> TrainingModel:
    """The model on its layout; of a run that `is_new`, with its first values: drawn, or those it starts from.

    With LoRA, the weights beside the adapters are read in any case: no checkpoint of the run holds them. A new run's
    folder gets what an export needs beside weights, when these are there. `threads`: see `take_tuned`. Collective.

    Raises:
        ConfigError: see `take_tuned`.
        CheckpointError: on all ranks, where weights could not be read.
        TrainingStopped: on all ranks, where the run folder could not be written.
    """
    family, training = FAMILIES[config.model.name], config.training
    model = model_of(config)
    take_tuned(model, config, meshes, device, threads=threads)
    prepare_model(model, config, meshes)
    start = Path(config.initial_weights) if config.initial_weights and (is_new or config.lora.rank) else None
    checkpoint = find_checkpoint(start) if start is not None else None
    weights = None
    if start is not None and checkpoint is None:
        weights = together(lambda: _open_weights(start, model, family.keys(model)))
    whole = TrainingModel.of(model, training.seq_len, device)
    lay_out(model, config, meshes)
    seed = training.seed if is_new and checkpoint is None else None
    materialise(family, model, device, offload=training.enable_cpu_offload, seed=seed, weights=weights)
    if checkpoint is not None:
        Checkpointer(checkpoint[0], model, None, of_base=True).load(checkpoint[1])
        if is_new:
            initialise_weights(model, training.seed, 0.0, adapters_alone=True)
    if is_new and config.lora.adapter_path:
        adapter = together(lambda: _open_adapter(config, family, model))
        adapter.load(model, family)
    if is_new:
        source = Path(config.model.hf_assets_path) if config.model.hf_assets_path else None
        end_of_text_id = tokens.train[0].end_of_text_id
        template = together(lambda: read_chat_template(config.data.chat_template))
        arguments = (folder / ASSETS_FOLDER, model, tokens.tokenizer_path, end_of_text_id, source, weights, template)
        together(lambda: _write_assets(*arguments) if dist.get_rank() == 0 else None)
    return whole


def model_of(config: Config, num_blocks: int | None = None) -> PreTrainedModel:
    """The model that a run trains, on the meta device: whole, or with its first blocks alone."""
    training = config.training
    hf_config = resolve_hf_config(config.run_model)
    if num_blocks is not None:
        text: Any = hf_config.get_text_config()
        text.num_hidden_layers = num_blocks
        for name in ("layer_types", "mlp_layer_types"):
            if isinstance(types := getattr(text, name, None), list):
                setattr(text, name, types[:num_blocks])
    return build_model(
        FAMILIES[config.model.name],
        hf_config,
        config.moe,
        torch.float64 if training.dtype == "float64" else torch.float32,
        attn_implementation=config.model.attn_implementation,
        kernels=config.model.kernels,
        force_load_balance=training.debug_moe_force_load_balance,
    )


def prepare_model(model: PreTrainedModel, config: Config, meshes: Meshes) -> None:
    """What is done to a whole model before it is laid out: shared sequences, what is frozen, adapters. In place."""
    family, training = FAMILIES[config.model.name], config.training
    if meshes.cp is not None or (meshes.size("tp") > 1 and family.own_attention):
        accept_context_parallel(model, config.parallelism.context_parallel_method)
    for layer in moe_layers(model).values():
        if layer.router is not None:
            layer.router.requires_grad_(not training.freeze_router)
        layer.experts.requires_grad_(not training.freeze_experts)
    if config.lora.rank:
        add_lora(model, config.lora, family.attention)


def lay_out(model: PreTrainedModel, config: Config, meshes: Meshes) -> None:
    """Make a prepared model parallel, in place. Collective."""
    family, training = FAMILIES[config.model.name], config.training
    parallelize(
        model,
        meshes,
        config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile_config=config.compile,
        param_dtype=torch.bfloat16 if training.dtype == "bfloat16" else None,
        cpu_offload=training.enable_cpu_offload,
        tokens_per_rank=training.local_batch_size * training.seq_len // meshes.sequence_degree,
        tensor_plan=family.tensor_plan(model.config),
    )


def _write_assets(folder: Path, *arguments: Any) -> None:
    with one_at_a_time(folder.parent):
        write_assets(folder, *arguments)


def _open_weights(folder: Path, model: PreTrainedModel, keys: HFKeys) -> HFCheckpoint:
    """Weights whose headers fit the model, still: they were looked at when the run was asked for."""
    weights = HFCheckpoint.open(folder)
    weights.check(model, keys)
    return weights


def _open_adapter(config: Config, family: Family, model: PreTrainedModel) -> PeftAdapter:
    """An adapter that fits the model, still."""
    adapter = PeftAdapter.open(Path(config.lora.adapter_path))
    adapter.check(model, family, config.lora)
    return adapter
