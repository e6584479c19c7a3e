"""A training step on one GPU: Qwen3 10B-A1B cut to 4 layers, 4,096 tokens per sequence, ours beside the peers.

    python -m benchmarks.train_step_gpu [--rounds 7] [--batch 4] [--variants ...] [--no-compile] [--write]

All start from one checkpoint, in bfloat16 with fused AdamW, see the same batches and take turns, one step at a time; a
ratio is taken within a round. Blocks are compiled (torch.compile) in all of them. Ours computes experts by its Triton
kernels and decides routes by one (`crossdock`), or does both by torch (`crossdock, grouped_mm`). Peers are
transformers' model with `grouped_mm` experts, with SonicMoE's where that is installed, and with torchtitan's
`GroupedExperts` and dispatcher where that is. Losses must agree. Peak memory is what a step takes at most, a variant's
own parameters and optimizer included.

`--device cpu` runs a tiny model through everything, in Triton's interpreter (TRITON_INTERPRET=1): its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.expert_kernels import sonic_experts, sonic_routes
from benchmarks.results_file import spread, write_results
from crossdock.checkpoint import HFCheckpoint
from crossdock.models import FAMILIES, batch_loss, build_model, materialise
from crossdock.moe import finish_step, set_batch_totals
from crossdock.moe_config import MoEConfig
from crossdock.parallel import CompileConfig, apply_compile

NUM_LAYERS, SEQ_LEN = 4, 4096
OURS, OURS_PLAIN = "crossdock", "crossdock, grouped_mm"
TRANSFORMERS, SONIC, TORCHTITAN = "transformers, grouped_mm", "transformers, sonicmoe", "torchtitan's experts"
VARIANTS = (OURS, OURS_PLAIN, TRANSFORMERS, SONIC, TORCHTITAN)
NEEDS = {SONIC: "sonicmoe", TORCHTITAN: "torchtitan"}
GOAL = 1.3
# Relative, of the loss after some steps in bfloat16.
TOLERANCE = 2e-2

Step = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="all that are installed")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/train_step_gpu_DATE.json")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.train_step_gpu needs a GPU: there is none here (--device cpu tries it)", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    variants = given.variants or [name for name in VARIANTS if name not in NEEDS or find_spec(NEEDS[name])]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), variants, device, given.batch, given.rounds, compiled=not given.no_compile)
    if given.write:
        write_results("train_step_gpu", ["torch", "triton", "transformers", "torchtitan", "sonic-moe"], rows)
    return 0 if all(row["losses_agree"] for row in rows) else 1


def compare(
    folder: Path, variants: list[str], device: torch.device, batch: int, rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    family = FAMILIES["qwen3"]
    is_tiny = device.type == "cpu"
    config = family.hf_config("debug" if is_tiny else "10B-A1B")
    seq_len = 16 if is_tiny else SEQ_LEN
    config.num_hidden_layers = 2 if is_tiny else NUM_LAYERS
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    steps: dict[str, Step] = {}
    own_bytes: dict[str, int] = {}
    for name in variants:
        model, loss = build(name, folder, device)
        if compiled and not is_tiny:
            apply_compile(model, CompileConfig(enable=True))
        steps[name], own_bytes[name] = make_step(model, loss, device, own=name in (OURS, OURS_PLAIN))
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randint(0, config.vocab_size, (batch, seq_len + 1), generator=generator).to(device)

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, list[float]] = {name: [] for name in variants}
    transient: dict[str, int] = dict.fromkeys(variants, 0)
    for number in range(-2, rounds):
        tokens = draw()
        for name in variants[number % len(variants) :] + variants[: number % len(variants)]:
            taken, loss, peak = measure(steps[name], tokens)
            losses[name].append(loss)
            if number >= 0:
                seconds[name].append(taken)
                transient[name] = max(transient[name], peak)
    memory = {name: (own_bytes[name] + transient[name]) / 2**30 for name in variants}
    return report(f"{batch} x {seq_len}, {config.num_hidden_layers} layers", batch * seq_len, seconds, losses, memory)


def build(name: str, folder: Path, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A variant's model, and how its mean loss is computed."""
    if name in (OURS, OURS_PLAIN):
        family = FAMILIES["qwen3"]
        moe = MoEConfig(experts="triton", router_kernel="triton") if name == OURS else MoEConfig(experts="grouped_mm")
        model = build_model(family, family.hf_config_from(folder), moe, torch.bfloat16)
        materialise(family, model, device, weights=HFCheckpoint.open(folder))
        return model, _our_loss
    experts = "sonicmoe_installed" if name == SONIC else "grouped_mm"
    if name == SONIC:
        ALL_EXPERTS_FUNCTIONS.register(experts, _sonic_experts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation=experts)
    if name == TORCHTITAN:
        for block in model.model.layers:
            block.mlp.experts = TorchtitanExperts(block.mlp.experts)
    nn.Module.to(model, device)
    return model, _their_loss


