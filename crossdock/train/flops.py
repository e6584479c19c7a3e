"""How well the hardware is used: model FLOPs per second, and their share of what the device can do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from crossdock.moe import moe_layers

__all__ = ["Speed", "model_flops_per_token", "peak_tflops"]

# Published dense bf16 TFLOP/s (without sparsity) by words of the device's name; the first row that fits counts.
_PEAK_TFLOPS = (
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("GB200", 2500.0),
    ("MI300X", 1307.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Published dense bf16 peak of a device in TFLOP/s; `None` for one that is not known, or a slice (MIG) of one.

    Args:
        device_name: as `torch.cuda.get_device_name` tells it.
    """
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    return next((peak for name, peak in _PEAK_TFLOPS if set(name.split()) <= words), None)


def model_flops_per_token(model: PreTrainedModel, seq_len: int, *, causal: bool = True) -> float:
    """Floating-point operations that a token takes, forward and backward.

    With `N` the matrix parameters that a token meets and `L` layers of `A` heads of size `D`, over sequences of `S`:

        6 N  +  12 L A D S / 2

    A multiplication by a matrix is 2 operations per parameter forward and 4 backward (the gradients of input and
    weight), or 2 where the weight is frozen. Attention takes `2 A D S` for `Q K^T` and as much for the sum over values,
    and backward twice that; half of it where it is causal, since a token sees half of the sequence on average. This is
    PaLM's model FLOPs (arXiv 2204.02311, appendix B) and torchtitan's count, apart from the causal half and frozen
    weights. `N` holds of the experts the top-k that a token goes to, the router and the output head; the input
    embedding is a look-up and does not count, unless it is the output head too. Recompute under activation
    checkpointing does not count: the model does not need it. Norms, activations and rotary embeddings do not count.

    Args:
        model: with `MoE` layers, of any layout, on any device.
        seq_len: `S`.
        causal: whether attention looks back alone.
    """
    layers = moe_layers(model).values()
    experts = {parameter for layer in layers for parameter in layer.experts.slot_parameters().values()}
    operations = _products(parameter for parameter in model.parameters() if parameter not in experts)
    embedding, head = model.get_input_embeddings().get_parameter("weight"), model.get_output_embeddings()
    if head is None or head.get_parameter("weight") is not embedding:
        operations -= _products([embedding])
    for layer in layers:
        per_slot = _products(layer.experts.slot_parameters().values()) // layer.placement.num_rows
        operations += per_slot * layer.top_k
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 12 * config.num_hidden_layers * heads * head_dim * seq_len
    return operations + attention / (2 if causal else 1)


def _products(parameters: Iterable[nn.Parameter]) -> int:
    """Operations of the products with all matrices."""
    return sum(
        parameter.numel() * (6 if parameter.requires_grad else 4) for parameter in parameters if parameter.ndim > 1
    )


@dataclass(frozen=True)
class Speed:
    """What turns tokens per second into metrics.

    Attributes:
        flops_per_token: see `model_flops_per_token`.
        peak: of the device, dense bf16, in TFLOP/s; `None` where it is not known.
    """

    flops_per_token: float
    peak: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, seq_len: int, device: torch.device) -> Speed:
        peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return cls(model_flops_per_token(model, seq_len), peak)

    def metrics(self, tokens_per_second: float) -> dict[str, float | None]:
        """The metrics of a rank that takes so many tokens per second; `mfu` is in percent."""
        tflops = tokens_per_second * self.flops_per_token / 1e12
        return {
            "tokens_per_second_per_gpu": tokens_per_second,
            "tflops": tflops,
            "mfu": None if self.peak is None else 100 * tflops / self.peak,
        }
