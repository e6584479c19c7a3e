"""What a run leaves for others at its end: the model in Hugging Face's format, or the adapter in PEFT's."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from crossdock.checkpoint import CheckpointError
from crossdock.config import ASSETS_FOLDER, Config
from crossdock.models import FAMILIES, export_hf, left_out, save_peft_adapter
from crossdock.train.together import from_first_rank

__all__ = ["leave_export"]

_EXPORT_FOLDER = "hf"
_ADAPTER_FOLDER = "adapter"


def leave_export(config: Config, folder: Path, model: PreTrainedModel, *, again: bool) -> str:
    """Write the model, or the adapter, into the run folder. Collective.

    A run is whole without it, so that a failure ends nothing.

    Args:
        config: of the run.
        folder: of the run.
        model: this rank's part.
        again: whether to write it where it is there already.

    Returns:
        What to tell of it; empty where there was nothing to do.
    """
    lora, family = config.lora, FAMILIES[config.model.name]
    destination = folder / (_ADAPTER_FOLDER if lora.rank else _EXPORT_FOLDER)
    if not again and from_first_rank(destination.exists):
        return ""
    dtype = config.checkpoint.export_dtype
    try:
        if lora.rank:
            save_peft_adapter(model, family, lora, config.initial_weights, destination, dtype, replace=True)
            return f"adapter: {destination}"
        keys = family.keys(model)
        export_hf(model, keys, folder / ASSETS_FOLDER, destination, dtype, replace=True)
        return f"Hugging Face model: {destination}{left_out(model, keys)}"
    except CheckpointError as error:
        return f"{error}; crossdock export {folder} DESTINATION tries again"
