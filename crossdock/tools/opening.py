"""Finding a model on disk (a run, a checkpoint or a Hugging Face folder) and opening it on the ranks there are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import (
    CHECKPOINT_FOLDER,
    Checkpointer,
    CheckpointError,
    HFCheckpoint,
    find_checkpoint,
    folder_problem,
)
from crossdock.config import ASSETS_FOLDER, RUN_CONFIG_FILE, ConfigError, expert_parallel_degrees, read_run_settings
from crossdock.data import ChatTokenizer, DataConfig, DataError, open_tokenizer, vocabulary_size
from crossdock.lora import LoRAConfig, add_lora
from crossdock.models import (
    FAMILIES,
    Family,
    ModelConfig,
    ModelError,
    build_model,
    materialise,
    most_positions,
    no_adapter,
    resolve_hf_config,
)
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, ParallelismConfig, parallelize

__all__ = ["ModelSource", "check_ranks", "family_of", "find_model", "open_model"]


@dataclass(frozen=True)
class ModelSource:
    """A model on disk.

    Attributes:
        path: as the user named it.
        family: of the model.
        hf_config: its sizes.
        moe: backends, and whether it has an expert bias.
        assets: folder with tokenizer and configuration.
        weights: Hugging Face's, or folder and step of one of our checkpoints.
        lora: of a LoRA run, whose checkpoints hold adapters alone; `rank` 0 for other models.
        base: the weights beside those adapters, likewise; `None` for other models.
        base_path: where they are.
        seq_len: tokens of a sequence that it is used to.
        data: how its run packed documents; the defaults for other models.
        dtype: of the weights in memory: fp32, or float64 for such a run.
        end_of_text_ids: what generation_config.json says that ends a text; `None` leaves it to the configuration.
    """

    path: Path
    family: Family
    hf_config: PreTrainedConfig
    moe: MoEConfig
    assets: Path
    weights: HFCheckpoint | tuple[Path, int]
    lora: LoRAConfig
    base: HFCheckpoint | tuple[Path, int] | None
    base_path: str
    seq_len: int
    data: DataConfig
    dtype: torch.dtype
    end_of_text_ids: list[int] | None

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which neither cuts nor pads.

        Raises:
            ConfigError: where tokenizer.json cannot be read, or has tokens that the model has not.
        """
        try:
            tokenizer = open_tokenizer(self.assets)
        except DataError as error:
            raise ConfigError("model", str(self.path), str(error)) from None
        tokens, most = vocabulary_size(tokenizer), self.hf_config.get_text_config().vocab_size or 0
        if tokens > most:
            raise ConfigError("model", str(self.path), f"its tokenizer has {tokens} tokens, its vocabulary {most}")
        return tokenizer

    def chat_tokenizer(self) -> ChatTokenizer:
        """Its tokenizer with its chat template. Raises DataError where it has none."""
        return ChatTokenizer(self.assets)


def find_model(path: Path, family_name: str = "") -> ModelSource:
    """The model at `path`: a run folder (its newest checkpoint), a checkpoint, or a folder in Hugging Face's format.

    Reads settings and headers alone. Needs no process group.

    Args:
        path: the folder.
        family_name: of one in Hugging Face's format, as `model.name`; empty for the one that is for its `model_type`.

    Raises:
        ConfigError: for a path that holds no model, or one whose weights do not fit its configuration.
    """
    checkpoint = find_checkpoint(path)
    dtype, data, lora, base_path = torch.float32, DataConfig(), LoRAConfig(), ""
    if checkpoint is not None:
        run = checkpoint[0].parent
        config = read_run_settings(run)
        if problem := folder_problem(run / ASSETS_FOLDER):
            raise ConfigError("model", str(path), problem)
        # Room for the batches of training, and experiments with the router, are the training's.
        moe = replace(config.moe, static_shapes=False, debug_force_zipf=-1.0, debug_force_zipf_seed=-1)
        if moe.dispatcher == "local":  # it may have been one rank then
            moe = replace(moe, dispatcher="auto")
        name, assets, weights = config.model.name, run / ASSETS_FOLDER, checkpoint
        seq_len, data = config.training.seq_len, config.data
        lora, base_path = config.lora, config.initial_weights if config.lora.rank else ""
        dtype = torch.float64 if config.training.dtype == "float64" else torch.float32
    elif (path / "config.json").is_file():
        name, moe, assets, weights = family_name or family_of(path), MoEConfig(), path, None
        seq_len = 1024
    else:
        found = "no checkpoint yet" if (path / RUN_CONFIG_FILE).is_file() else "no config.json"
        kinds = f"a run folder, RUN/{CHECKPOINT_FOLDER}/step-..., or a folder in Hugging Face's format"
        raise ConfigError("model", str(path), f"must be {kinds}; it has {found}")
    try:
        hf_config = resolve_hf_config(ModelConfig(name=name, hf_assets_path=str(assets)))
        family = FAMILIES[name]
        if weights is None:
            weights = _open_weights(path, build_model(family, hf_config, moe, dtype), family)
        base = find_checkpoint(Path(base_path))
        if base_path and base is None:
            base = _open_weights(Path(base_path), build_model(family, hf_config, moe, dtype), family)
    except (CheckpointError, ModelError) as error:
        raise ConfigError("model", str(path), str(error)) from None
    except Exception as error:  # Whatever transformers raises for a config.json that it cannot make a model of.
        cause = f"its config.json makes no model ({type(error).__name__}: {error})"
        raise ConfigError("model", str(path), cause) from error
    seq_len = min(seq_len, most_positions(hf_config))
    end_of_text_ids = _end_of_text_ids(assets)
    return ModelSource(
        path, family, hf_config, moe, assets, weights, lora, base, base_path, seq_len, data, dtype, end_of_text_ids
    )


