"""Weights from one format to another: Hugging Face's, our checkpoints, other DCP folders; dense models to MoE ones.

It takes one process, no GPU, and memory for some files, or one layer's experts, of the model.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import (
    CHECKPOINT_FOLDER,
    MAX_SHARD_BYTES,
    METADATA_FILE,
    CheckpointConfig,
    CheckpointError,
    HFCheckpoint,
    checkpoint_as_hf,
    find_checkpoint,
    open_foreign,
    pickle_refusal,
    replace_folder,
    stream_checkpoint,
    stream_hf,
    verify_checkpoint,
)
from crossdock.config import (
    ASSETS_FOLDER,
    RUN_CONFIG_FILE,
    Config,
    ConfigError,
    TrainingConfig,
    check_writable,
    write_run_settings,
)
from crossdock.data import DataError, read_tokenizer
from crossdock.models import (
    FAMILIES,
    UPCYCLED,
    Family,
    ModelConfig,
    ModelError,
    build_model,
    copy_assets,
    dtypes_of,
    foreign_weights,
    left_out,
    most_positions,
    read_dtypes,
    resolve_hf_config,
    upcycled_config,
    upcycled_weights,
    write_assets,
)
from crossdock.moe_config import MoEConfig
from crossdock.tools.opening import family_of, find_model

__all__ = ["Conversion", "ConvertOptions", "convert", "plan_conversion"]

_SECONDS_BETWEEN_LINES = 10.0
_FORMATS = {"hf": "Hugging Face's format", "dcp": "a run folder"}


@dataclass(frozen=True)
class ConvertOptions:
    """What a user chooses; what is not meant for a conversion must be left as it is.

    Attributes:
        to: the format of the destination; empty: the other one than the source's, `hf` for a foreign folder.
        assets: folder with config.json and tokenizer, of a foreign folder.
        family: as `model.name`; empty: that of the source's `model_type`.
        upcycle: experts per layer and experts per token, of a dense source.
        seed: of the routers of `upcycle`; `None` is 0.
        dtype: torch's name of the dtype of all tensors in Hugging Face's format; empty: their own.
        max_shard_bytes: of a file in Hugging Face's format; `None` is 5 GB.
    """

    to: Literal["", "hf", "dcp"] = ""
    assets: Path | None = None
    family: str = ""
    upcycle: tuple[int, int] | None = None
    seed: int | None = None
    dtype: str = ""
    max_shard_bytes: int | None = None


@dataclass(frozen=True)
class _Source:
    """Weights as a folder of Hugging Face's format has them, and what they are of.

    Attributes:
        kind: for people.
        family: of the model.
        model: on the meta device, in the dtype of a run.
        weights: checked ones.
        assets: folder with tokenizer and configuration.
        hf_config: what config.json shall say, where that is not what it says there.
        is_run: whether it is one of our runs, which knows what dtypes its tensors had.
    """

    kind: str
    family: Family
    model: PreTrainedModel
    weights: HFCheckpoint
    assets: Path
    hf_config: PreTrainedConfig | None = None
    is_run: bool = False


@dataclass(frozen=True)
class Conversion:
    """A conversion that can begin; made by `plan_conversion`.

    Attributes:
        source: what is read.
        destination: does not exist yet.
        to: its format.
        options: as given.
    """

    source: _Source
    destination: Path
    to: Literal["hf", "dcp"]
    options: ConvertOptions


def plan_conversion(source: Path, destination: Path, options: ConvertOptions) -> Conversion:
    """Check all that can be known before anything is written; reads settings and headers alone.

    Raises:
        ConfigError: for options that do not go with the source, and for a source that holds no model that is known, or
            no weights that can be read.
        CheckpointError: for one of our checkpoints that is damaged.
    """
    if destination.exists() or destination.is_symlink():
        raise ConfigError("destination", str(destination), "exists; name another folder, or remove it")
    check_writable("destination", str(destination))
    is_foreign, is_run = (source / METADATA_FILE).is_file(), find_checkpoint(source) is not None
    for name, value, goes, where in (
        ("--family", options.family or None, not (is_run or options.upcycle), "is for folders that are no run of ours"),
        ("--assets", options.assets, is_foreign, "is for folders of torch's distributed checkpoint alone"),
        ("--upcycle", options.upcycle, not (is_foreign or is_run), "takes a dense model in Hugging Face's format"),
        ("--seed", options.seed, options.upcycle is not None, "is of the routers that --upcycle draws"),
    ):
        if value is not None and not goes:
            raise ConfigError(name, str(value), where)
    stays = "dcp" if is_run else "" if is_foreign or options.upcycle else "hf"
    to = options.to or ("dcp" if stays == "hf" else "hf")
    if to == stays:
        more = "; --upcycle E,K makes a MoE of a dense model" if to == "hf" else ""
        raise ConfigError("--to", to, f"{source} is {_FORMATS[to]} already{more}")
    for name, value in (("--dtype", options.dtype), ("--max-shard-size", options.max_shard_bytes)):
        if value and to == "dcp":
            raise ConfigError(name, str(value), "is for --to hf: a run holds float32 in files of its own size")
    if is_foreign:
        found = _foreign_source(source, options.assets, options.family)
    elif options.upcycle is not None:
        found = _upcycled_source(source, options.upcycle, options.seed or 0)
    else:
        found = _known_source(source, options.family)
    return Conversion(found, destination, to, options)


def convert(conversion: Conversion, say: Callable[[str], None]) -> None:
    """Write the destination: beside its place, and renamed when whole.

    Args:
        conversion: from `plan_conversion`.
        say: shows a line.

    Raises:
        CheckpointError: where something could not be read or written; nothing is left then.
    """
    source, destination = conversion.source, conversion.destination
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    say(f"{source.kind}: {source.model.config.model_type}, {parameters / 1e6:,.1f} M parameters")
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (_write_hf if conversion.to == "hf" else _write_run)(conversion, partial, _Progress(say))
        replace_folder(partial, destination)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot convert to {destination}: {error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    note = left_out(source.model, source.family.keys(source.model)) if conversion.to == "hf" else ""
    say(f"written: {destination}{note}")


def _write_hf(conversion: Conversion, folder: Path, progress: Callable[[int, int], None]) -> None:
    source, options = conversion.source, conversion.options
    if source.is_run or options.dtype:
        dtypes = read_dtypes(source.assets, options.dtype)
    else:
        dtypes = dtypes_of(source.model, source.weights)
    copy_assets(source.assets, folder, dtypes.default, source.hf_config)
    stream_hf(source.weights, folder, dtypes.of, options.max_shard_bytes or MAX_SHARD_BYTES, progress)


def _write_run(conversion: Conversion, folder: Path, progress: Callable[[int, int], None]) -> None:
    source, destination = conversion.source, conversion.destination
    tokenizer: Path | None = source.assets / "tokenizer.json"
    if not tokenizer.is_file():
        tokenizer = None
    end_of_text_id = None if tokenizer is None else _end_of_text_id(source.assets)
    write_assets(folder / ASSETS_FOLDER, source.model, tokenizer, end_of_text_id, source.assets, source.weights)
    keys = source.family.keys(source.model)
    stream_checkpoint(source.weights, source.model, keys, folder / CHECKPOINT_FOLDER, progress)
    config = Config(
        model=ModelConfig(name=source.family.name, hf_assets_path=str(destination / ASSETS_FOLDER)),
        training=TrainingConfig(
            seq_len=min(1024, most_positions(source.model.config)),
            dtype="float64" if source.model.dtype == torch.float64 else "float32",
        ),
        checkpoint=CheckpointConfig(initial_load_path=str(destination)),
    )
    write_run_settings(config, folder)


def _known_source(path: Path, family_name: str) -> _Source:
    """A folder in Hugging Face's format, a run or a checkpoint."""
    try:
        found = find_model(path, family_name)
    except ConfigError as error:
        is_run, has_config = ((path / name).is_file() for name in (RUN_CONFIG_FILE, "config.json"))
        if not (is_run or has_config) and (refusal := pickle_refusal(path)):
            raise ConfigError("source", str(path), refusal) from None
        if _model_type(path) in UPCYCLED:
            valid = f"is a dense model ({_model_type(path)}); --upcycle E,K makes a MoE of it"
            raise ConfigError("source", str(path), valid) from None
        more = f", or a folder of torch's distributed checkpoint, with {METADATA_FILE}"
        valid = f"{error.valid}{more if error.valid.startswith('must be') else ''}"
        raise ConfigError("source" if error.field == "model" else error.field, error.value, valid) from None
    if found.lora.rank:
        valid = f"is a LoRA run, whose checkpoints hold adapters alone; crossdock export {path} DESTINATION --merge"
        raise ConfigError("source", str(path), f"{valid} writes the whole model")
    family = found.family
    if isinstance(found.weights, HFCheckpoint):
        model = build_model(family, found.hf_config, found.moe, _run_dtype(found.weights))
        return _Source("Hugging Face folder", family, model, found.weights, found.assets)
    model = build_model(family, found.hf_config, found.moe, found.dtype)
    folder = found.weights[0] / f"step-{found.weights[1]:08d}"
    verify_checkpoint(folder)
    weights = checkpoint_as_hf(folder, model, family.keys(model))
    return _Source(f"checkpoint {folder}", family, model, weights, found.assets, is_run=True)


