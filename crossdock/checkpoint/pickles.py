"""Weights in pickles: they are never read, and the refusal says why and what to do."""

from __future__ import annotations

from pathlib import Path

__all__ = ["pickle_refusal"]

_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHOWN = 3


def pickle_refusal(path: Path) -> str:
    """Why the pickle `path`, or a folder with pickles, is not read; empty where there is none."""
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.suffix in _ENDINGS)
    else:
        found = [path.name] if path.is_file() and path.suffix in _ENDINGS else []
    if not found:
        return ""
    held = "is a pickle" if not path.is_dir() else f"holds pickles ({', '.join(found[:_SHOWN])}), and no safetensors"
    return (
        f"{path} {held}. Whoever wrote a pickle may have it run any code when it is loaded, so none is read. Where you "
        "trust it, load it with transformers' from_pretrained and save it with save_pretrained, which writes "
        "safetensors; for a model on the Hub, https://huggingface.co/spaces/safetensors/convert does that"
    )
