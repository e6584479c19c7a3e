"""What goes with weights in Hugging Face's format (configuration, tokenizer, dtypes), and writing all of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from crossdock.checkpoint import (
    DTYPES,
    MAX_SHARD_BYTES,
    CheckpointError,
    HFCheckpoint,
    HFKeys,
    replace_folder,
    save_hf,
    write_checksums,
)
from crossdock.comm import raise_together
from crossdock.moe import moe_layers

__all__ = [
    "EXPORT_DTYPES",
    "ExportDtypes",
    "copy_assets",
    "dtypes_of",
    "export_hf",
    "left_out",
    "read_dtypes",
    "write_assets",
]

_CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATES_FOLDER = "additional_chat_templates"
_DTYPES_FILE = "tensor_dtypes.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    _TEMPLATE_FILE,
    "chat_template.json",
)

EXPORT_DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""torch's names of the dtypes that weights can be exported in, and safetensors'."""


class ExportDtypes(NamedTuple):
    """In what dtype a model's tensors are stored: most of them in `default`, the `others` by name."""

    default: str
    others: dict[str, str]

    def of(self, name: str) -> str:
        """That of a tensor."""
        return self.others.get(name, self.default)


def write_assets(
    folder: Path,
    model: PreTrainedModel,
    tokenizer_path: Path | None,
    end_of_text_id: int | None,
    source: Path | None,
    weights: HFCheckpoint | None,
    chat_template: str | None = None,
) -> None:
    """Gather in `folder` what an export needs beside the weights, so that the source may vanish.

    Args:
        folder: made where it is missing.
        model: whose configuration is written.
        tokenizer_path: a tokenizer.json; `None` where there is none.
        end_of_text_id: its id of the end of a text, where it has one.
        source: folder in Hugging Face's format with further files of the tokenizer and a generation_config.json.
        weights: those that the model starts from, whose dtypes an export shall have; `None` gives the model's own.
        chat_template: goes there in the place of the source's.

    Raises:
        OSError: where files cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        _copy_texts(source, folder)
    if tokenizer_path is not None:
        shutil.copyfile(tokenizer_path, folder / _TOKENIZER_FILES[0])
    if chat_template is not None:
        (folder / _TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # Of the weights of the source, not of those that are written.
    config.architectures = config.architectures or [type(model).__name__]
    if config.eos_token_id is None:
        config.eos_token_id = end_of_text_id
    config.save_pretrained(folder)
    if not (folder / _GENERATION_FILE).is_file():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    if tokenizer_path is not None and not (folder / _TOKENIZER_FILES[1]).is_file():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        end_of_text = None if end_of_text_id is None else tokenizer.id_to_token(end_of_text_id)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end_of_text).save_pretrained(folder)
        # What transformers has written may differ from what the tokens were made with.
        shutil.copyfile(tokenizer_path, folder / _TOKENIZER_FILES[0])
    (folder / _DTYPES_FILE).write_text(json.dumps(dtypes_of(model, weights)._asdict(), indent=2) + "\n")
    write_checksums(folder)


def left_out(model: PreTrainedModel, keys: HFKeys) -> str:
    """What an export leaves out of a model, in brackets, for a message; empty where that is nothing."""
    routers = [layer.router for layer in moe_layers(model).values() if layer.router is not None]
    biased = not keys.expert_bias and any(router.expert_bias is not None for router in routers)
    return " (without the expert bias, for which its format has no place)" if biased else ""


def dtypes_of(model: PreTrainedModel, weights: HFCheckpoint | None) -> ExportDtypes:
    """Those of `weights`, else the model's own."""
    if weights is None:
        return ExportDtypes(next(name for name, dtype in DTYPES.items() if dtype == model.dtype), {})
    stored = {name: tensor.dtype for name, tensor in weights.tensors.items()}
    most = Counter(stored.values()).most_common(1)[0][0]
    return ExportDtypes(most, {name: dtype for name, dtype in stored.items() if dtype != most})