def _foreign_source(path: Path, assets: Path | None, family_name: str) -> _Source:
    if assets is None or not (assets / "config.json").is_file():
        valid = f"a folder with config.json and tokenizer of the model, since {path} has none"
        raise ConfigError("--assets", str(assets or ""), valid)
    family, hf_config = _family_and_config(assets, family_name)
    try:
        model = build_model(family, hf_config, MoEConfig(), torch.float32)
        weights = foreign_weights(open_foreign(path), model, family)
    except CheckpointError as error:
        raise ConfigError("source", str(path), str(error)) from None
    if _run_dtype(weights) == torch.float64:
        model = build_model(family, hf_config, MoEConfig(), torch.float64)
    return _Source("folder of torch's distributed checkpoint", family, model, weights, assets)


def _upcycled_source(path: Path, sizes: tuple[int, int], seed: int) -> _Source:
    model_type = _model_type(path)
    if model_type not in UPCYCLED:
        found = f"{path} is {model_type!r}" if model_type else f"{path} has no config.json that says so"
        valid = f"takes a dense model in Hugging Face's format, of model_type {', '.join(UPCYCLED)}; {found}"
        raise ConfigError("--upcycle", ",".join(map(str, sizes)), valid)
    try:
        family, hf_config = upcycled_config(path, model_type, *sizes)
        dense = HFCheckpoint.open(path)
        model = build_model(family, hf_config, MoEConfig(), _run_dtype(dense))
        weights = upcycled_weights(dense, model, family, seed)
    except CheckpointError as error:
        raise ConfigError("source", str(path), str(error)) from None
    except Exception as error:  # Whatever transformers raises for a config.json that it cannot make a model of.
        cause = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ConfigError("source", str(path), f"its config.json makes no model ({cause})") from error
    hf_config.architectures = [type(model).__name__]
    return _Source(f"dense Hugging Face folder ({model_type})", family, model, weights, path, hf_config)