def _our_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    set_batch_totals(model, len(tokens), labels.numel())
    return batch_loss(model, inputs, labels) / labels.numel()


def _their_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class TorchtitanExperts(nn.Module):
    """torchtitan's experts between its local dispatcher's two halves, in the place of transformers'."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        from torchtitan.models.common.moe import GroupedExperts  # type: ignore[import-not-found]
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # type: ignore[import-not-found]

        self.num_experts, hidden, inner = theirs.down_proj.shape
        self.num_experts, top_k = len(theirs.gate_up_proj), theirs.config.num_experts_per_tok
        config = GroupedExperts.Config(dim=hidden, hidden_dim=inner, num_experts=self.num_experts)
        self.experts = GroupedExperts(config)
        gate, up = theirs.gate_up_proj.detach().chunk(2, dim=1)
        for name, weight in (("w1_EFD", gate), ("w3_EFD", up), ("w2_EDF", theirs.down_proj.detach())):
            setattr(self.experts, name, nn.Parameter(weight.contiguous()))
        self.dispatcher = LocalTokenDispatcher(LocalTokenDispatcher.Config(num_experts=self.num_experts, top_k=top_k))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts)
        rows, counts, metadata = self.dispatcher.dispatch(hidden_states, top_k_weights, top_k_index, counts)
        return self.dispatcher.combine(self.experts(rows, counts), metadata, hidden_states)


def _sonic_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    routes = sonic_routes(top_k_index)
    return sonic_experts(hidden_states, routes, top_k_weights, module.gate_up_proj, module.down_proj)


def make_step(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], device: torch.device, *, own: bool
) -> tuple[Step, int]:
    """One optimizer step on a batch `[B, S + 1]`, and the bytes of parameters and optimizer."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

    def step(tokens: Tensor) -> Tensor:
        value = loss(model, tokens)
        value.backward()
        optimizer.step()
        if own:
            finish_step(model, None)
        optimizer.zero_grad()
        return value.detach()

    return step, 3 * sum(parameter.numel() * parameter.itemsize for parameter in parameters)


def measure(step: Step, tokens: Tensor) -> tuple[float, float, int]:
    """Seconds, loss, and the most bytes that the step took beyond what was there before."""
    if not tokens.is_cuda:
        started = time.perf_counter()
        loss = step(tokens).item()
        return time.perf_counter() - started, loss, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    loss = step(tokens)
    torch.cuda.synchronize()
    return time.perf_counter() - started, loss.item(), torch.cuda.max_memory_allocated() - before


def report(
    case: str, tokens: int, seconds: dict[str, list[float]], losses: dict[str, list[float]], memory: dict[str, float]
) -> list[dict[str, Any]]:
    """Print, and return a row for ours beside each other."""
    print(f"\n{case}", flush=True)
    rates = {name: [tokens / each for each in taken] for name, taken in seconds.items()}
    rows = []
    for name, taken in rates.items():
        line = f"{name:>26}: {statistics.median(taken):10,.0f} tokens/s  {memory[name]:6.2f} GiB"
        line += f"  loss {losses[name][-1]:.4f}"
        if name != OURS and OURS in rates:
            ratios = spread([own / theirs for own, theirs in zip(rates[OURS], taken, strict=True)])
            agree = all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(losses[OURS], losses[name], strict=True))
            line += f"  ours is {ratios['median']:.3f} times as fast ({ratios['low']:.3f} to {ratios['high']:.3f})"
            row: dict[str, Any] = {"case": case, "figure": round(statistics.median(rates[OURS]), 1), "unit": "tokens/s"}
            row |= {"peer": name, "peer_figure": round(statistics.median(taken), 1)}
            row |= {"ratio": ratios["median"], "spread": ratios, "losses_agree": agree}
            row |= {"peak_memory_gib": round(memory[OURS], 3), "peer_peak_memory_gib": round(memory[name], 3)}
            if name != OURS_PLAIN:
                row |= {"goal": GOAL, "met": agree and ratios["median"] >= GOAL}
            rows.append(row)
            line += "" if agree else "  LOSSES DO NOT AGREE"
        print(line, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