def export_hf(
    model: PreTrainedModel,
    keys: HFKeys,
    assets: Path,
    destination: Path,
    dtype: str = "",
    *,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads. Collective; on any layout.

    It is written beside its final place and renamed when whole.

    Args:
        model: its weights.
        keys: of its family.
        assets: from `write_assets`.
        destination: must not exist, unless `replace`.
        dtype: torch's name of the dtype of all tensors; empty: each tensor has the one that `assets` names.
        replace: remove what is at `destination`, when the new folder is whole.
        max_shard_bytes: of a file's tensors.

    Raises:
        CheckpointError: on all ranks, if it exists or something could not be read or written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    partial = destination.with_name(f".{destination.name}.partial")
    error: Exception | None = None
    dtypes = ExportDtypes("", {})
    try:
        if destination.exists() and not replace:
            raise FileExistsError(0, "it exists; name another folder, or remove it")
        dtypes = read_dtypes(assets, dtype)
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            copy_assets(assets, partial, dtypes.default)
    except (OSError, ValueError) as caught:
        error = CheckpointError(f"cannot export to {destination}: {getattr(caught, 'strerror', None) or caught}")
    raise_together(error)
    save_hf(model, keys, partial, dtypes.others, dtypes.default, max_shard_bytes)
    if rank == 0:
        try:
            replace_folder(partial, destination)
        except OSError as caught:
            error = CheckpointError(f"cannot export to {destination}: {caught}")
    raise_together(error)


def read_dtypes(assets: Path, dtype: str) -> ExportDtypes:
    """torch's `dtype` for all, or what `write_assets` has noted. Raises OSError."""
    if dtype:
        return ExportDtypes(EXPORT_DTYPES[dtype], {})
    path = assets / _DTYPES_FILE
    try:
        dtypes = ExportDtypes(**json.loads(path.read_text()))
        unknown = {dtypes.default, *dtypes.others.values()} - DTYPES.keys()
    except (ValueError, TypeError, AttributeError) as error:
        raise OSError(0, f"cannot read {path} ({error}); name a dtype") from None
    if unknown:
        raise OSError(0, f"cannot read {path} (it has {min(map(str, unknown))}, not {', '.join(DTYPES)}); name a dtype")
    return dtypes


def _copy_texts(source: Path, folder: Path) -> None:
    """Copy what there is of the tokenizer's files and the generation configuration."""
    templates = sorted((source / _TEMPLATES_FOLDER).glob("*.jinja"))
    names = [name for name in (*_TOKENIZER_FILES, _GENERATION_FILE) if (source / name).is_file()]
    for name in (*names, *(f"{_TEMPLATES_FOLDER}/{path.name}" for path in templates)):
        if not _belongs(source / name, source):
            raise OSError(0, f"{source / name} is a link to a file elsewhere, which is not copied; put the file there")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _belongs(path: Path, folder: Path) -> bool:
    """Whether what is to be copied from a folder is a file of it, or of the Hub's cache that the folder is a part of.

    Else a folder that somebody has made could have a copy made of any file that its reader may read, and handed on.
    """
    place, folder = path.resolve(), folder.resolve()
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return place.is_relative_to(folder) or place.is_relative_to(blobs)


def copy_assets(assets: Path, folder: Path, default_dtype: str, hf_config: PreTrainedConfig | None = None) -> None:
    """Copy tokenizer and configurations to where weights of `default_dtype` are.

    Args:
        assets: from `write_assets`, or another folder in Hugging Face's format.
        folder: exists.
        default_dtype: of `DTYPES`.
        hf_config: what config.json shall say instead of the one there.
    """
    _copy_texts(assets, folder)
    config = json.loads((assets / _CONFIG_FILE).read_text() if hf_config is None else hf_config.to_json_string())
    config.pop("torch_dtype", None)
    config.pop("auto_map", None)  # Code that is not copied, and was never run here.
    config.pop("quantization_config", None)  # Of the weights there, not of those that are written.
    config["dtype"] = str(DTYPES[default_dtype]).removeprefix("torch.")
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