def _model_type(folder: Path) -> str:
    """What `folder/config.json` names; empty where there is none."""
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _family_and_config(assets: Path, family_name: str) -> tuple[Family, PreTrainedConfig]:
    try:
        name = family_name or family_of(assets)
        hf_config = resolve_hf_config(ModelConfig(name=name, hf_assets_path=str(assets)))
        return FAMILIES[name], hf_config
    except ConfigError as error:
        raise ConfigError("--assets", error.value, error.valid) from None
    except ModelError as error:
        raise ConfigError("--assets", str(assets), str(error)) from None
    except Exception as error:  # Whatever transformers raises for a config.json that it cannot make a model of.
        cause = f"its config.json makes no model ({type(error).__name__}: {error})"
        raise ConfigError("--assets", str(assets), cause) from error


def _run_dtype(weights: HFCheckpoint) -> torch.dtype:
    """What holds all values of `weights`, of the dtypes that a run has."""
    return torch.float64 if any(stored.dtype == "F64" for stored in weights.tensors.values()) else torch.float32


def _end_of_text_id(assets: Path) -> int | None:
    try:
        text, end_of_text = read_tokenizer(assets)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    return None if end_of_text is None else Tokenizer.from_str(text).token_to_id(end_of_text)


class _Progress:
    """A line now and then."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES and done < total:
            self._last = time.monotonic()
            self._say(f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB")