def check_ranks(source: ModelSource, world_size: int) -> None:
    """Raises ConfigError where the model cannot be spread over `world_size` ranks."""
    sizes = source.family.expert_sizes(source.hf_config)
    if not expert_parallel_degrees(sizes, world_size):
        working = [str(n) for n in range(1, world_size) if expert_parallel_degrees(sizes, n)]
        raise ConfigError(
            "--nproc", world_size, f"this model's sizes do not divide over it; use {' or '.join(working)}"
        )


def open_model(
    source: ModelSource, device: torch.device, *, compute_dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model on all ranks of the default process group, for inference: experts spread over as many as can be.

    Collective.

    Args:
        source: from `find_model`.
        device: of this rank.
        compute_dtype: of the computation; the weights keep `source.dtype`. `None` for that one.

    Raises:
        CheckpointError: on all ranks, if weights could not be read.
    """
    world_size = dist.get_world_size()
    model = build_model(source.family, source.hf_config, source.moe, source.dtype)
    if source.lora.rank:
        add_lora(model, source.lora, source.family.attention)
    ep = max(expert_parallel_degrees(source.family.expert_sizes(source.hf_config), world_size))
    mesh = ParallelDims(world_size, ep=ep).build_mesh(device.type)
    parallelize(model, mesh, ParallelismConfig(reshard_after_forward="never"), param_dtype=compute_dtype)
    begin = source.base or source.weights
    weights = begin if isinstance(begin, HFCheckpoint) else None
    materialise(source.family, model, device, seed=None, weights=weights)
    if not isinstance(begin, HFCheckpoint):
        folder, step = begin
        Checkpointer(folder, model, None, of_base=True).load(step)
    if source.base is not None and not isinstance(source.weights, HFCheckpoint):
        folder, step = source.weights
        Checkpointer(folder, model, None).load(step)
    if source.end_of_text_ids is not None and model.generation_config is not None:
        model.generation_config.eos_token_id = source.end_of_text_ids
    return model.eval()


def _open_weights(folder: Path, model: PreTrainedModel, family: Family) -> HFCheckpoint:
    weights = HFCheckpoint.open(folder)
    weights.check(model, family.keys(model))
    return weights


def _end_of_text_ids(assets: Path) -> list[int] | None:
    """What generation_config.json names; how tokens are drawn is the user's to say."""
    path = assets / "generation_config.json"
    if not path.is_file():
        return None
    try:
        ids = json.loads(path.read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("model", str(assets), f"its generation_config.json cannot be read ({error})") from None
    ids = [ids] if type(ids) is int else ids
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise ConfigError("model", str(assets), f"its generation_config.json has eos_token_id {ids!r}, not token ids")
    return ids or None


def family_of(folder: Path) -> str:
    """The family whose `model_type` is that of `folder/config.json`."""
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("model", str(folder), f"its config.json cannot be read ({error})") from None
    for name, family in FAMILIES.items():
        if family.model_type and family.model_type == model_type:
            return name
    raise ConfigError(
        "model",
        str(folder),
        f"its config.json has model_type {model_type!r}; {no_adapter(model_type, '--family generic takes')}",
    )
